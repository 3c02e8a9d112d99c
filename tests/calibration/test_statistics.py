"""Statistics are sums over exactly the tokens that count, and running a block by itself is the model's own forward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_lowrank import CompressionConfig, NumericalError, compress
from hf_lowrank.calibration import TokenBatch, block_statistics, capture, run_block
from hf_lowrank.methods import Statistics
from hf_lowrank.models.architectures import find_blocks, find_layers

from ..support import tiny_models

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_models.llama,
    "gpt2": tiny_models.gpt2,
    "opt": tiny_models.opt,
    "gemma2": tiny_models.gemma2,
}


def all_statistics(model: PreTrainedModel, tokens: list[TokenBatch], needs_gram: bool = True) -> dict[str, Statistics]:
    """Return the statistics of every layer of the dense model."""
    blocks = find_blocks(model)
    layers = find_layers(blocks)
    batches = capture(model, blocks, tokens)
    all_layers: dict[str, Statistics] = {}
    with torch.no_grad():
        for index, block in enumerate(blocks.values()):
            modules = {layer.name: model.get_submodule(layer.name) for layer in layers if layer.block == index}
            for name, statistics in block_statistics(block, index, batches, modules, needs_gram, move=True).items():
                if statistics is not None:
                    all_layers[name] = statistics
    return all_layers


def direct_inputs(model: PreTrainedModel, rows: list[Tensor]) -> dict[str, Tensor]:
    """Return the inputs (T, n) of every layer when the rows are run one by one, without padding."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        model.get_submodule(layer.name).register_forward_pre_hook(
            lambda module, inputs, name=layer.name: seen.setdefault(name, []).append(
                inputs[0].detach().flatten(0, -2).double()
            )
        )
        for layer in find_layers(find_blocks(model))
    ]
    with torch.no_grad():
        for row in rows:
            model(row[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("name", MODELS)
def test_statistics_equal_a_direct_computation(name: str) -> None:
    model = MODELS[name]()
    ids = tiny_models.token_ids(6, 24)
    inputs = direct_inputs(model, list(ids))
    all_layers = all_statistics(model, [TokenBatch(ids[:4]), TokenBatch(ids[4:])])
    assert all_layers.keys() == inputs.keys()
    for layer, x in inputs.items():
        statistics = all_layers[layer]
        assert statistics.tokens == len(x) == 6 * 24
        assert statistics.gram is not None
        assert statistics.gram.dtype == torch.float64
        close = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(statistics.gram, x.T @ x, **close)
        torch.testing.assert_close(statistics.column_norms, x.norm(dim=0), **close)
        torch.testing.assert_close(statistics.mean, x.mean(dim=0), **close)
        torch.testing.assert_close(statistics.mean_abs, x.abs().mean(dim=0), **close)


# the base model of GPT-2 numbers positions from the padding on, so that left padding would change what it computes
@pytest.mark.parametrize(
    ("name", "side"),
    [("llama", "right"), ("llama", "left"), ("gpt2", "right"), ("gemma2", "right"), ("gemma2", "left")],
)
def test_padding_leaves_no_trace_in_the_statistics(name: str, side: str) -> None:
    model = MODELS[name]()
    rows = [tiny_models.token_ids(1, length, seed=length)[0] for length in (24, 9, 17)]
    padded, mask = torch.zeros(3, 24, dtype=torch.long), torch.zeros(3, 24, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(24 - len(row), 24)
        padded[index, place], mask[index, place] = row, 1
    unpadded = all_statistics(model, [TokenBatch(row[None]) for row in rows])
    for layer, statistics in all_statistics(model, [TokenBatch(padded, mask)]).items():
        expected = unpadded[layer]
        assert statistics.tokens == expected.tokens == 24 + 9 + 17
        torch.testing.assert_close(statistics.gram, expected.gram, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(statistics.mean_abs, expected.mean_abs, rtol=1e-4, atol=1e-4)


def test_layers_with_one_input_share_one_gram() -> None:
    statistics = all_statistics(
        tiny_models.llama(), [TokenBatch(tiny_models.token_ids(2, 16)), TokenBatch(tiny_models.token_ids(1, 16))]
    )
    for block in range(4):
        attention, mlp = f"model.layers.{block}.self_attn", f"model.layers.{block}.mlp"
        q, k, v, o = (statistics[f"{attention}.{name}_proj"] for name in "qkvo")
        gate, up, down = (statistics[f"{mlp}.{name}_proj"] for name in ("gate", "up", "down"))
        assert q is k is v
        assert gate is up
        assert len(set(map(id, (q, o, gate, down)))) == 4


def test_the_gram_is_summed_only_where_a_method_needs_it() -> None:
    all_layers = all_statistics(tiny_models.llama(), [TokenBatch(tiny_models.token_ids(2, 16))], needs_gram=False)
    for statistics in all_layers.values():
        assert statistics.gram is None
        assert bool((statistics.column_norms > 0).all())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_running_blocks_by_themselves_is_the_models_own_forward(name: str, padded: bool) -> None:
    model = MODELS[name]()
    ids = tiny_models.token_ids(3, 24)
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    batch = TokenBatch(ids, mask if padded else None)
    blocks = find_blocks(model)
    with torch.no_grad():
        outputs: dict[int, Tensor] = {}

        def keep(index: int) -> Callable[[nn.Module, tuple, Tensor | tuple], None]:
            def hook(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
                outputs[index] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [block.register_forward_hook(keep(index)) for index, block in enumerate(blocks.values())]
        model(ids, attention_mask=mask if padded else None, use_cache=False)
        for handle in handles:
            handle.remove()
        (captured,) = capture(model, blocks, [batch])
        for index, block in enumerate(blocks.values()):
            captured.hidden = run_block(block, index, captured)
            assert torch.equal(captured.hidden, outputs[index])


def test_blocks_keep_their_own_arguments() -> None:
    """Gemma 2 alternates between full and windowed attention, so that its blocks are called with different masks."""
    model = tiny_models.gemma2()
    ids = tiny_models.token_ids(1, 24)
    (captured,) = capture(model, find_blocks(model), [TokenBatch(ids)])
    assert len(captured.calls) == 4
    full, windowed = (captured.calls[index][1].get("attention_mask") for index in (1, 0))
    assert (full is None) != (windowed is None) or not torch.equal(full, windowed)


def test_a_block_called_twice_runs_twice() -> None:
    model = tiny_models.llama()
    model.model.layers[1] = model.model.layers[0]
    outputs: list[Tensor] = []
    handle = model.model.layers[0].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    blocks = find_blocks(model)
    (captured,) = capture(model, blocks, [TokenBatch(tiny_models.token_ids(1, 8))])
    call = captured.calls[0]
    assert call is not None and len(call.repeats) == 1
    assert "model.layers.1" not in blocks
    outputs.clear()
    last = run_block(model.model.layers[0], 0, captured)
    handle.remove()
    assert len(outputs) == 2
    assert torch.equal(last, outputs[1])


def test_a_calibration_input_that_overflows_names_the_layer() -> None:
    model = tiny_models.llama()
    with torch.no_grad():
        model.model.layers[2].input_layernorm.weight[5] = (
            3e38  # finite, unlike its product with a hidden state beyond ±1.13
        )
    with pytest.raises(
        NumericalError,
        match=r"model\.layers\.2\.self_attn\.[qkv]_proj: the calibration input is not finite in channel 5",
    ):
        compress(
            model,
            CompressionConfig(method="svd-llm", ratio=0.3, samples=2, sequence_length=16),
            calibration=[list(range(3, 19))] * 2,
        )
