"""`compress` computes in modes of its own: what the caller has set changes no byte, and is as it was afterwards."""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_lowrank import CompressionConfig, compress
from hf_lowrank.compression.spectral_linear import checkpointed
from hf_lowrank.evaluation.perplexity import evaluate_windows
from hf_lowrank.methods import registered_methods
from hf_lowrank.models.architectures import find_blocks
from hf_lowrank.peft import recompress

from ..support import tiny_models
from .recipes import IDS, RECIPES

OPTIONS = {**RECIPES, "oats": {"iterations": 2}, "soco": {"steps": 3, "finish_steps": 1, "batch_tokens": 64}}
RATIOS = {"gptq": 0.84, "rtn": 0.84}
IDS_HERE = [row[:16] for row in IDS[:2]]
OF_EVERY_STRATEGY = ("slab", "soco", "lowrank")
"""One method of each strategy; two of them need gradients."""


def recipe(method: str, **changes: Any) -> CompressionConfig:
    fields = {"options": OPTIONS.get(method, {}), "samples": 2, "sequence_length": 16, **changes}
    return CompressionConfig(method=method, ratio=RATIOS.get(method, 0.4), **fields)


def tiny(**changes: Any) -> PreTrainedModel:
    """Build a Llama of two blocks that has dropout."""
    return tiny_models.llama(
        num_hidden_layers=2, hidden_size=16, intermediate_size=40, attention_dropout=0.5, pad_token_id=0, **changes
    )


def compressed(method: str, model: PreTrainedModel | None = None, **changes: Any) -> dict[str, Tensor]:
    """Return the tensors of a model that was compressed."""
    model = tiny() if model is None else model
    return compress(model, recipe(method, **changes), calibration=IDS_HERE, progress=False).state_dict()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@contextmanager
