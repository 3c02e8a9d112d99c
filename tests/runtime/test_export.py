"""What `torch.export` and `torch.onnx.export` write is opened where this package is not installed."""

import io
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from hf_lowrank import CompressionConfig, compress, kernels
from hf_lowrank.runtime.layers import build_layer
from hf_lowrank.runtime.tracing import must_decompose

from .conftest import calibration, tiny_gpt2, tiny_llama
from .every_layer import EVERY_LAYER, SOME_LAYERS, N

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
BATCH, LENGTH = torch.export.Dim("batch", min=1, max=16), torch.export.Dim("length", min=1, max=64)
PROGRAM = """
import sys, torch
program, inputs, outputs = sys.argv[1:]
model = torch.export.load(program).module()
torch.save([model(x) for x in torch.load(inputs)], outputs)
assert not any(name.partition(".")[0] in ("hf_lowrank", "transformers") for name in sys.modules)
"""
"""Opens an exported program in a process without this package, and computes with it."""
RECIPES = {
    "slab": (lambda: tiny_llama(num_hidden_layers=1), "slab", 0.5),
    "quantized, with biases": (lambda: tiny_gpt2(blocks=1), "gptq", 0.8),
    "experts": (lambda: tiny_mixtral(), "svd", 0.4),
}
"""Function that builds a model of one block, method and ratio."""


class Layers(nn.ModuleList):
    """Applies every layer to the same input, so that one export takes all of them."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self]


class Logits(nn.Module):
    """Returns the logits of a model alone, as an export has no class for more."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids, use_cache=False).logits


def tiny_mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_local_experts": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=64, max_position_embeddings=64, **sizes, **heads)).eval()


@dataclass(frozen=True)
class Export:
    """A module, and the program that it was exported to."""

    module: nn.Module
    program: torch.export.ExportedProgram


@pytest.fixture(scope="module", params=RECIPES)
def model(request: pytest.FixtureRequest) -> Export:
    if request.param == "experts" and TORCH < (2, 7):
        pytest.skip("torch 2.6 does not export any mixture of experts")
    make, method, ratio = RECIPES[request.param]
    config = CompressionConfig(method=method, ratio=ratio, samples=4, sequence_length=16)
    logits = Logits(compress(make(), config, calibration=calibration(), progress=False).eval())
    shapes = {"input_ids": {0: BATCH, 1: torch.export.Dim("length", min=2, max=64)}}
    return Export(logits, torch.export.export(logits, (ids(2, 9),), dynamic_shapes=shapes, strict=False))


@pytest.fixture(scope="module")
def every_layer() -> Export:
    """All layers, exported while the kernels are loaded."""
    layers = layers_of(EVERY_LAYER)
    kernels.load()
    shapes = {"x": {0: BATCH, 1: LENGTH}}
    program = torch.export.export(layers, (tokens(2, 5),), dynamic_shapes=shapes, strict=False)
    kernels.unload()
    return Export(layers, program)


def layers_of(names: Iterable[str], dtype: torch.dtype = torch.float32) -> Layers:
    return Layers(EVERY_LAYER[name]() for name in names).to(dtype).eval()


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, N, generator=torch.Generator().manual_seed(1)).to(dtype)


def ids(*shape: int) -> Tensor:
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(1))


def saved(program: torch.export.ExportedProgram) -> io.BytesIO:
    """Return the file of a program, after a look at its operations."""
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [target for target in targets if "hf_lowrank" in target]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return file


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    tolerance = 2e-5 if expected.dtype in (torch.float32, torch.float64) else 4 * torch.finfo(expected.dtype).eps
    limit = tolerance * max(float(expected.detach().abs().max()), 1)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=limit)


def assert_all_close(outputs: list[Tensor], expected: list[Tensor]) -> None:
    for output, reference in zip(outputs, expected, strict=True):
        assert_close(output, reference)


# --- torch.export ---------------------------------------------------------------------------------------------------


