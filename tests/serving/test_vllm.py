"""Compressed checkpoints in vLLM's own Python code, on a CPU.

The checkpoint is recognized and loaded shard by shard, and the logits are those of transformers. vLLM brings its
attention as compiled kernels, which its wheels for GPUs lack on a CPU. Plain attention stands in for it here.
Everything else is vLLM's: configuration, model, loaders, linear layers. The tests are skipped where vLLM is not
installed.
"""

import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_lowrank import CheckpointError, CompressionConfig, CompressionError, LayerSpec, compress
from hf_lowrank.peft.merging import add_lowrank
from tests.support import tiny_models
from tests.support.assets import PROJECT

if importlib.util.find_spec("vllm") is None:
    pytest.skip(
        "vLLM is not installed; its wheels want a torch and a transformers of their own", allow_module_level=True
    )
if not torch.cuda.is_available():
    os.environ["VLLM_TARGET_DEVICE"] = "cpu"

from vllm.config import set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.platforms import current_platform

from hf_lowrank.serving.vllm import CompressedCheckpoint, CompressedLinearMethod, register

if current_platform.device_type != "cpu":
    pytest.skip("these tests were written for vLLM on a CPU", allow_module_level=True)

LAYOUTS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "bitmask and signs": ("slab", 0.4, {}),
    "rows and columns": ("sola", 0.3, {}),
    "low rank": ("svd-llm", 0.3, {}),
    "pivoted, merged adapters": ("lowrank", 0.3, {}),
    "quantized": ("auto", 0.7, {}),
    "dense shards": ("slab", 0.4, {"modules_to_not_convert": ["k_proj", "up_proj"]}),
    "biases": ("slab", 0.4, {}),
    "OPT": ("slab", 0.4, {}),
}


class PlainAttention(nn.Module):
    """Causal attention of one sequence, for queries (tokens, heads · d) and keys and values (tokens, groups · d)."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.heads, self.groups = attention.num_heads, attention.num_kv_heads

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [
            x.unflatten(-1, (count, -1)).transpose(0, 1)
            for x, count in ((q, self.heads), (k, self.groups), (v, self.groups))
        ]
        y = nn.functional.scaled_dot_product_attention(
            *(part[None] for part in parts), is_causal=True, enable_gqa=True
        )
        return y[0].transpose(0, 1).flatten(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folder of a checkpoint for every layout."""
    root, made = tmp_path_factory.mktemp("served"), {}
    for number, (layout, (method, ratio, changes)) in enumerate(LAYOUTS.items()):
        dense = (
            tiny_models.opt()
            if layout == "OPT"
            else tiny_models.llama(num_hidden_layers=2, attention_bias=layout == "biases")
        )
        config = CompressionConfig(method=method, ratio=ratio, samples=4, sequence_length=32, **changes)
        model = compress(
            dense, config, tokenizer=tiny_models.tokenizer(), calibration=tiny_models.text(8), progress=False
        )
        if "adapters" in layout:
            for name in config_layers(model):
                layer = model.get_submodule(name)
                add_lowrank(
                    layer, torch.randn(3, layer.in_features), torch.randn(layer.out_features, 3) / 9, name=name
                )
        made[layout] = root / str(number)
        model.save_pretrained(made[layout])
    return made


