"""Refinement brings blocks nearer to the dense ones, and changes nothing but the values of compressed layers."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_lowrank import CompressionConfig, CompressionError, compress
from hf_lowrank.calibration import BlockBatch, TokenBatch, capture, with_unigram_sequences
from hf_lowrank.compression.block_training import reason_not_to_train, train_block
from hf_lowrank.methods import Decomposition, make_method
from hf_lowrank.models.architectures import find_blocks
from hf_lowrank.runtime.layers import CompressedLinear
from tests.support import tiny_models

IDS = tiny_models.token_ids(4, 24)
METHODS = ["slab", "svd-llm", "sola", "wanda", "gptq", "auto", "lowrank"]
MODELS = {"llama": tiny_models.llama, "gpt2": tiny_models.gpt2, "opt": tiny_models.opt}


def refined(model: PreTrainedModel, method: str, steps: int, ratio: float = 0.45) -> PreTrainedModel:
    """Compress a model and refine its blocks in so many steps."""
    config = CompressionConfig(method=method, ratio=ratio, samples=4, sequence_length=24, refinement_steps=steps)
    return compress(model, config, calibration=IDS.tolist(), progress=False)


def block_output(block: nn.Module, hidden: Tensor, call: Any) -> Tensor:
    """Return the hidden states that a block gives for others, with the further arguments of a recorded call."""
    with torch.no_grad():
        output = block(hidden, *call.args, **call.kwargs)
    return output[0] if isinstance(output, tuple) else output


CASES = [("llama", method) for method in METHODS]
CASES += [(name, method) for name in ("gpt2", "opt") for method in ("slab", "sola", "auto")]
"""Every method on one model, and one method of every strategy on the others."""


@pytest.mark.parametrize(("name", "method"), CASES)
def test_every_block_comes_nearer_to_the_dense_one(name: str, method: str) -> None:
    dense = MODELS[name]()
    ratio = {"gptq": 0.8, "auto": 0.85}.get(method, 0.45)
    model = refined(copy.deepcopy(dense), method, 30, ratio)
    report = model.compression_report  # type: ignore[attr-defined]
    blocks = find_blocks(dense)
    assert [entry["name"] for entry in report["refinement"]] == list(blocks)
    share = getattr(make_method(method), "unigram_share", 0.0)
    batch = capture(dense, blocks, with_unigram_sequences([TokenBatch(IDS)], share, seed=0))[0]
    batch.compressed_twin = BlockBatch(batch.hidden, batch.calls)
    for index, entry in enumerate(report["refinement"]):
        assert entry["after"] < entry["before"] or entry["before"] < 1e-4
        call = batch.calls[index]
        assert call is not None
        assert batch.compressed_twin is not None
        # Count the reported figure a second time, from the outputs of both blocks.
        batch.hidden = block_output(blocks[entry["name"]], batch.hidden, call)
        compressed = model.get_submodule(entry["name"])
        batch.compressed_twin.hidden = block_output(compressed, batch.compressed_twin.hidden, call)
        difference = (batch.compressed_twin.hidden - batch.hidden).square().sum()
        assert entry["after"] == pytest.approx(float(difference / batch.hidden.square().sum()), rel=1e-3)


@pytest.mark.parametrize("method", ["slab", "auto", "sola"])
def test_only_stored_values_of_compressed_layers_change(method: str) -> None:
    ratio = 0.8 if method == "auto" else 0.45
    plain = refined(tiny_models.llama(dtype=torch.bfloat16), method, 0, ratio)
    model = refined(tiny_models.llama(dtype=torch.bfloat16), method, 20, ratio)
    trained = set()
    for name, layer in model.named_modules():
        if isinstance(layer, CompressedLinear):
            trained |= {f"{name}.{key}" for key, _ in layer.named_parameters()}
    after = model.state_dict()
    changed = 0
    for name, before in plain.state_dict().items():
        assert after[name].dtype == before.dtype
        if name in trained and before.numel():
            changed += not torch.equal(after[name], before)
        else:
            assert torch.equal(after[name], before), name
    assert changed > len(trained) / 2  # some stay as they are in bfloat16
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("method", ["sola", "slab"])
def test_the_report_measures_the_layers_after_refinement(method: str) -> None:
    dense = tiny_models.llama()
    model = refined(copy.deepcopy(dense), method, 5)
    twin = refined(copy.deepcopy(dense), method, 5)
    assert model.compression_report == twin.save_pretrained.report  # type: ignore[attr-defined]
    unrefined = refined(copy.deepcopy(dense), method, 0)
    after, before = layer_errors(model), layer_errors(unrefined)
    assert after.keys() == before.keys()
    assert any(after[name] != before[name] for name in after)


def layer_errors(model: PreTrainedModel) -> dict[str, float]:
    """Return the reported relative errors of the layers by their names."""
    layers = model.compression_report["layers"]  # type: ignore[attr-defined]
    return {layer["name"]: layer["relative_error"] for layer in layers}


def test_tokens_that_do_not_count_teach_nothing() -> None:
    dense = tiny_models.llama()
    blocks = find_blocks(dense)
    mask = torch.ones_like(IDS)
    mask[:, 16:] = 0  # the last 8 of 24 tokens are padding
    changed_ids = IDS.clone()
    changed_ids[:, 16:] = 7
    states = []
    for ids in (IDS, changed_ids):
        model = refined(copy.deepcopy(dense), "slab", 0)
        batch = capture(dense, blocks, [TokenBatch(ids, mask)])[0]
        name, block = next(iter(blocks.items()))
        target = block_output(block, batch.hidden, batch.calls[0])
        compressed = model.get_submodule(name)
        train_block(compressed, 0, [batch], [target], 4)
        states.append(compressed.state_dict())
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=1e-4, atol=1e-6)


def test_a_negative_number_of_steps_is_refused() -> None:
    with pytest.raises(CompressionError, match="refinement_steps: found -1"):
        CompressionConfig(refinement_steps=-1)


def test_a_block_that_is_not_refined_says_why() -> None:
    def entries(model: PreTrainedModel, method: str, ratio: float, **changes: Any) -> list[dict[str, Any]]:
        recipe = CompressionConfig(method, ratio, samples=4, sequence_length=24, refinement_steps=2, **changes)
        compress(model, recipe, calibration=IDS.tolist(), progress=False)
        entries: list[dict[str, Any]] = model.compression_report["refinement"]  # type: ignore[attr-defined]
        for entry in entries:
            refined_here = entry["reason"] is None
            assert (entry["before"] is not None) == (entry["after"] is not None) == refined_here
        return entries

    skipped = entries(tiny_models.llama(), "svd", 0.3, modules_to_not_convert=["model.layers.1"])
    assert [entry["reason"] for entry in skipped] == [None, "none of its layers is compressed", None, None]
    silent = tiny_models.llama()
    silent.model.embed_tokens.weight.data.zero_()
    assert {entry["reason"] for entry in entries(silent, "svd", 0.3)} == {"the outputs of the dense block are zeros"}
    layer_of_zeros = Decomposition(weight=torch.zeros(0)).to_layer(4, 4)
    assert reason_not_to_train(layer_of_zeros, 0, [], []) == "its compressed layers store no values"