def test_a_program_of_every_layer_runs_without_the_package(every_layer: Export, tmp_path: Path) -> None:
    inputs = [tokens(2, 5), tokens(1, 1), tokens(7, 3)]
    (tmp_path / "layers.pt2").write_bytes(saved(every_layer.program).getvalue())
    torch.save(inputs, tmp_path / "inputs.pt")
    # The package may still be registered as installed, without being found.
    environment = os.environ | {"PYTHONPATH": "", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [sys.executable, "-c", PROGRAM, "layers.pt2", "inputs.pt", "outputs.pt"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for x, outputs in zip(inputs, torch.load(tmp_path / "outputs.pt"), strict=True):
        assert_all_close(outputs, every_layer.module(x))


def test_an_exported_program_keeps_the_packed_tensors_and_trains(every_layer: Export) -> None:
    layers, program = every_layer.module, every_layer.program.module()
    for key, tensor in layers.state_dict().items():
        assert torch.equal(every_layer.program.state_dict[key], tensor), key
    layers.zero_grad()
    for module in (program, layers):
        sum(y.square().sum() for y in module(tokens(3, 2))).backward()
    gradients = dict(program.named_parameters())
    for key, parameter in layers.named_parameters():
        if parameter.numel():
            torch.testing.assert_close(gradients[key].grad, parameter.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["none-2-0", "slab", "rows-pivoted", "bitmask, 6 bits"])
def test_a_layer_exports_by_itself(name: str) -> None:
    layer = EVERY_LAYER[name]().eval()
    program = torch.export.export(layer, (tokens(3),), strict=False)
    assert_close(program.run_decompositions().module()(tokens(3)), layer(tokens(3)))


@pytest.mark.parametrize(("dtype", "strict"), [(torch.float32, True), (torch.bfloat16, False)], ids=str)
def test_layers_export_strictly_and_in_half_precision(dtype: torch.dtype, strict: bool) -> None:
    layers = layers_of(SOME_LAYERS, dtype)
    shapes = {"x": {0: BATCH, 1: LENGTH}}
    program = torch.export.export(layers, (tokens(2, 5, dtype=dtype),), dynamic_shapes=shapes, strict=strict)
    x = tokens(3, 7, dtype=dtype)
    assert_all_close(torch.export.load(saved(program)).module()(x), layers(x))


def test_a_whole_model_exports(model: Export) -> None:
    opened = torch.export.load(saved(model.program)).module()
    for input_ids in (ids(2, 9), ids(1, 3), ids(3, 20)):
        assert_close(opened(input_ids), model.module(input_ids))


def test_operations_are_taken_apart_only_where_they_must_be() -> None:
    answers = {}
    torch.compile(lambda x: x + answers.setdefault("compiled", must_decompose()), backend="eager")(torch.ones(1))
    torch.func.vmap(lambda x: x + answers.setdefault("vmap", must_decompose()))(torch.ones(1))
    assert must_decompose() is False and answers == {"compiled": False, "vmap": True}


# --- ONNX -----------------------------------------------------------------------------------------------------------


def assert_onnx_runtime_agrees(
    exported: nn.Module | torch.export.ExportedProgram,
    module: nn.Module,
    inputs: list[Tensor],
    path: Path,
    **options: object,
) -> None:
    """Fail unless ONNX Runtime gives what a module gives, after an export with the first of these inputs."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.onnx.export(exported, (inputs[0],), path, verbose=False, external_data=False, **options)  # type: ignore[arg-type]
    session = onnxruntime.InferenceSession(path)
    name = session.get_inputs()[0].name
    for x in inputs:
        outputs = [torch.from_numpy(output) for output in session.run(None, {name: x.numpy()})]
        expected = module(x)
        assert_all_close(outputs, expected if isinstance(expected, list) else [expected])


@pytest.mark.filterwarnings("ignore")
def test_onnx_runtime_computes_every_layer(every_layer: Export, tmp_path: Path) -> None:
    inputs = [tokens(2, 5), tokens(1, 1), tokens(7, 3)]
    path = tmp_path / "layers.onnx"
    assert_onnx_runtime_agrees(every_layer.program, every_layer.module, inputs, path, dynamo=True)


@pytest.mark.filterwarnings("ignore")
def test_onnx_runtime_computes_in_half_precision(tmp_path: Path) -> None:
    layers, x = layers_of(["slab", "rows+pivoted, 4 bits"], torch.float16), tokens(2, 5, dtype=torch.float16)
    assert_onnx_runtime_agrees(layers, layers, [x], tmp_path / "layers.onnx", dynamo=True)


@pytest.mark.filterwarnings("ignore")
def test_onnx_runtime_computes_a_whole_model(model: Export, tmp_path: Path) -> None:
    inputs = [ids(2, 9), ids(1, 3), ids(3, 20)]
    assert_onnx_runtime_agrees(model.program, model.module, inputs, tmp_path / "model.onnx", dynamo=True)


@pytest.mark.filterwarnings("ignore")
def test_an_onnx_file_holds_the_packed_tensors(tmp_path: Path) -> None:
    spec = replace(EVERY_LAYER["slab"]().spec, rank=8)
    layer = build_layer(spec, 600, 500).eval()
    assert_onnx_runtime_agrees(layer, layer, [torch.randn(1, 600)], tmp_path / "layer.onnx", dynamo=True)
    dense_bytes = 500 * 600 * 4
    assert layer.stored_bits() / 8 < (tmp_path / "layer.onnx").stat().st_size < dense_bytes / 4


@pytest.mark.filterwarnings("ignore")
def test_the_older_exporter_takes_every_operation(tmp_path: Path) -> None:
    """It is `torch.onnx.export(dynamo=False)`, which traces with `torch.jit.trace`."""
    layers, inputs = layers_of(SOME_LAYERS), [tokens(2, 5), tokens(7, 3)]
    options = {"dynamo": False, "opset_version": 18, "input_names": ["x"], "dynamic_axes": {"x": [0, 1]}}
    assert_onnx_runtime_agrees(layers, layers, inputs, tmp_path / "layers.onnx", **options)