def changed(get: Callable[[], Any], change: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = get()
    change(value)
    try:
        yield
    finally:
        change(before)


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[None]:
    return changed(torch.get_default_dtype, torch.set_default_dtype, dtype)


def matmul_precision(precision: str) -> AbstractContextManager[None]:
    return changed(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, precision)


@contextmanager
def newer_precision(precision: str) -> Iterator[None]:
    """Set the switches that torch has since 2.9, which products on CPUs follow."""
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(matmul, "fp32_precision"):
        yield
        return
    with changed(lambda: "none", lambda value: setattr(matmul, "fp32_precision", value), precision):
        yield


def deterministic(warn_only: bool) -> AbstractContextManager[None]:
    return changed(
        torch.are_deterministic_algorithms_enabled,
        lambda enabled: torch.use_deterministic_algorithms(enabled, warn_only=enabled and warn_only),
        True,
    )


@contextmanager
def seeds(seed: int) -> Iterator[None]:
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    yield


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "autocast on a GPU": lambda: torch.autocast("cuda", torch.float16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "gradients": torch.enable_grad,
    "anomaly detection": torch.autograd.detect_anomaly,
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float16 by default": lambda: default_dtype(torch.float16),
    "meta device by default": lambda: torch.device("meta"),
    "CPU by default": lambda: torch.device("cpu"),
    "deterministic algorithms": lambda: deterministic(warn_only=False),
    "deterministic algorithms, as a warning": lambda: deterministic(warn_only=True),
    "medium precision": lambda: matmul_precision("medium"),
    "high precision": lambda: matmul_precision("high"),
    "newer switch of precision": lambda: newer_precision("bf16"),
    "another seed": lambda: seeds(5),
}
"""Modes that a caller may be in."""
ALL_AT_ONCE = (
    "autocast to bfloat16",
    "inference mode",
    "float64 by default",
    "meta device by default",
    "deterministic algorithms",
    "medium precision",
    "another seed",
)


@contextmanager
def modes(*names: str) -> Iterator[None]:
    """Be in modes of these names."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(MODES[name]())
        yield


def callers_state(model: PreTrainedModel) -> dict[str, Any]:
    """Return all of the caller's that might be changed: the modes, the generators, and the state of the model."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    hooks = 0
    for module in model.modules():
        hooks += len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
    return {
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "inference mode": torch.is_inference_mode_enabled(),
        "gradients": torch.is_grad_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "precision": precisions(),
        "threads": torch.get_num_threads(),
        "random states": [random.getstate(), repr(numpy.random.get_state()), torch.get_rng_state().tolist()],
        "requires_grad": {name for name, tensor in tensors.items() if tensor.requires_grad and "." in name},
        "hooks": hooks,
        "forwards": [name for name, module in model.named_modules() if "forward" in vars(module)],
        "config": {**model.config.to_dict(), "quantization_config": None},
        "generation": model.generation_config.to_dict() if model.generation_config else None,
        "checkpointing": model.is_gradient_checkpointing,
    }


def precisions() -> list[Any]:
    """Return the old setting of precision, where torch tells it, and the newer switches, where there are any."""
    found = []
    with suppress(RuntimeError):  # the newer switches are set otherwise
        found.append(torch.get_float32_matmul_precision())
    for backend in (torch.backends.mkldnn, torch.backends.cuda):
        found.append(getattr(getattr(backend, "matmul", None), "fp32_precision", None))
    return found


def of_dense_parts(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state without what a compressed layer has in place of a dense one: its parameters, by other names."""
    outside = {name for name in state["requires_grad"] if ".layers." not in name}
    return {**state, "requires_grad": outside}


def training_flags(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Tensor]]:
    """What the methods of every strategy give where the caller has set nothing."""
    return {method: compressed(method) for method in OF_EVERY_STRATEGY}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_of_the_caller_changes_no_byte_and_stays(mode: str, expected: dict[str, dict[str, Tensor]]) -> None:
    for method in OF_EVERY_STRATEGY:
        model = tiny()
        with modes(mode):
            before = callers_state(model)
            found = compressed(method, model)
            assert of_dense_parts(callers_state(model)) == of_dense_parts(before)
        assert_same(found, expected[method])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", registered_methods())
def test_all_modes_at_once_change_no_byte_of_any_method(method: str) -> None:
    model = tiny()
    outside = callers_state(model)
    expected = compressed(method, refinement_steps=2)
    assert callers_state(model) == outside
    with modes(*ALL_AT_ONCE):
        found = compressed(method, model, refinement_steps=2)
    assert_same(found, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", OF_EVERY_STRATEGY)
def test_flags_of_the_model_change_no_byte_and_stay(method: str, expected: dict[str, dict[str, Tensor]]) -> None:
    """Training mode with dropout, parts of it frozen or in evaluation mode, and gradient checkpointing."""
    model = tiny().train()
    model.gradient_checkpointing_enable()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[1].eval()
    model.config.use_cache = True
    before, flags = callers_state(model), training_flags(model)
    assert_same(compressed(method, model), expected[method])
    assert of_dense_parts(callers_state(model)) == of_dense_parts(before)
    found = training_flags(model)
    for name, training in found.items():
        assert training == flags.get(name, flags[name.rpartition(".")[0]]), name
    assert not any(found[name] for name in found if name.startswith("model.layers.1"))
    assert found["model.layers.0.mlp.up_proj"] and found["model.layers.0"]


class Broken(Exception):
    """Raised in the middle of a run."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", OF_EVERY_STRATEGY)
@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
@pytest.mark.parametrize(
    "breaks_at",
    [
        "execution.process_group.ProcessGroup.all_reduce",
        "calibration.statistics.StatisticsCollector.statistics",
        "methods.base.Method.neuron_order",
        "methods.base.Decomposition.to_layer",
    ],
)
def test_an_error_leaves_the_callers_modes_and_the_model_as_they_were(
    method: str, error: type[BaseException], breaks_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(f"hf_lowrank.{breaks_at}", broken)
    model = tiny().train()
    model.model.layers[1].eval()
    dense = copy.deepcopy(model.state_dict())
    flags = training_flags(model)
    with modes(*ALL_AT_ONCE):
        before = callers_state(model)
        with pytest.raises(error):
            compressed(method, model)
        assert callers_state(model) == before
    assert training_flags(model) == flags
    assert_same(model.state_dict(), dense)


@pytest.mark.parametrize("method", OF_EVERY_STRATEGY)
def test_a_model_made_in_inference_mode_comes_out_as_one_that_can_be_trained(method: str) -> None:
    with torch.inference_mode():
        model = tiny(tie_word_embeddings=True)
        rows = torch.tensor(IDS_HERE)
        compress(model, recipe(method), calibration=[{"input_ids": rows}], progress=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.train()
    output = model(rows.clone(), labels=rows.clone())
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.numel())


@pytest.mark.filterwarnings("ignore")
def test_modes_change_no_byte_of_a_model_that_is_compressed_while_it_is_loaded(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)

    def loaded() -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=recipe("svd-llm"))
        return model

    expected = loaded().state_dict()
    with modes(*(mode for mode in ALL_AT_ONCE if "device" not in mode)):
        model = loaded()
    assert_same(model.state_dict(), expected)
    model(torch.tensor(IDS_HERE), labels=torch.tensor(IDS_HERE)).loss.backward()


@pytest.mark.filterwarnings("ignore")
def test_modes_and_dropout_change_no_figure_of_an_evaluation() -> None:
    model, reference = tiny().train(), tiny_models.llama(seed=1, num_hidden_layers=1)
    rows = torch.tensor(IDS_HERE)
    expected = evaluate_windows(tiny(), rows, 16, reference=reference)
    with modes(*ALL_AT_ONCE):
        before = callers_state(model)
        assert evaluate_windows(model, rows, 16, reference=reference) == expected
        assert callers_state(model) == before
    assert all(training_flags(model).values()) and not any(training_flags(reference).values())


@pytest.mark.filterwarnings("ignore")
def test_modes_change_no_byte_of_a_recompression() -> None:
    expected = compress(tiny(), recipe("svd"), calibration=IDS_HERE, progress=False)
    found = copy.deepcopy(expected)
    recompress(expected, rank=2)
    with modes(*ALL_AT_ONCE):
        recompress(found, rank=2)
    assert_same(found.state_dict(), expected.state_dict())
    found(torch.tensor(IDS_HERE), labels=torch.tensor(IDS_HERE)).loss.backward()


def test_checkpointed_blocks_give_the_same_gradients_without_dropout() -> None:
    """As SoCo's training has them on a GPU."""
    model, rows = tiny(), torch.tensor(IDS_HERE)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(rows, labels=rows, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients()
    calls = []
    blocks = find_blocks(model)
    handle = next(iter(blocks.values())).self_attn.register_forward_hook(lambda *arguments: calls.append(1))
    with checkpointed(blocks.values()):
        found = gradients()
    handle.remove()
    assert len(calls) == 2  # forward, and once more in the backward pass
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    assert not any("forward" in vars(block) for block in blocks.values())