@pytest.fixture(scope="module", autouse=True)
def one_process(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Set up vLLM's process group with one process. The format is registered twice, as in some of vLLM's processes."""
    register()
    register()
    with set_current_vllm_config(engine_config(folders["biases"])):
        init_distributed_environment(1, 0, f"file://{tmp_path_factory.mktemp('distributed') / 'store'}", 0, "gloo")
        initialize_model_parallel(1, 1)
    yield
    destroy_model_parallel()
    destroy_distributed_environment()


def config_layers(model: nn.Module) -> list[str]:
    return list(model.config.quantization_config.layers)


def engine_config(folder: Path) -> Any:
    """Return vLLM's config without its compiled operations, which its wheels for GPUs do not bring for a CPU."""
    plain = {"custom_ops": ["none"]}
    return EngineArgs(
        model=str(folder), dtype="float32", enforce_eager=True, max_model_len=32, compilation_config=plain
    ).create_engine_config()


def served(folder: Path) -> nn.Module:
    """Return the model as vLLM's default loader makes it."""
    config = engine_config(folder)
    with set_current_vllm_config(config):
        model = initialize_model(vllm_config=config)
        get_model_loader(config.load_config).load_weights(model, config.model_config)
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
    for name, module in list(model.named_modules()):
        if isinstance(module, Attention):
            model.set_submodule(name, PlainAttention(module))
    return model.eval()


def test_the_checkpoint_names_the_method(folders: dict[str, Path]) -> None:
    config = engine_config(folders["biases"])
    assert config.model_config.quantization == "hf_lowrank"
    assert get_quantization_config("hf_lowrank") is CompressedCheckpoint is type(config.quant_config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_logits_are_those_of_transformers(layout: str, folders: dict[str, Path]) -> None:
    """These are the logits of the whole model, in which every fused layer gives its shards' outputs side by side."""
    tokens = tiny_models.token_ids(1, 20)
    model, reference = served(folders[layout]), AutoModelForCausalLM.from_pretrained(folders[layout])
    with torch.no_grad():
        found = model.compute_logits(model(tokens[0], torch.arange(20)))
        wanted = reference(tokens).logits[0]
    torch.testing.assert_close(found[:, : wanted.shape[1]], wanted, rtol=0, atol=1e-5)
    methods = [
        module.quant_method
        for module in model.modules()
        if isinstance(getattr(module, "quant_method", None), CompressedLinearMethod)
    ]
    assert sorted(name for method in methods for name, spec in method.specs.items() if spec) == sorted(
        config_layers(reference)
    )


MASK = "model.layers.0.self_attn.k_proj.weight_mask"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(MASK), f"{MASK}: not in the checkpoint"),
        (lambda tensors: tensors[MASK].zero_(), f"{MASK}: has 0 bits set"),
        (lambda tensors: tensors.update({MASK: tensors[MASK][:3].clone()}), f"{MASK}: found torch.uint8"),
    ],
    ids=["missing", "wrong bits", "wrong shape"],
)
def test_a_damaged_checkpoint_is_not_served(change: Any, message: str, folders: dict[str, Path]) -> None:
    whole = engine_config(folders["bitmask and signs"])
    with set_current_vllm_config(whole):
        model = initialize_model(vllm_config=whole)
        tensors = load_file(folders["bitmask and signs"] / "model.safetensors")
        change(tensors)
        with pytest.raises(CheckpointError, match=re.escape(message)):
            model.load_weights(iter(tensors.items()))
            process_weights_after_loading(model, whole.model_config, torch.device("cpu"))


def test_what_cannot_be_served_is_one_line() -> None:
    spec = LayerSpec(rank=2)
    checkpoint = CompressedCheckpoint({"block.experts.0.up_proj": spec, "block.o_proj": replace(spec, bias=True)})
    with pytest.raises(
        CompressionError, match=r"^block\.experts\.0\.up_proj: vLLM puts it into a ModuleList.*hf-lowrank dense.*$"
    ):
        checkpoint.get_quant_method(nn.ModuleList(), "block.experts")
    assert checkpoint.get_quant_method(nn.ModuleList(), "block.attn") is None
    with pytest.raises(CompressionError, match=r"^block\.o_proj: stores a bias.*$"):
        RowParallelLinear(8, 8, bias=False, quant_config=checkpoint, prefix="block.o_proj")
    fused = CompressedLinearMethod({"a": spec, "b": spec})
    with pytest.raises(CompressionError, match=r"^a, b: vLLM fuses 3 layers here, the checkpoint has 2.*$"):
        fused.create_weights(nn.Module(), 8, [8, 8, 8], 8, 24, torch.float32)


def test_the_entry_point_is_the_function() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (target,) = project["entry-points"]["vllm.general_plugins"].values()
    assert EntryPoint("hf_lowrank", target, "vllm.general_plugins").load() is register
