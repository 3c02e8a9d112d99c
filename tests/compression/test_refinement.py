"""Block refinement: blocks come nearer to the dense ones, masks and everything else stay, and the report says what it measured."""

import copy

import pytest
import torch
from transformers import PreTrainedModel

from hf_lowrank import CompressionConfig, CompressionError, compress
from hf_lowrank.calibration import BlockBatch, TokenBatch, capture, with_unigram_sequences
from hf_lowrank.compression.block_training import train_block
from hf_lowrank.methods import make_method
from hf_lowrank.models.architectures import find_blocks
from hf_lowrank.runtime.layers import CompressedLinear
from tests.support import tiny_models

IDS = tiny_models.token_ids(4, 24)
METHODS = ["slab", "svd-llm", "sola", "wanda", "gptq", "auto", "lowrank"]
MODELS = {"llama": tiny_models.llama, "gpt2": tiny_models.gpt2, "opt": tiny_models.opt}


def refined(model: PreTrainedModel, method: str, steps: int, ratio: float = 0.45) -> PreTrainedModel:
    config = CompressionConfig(method=method, ratio=ratio, samples=4, sequence_length=24, refinement_steps=steps)
    return compress(model, config, calibration=IDS.tolist(), progress=False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_every_block_comes_nearer_to_the_dense_one(name: str, method: str) -> None:
    dense = MODELS[name]()
    model = refined(copy.deepcopy(dense), method, 30, ratio=0.8 if method == "gptq" else 0.45)
    report = model.save_pretrained.report  # type: ignore[attr-defined]
    blocks = find_blocks(dense)
    assert [each["name"] for each in report["refinement"]] == list(blocks)
    share = getattr(make_method(method), "unigram_share", 0.0)
    batch = capture(dense, blocks, with_unigram_sequences([TokenBatch(IDS)], share, seed=0))[0]
    batch.compressed_twin = BlockBatch(batch.hidden, batch.calls)
    for index, each in enumerate(report["refinement"]):
        assert each["after"] < each["before"] or each["before"] < 1e-4
        with torch.no_grad():  # the same figure, counted here
            call = batch.calls[index]
            assert call is not None
            assert batch.compressed_twin is not None
            wanted, found = (
                block(x, *call.args, **call.kwargs)
                for block, x in (
                    (blocks[each["name"]], batch.hidden),
                    (model.get_submodule(each["name"]), batch.compressed_twin.hidden),
                )
            )
            wanted, found = (value[0] if isinstance(value, tuple) else value for value in (wanted, found))
        assert each["after"] == pytest.approx(float((found - wanted).square().sum() / wanted.square().sum()), rel=1e-3)
        batch.hidden, batch.compressed_twin.hidden = wanted, found


@pytest.mark.parametrize("method", ["slab", "auto", "sola"])
def test_only_stored_values_of_compressed_layers_change(method: str) -> None:
    plain, model = (
        refined(tiny_models.llama(dtype=torch.bfloat16), method, steps, 0.8 if method == "auto" else 0.45)
        for steps in (0, 20)
    )
    trained = {
        f"{name}.{key}"
        for name, layer in model.named_modules()
        if isinstance(layer, CompressedLinear)
        for key, _ in layer.named_parameters()
    }
    after = model.state_dict()
    changed = 0
    for name, before in plain.state_dict().items():
        assert after[name].dtype == before.dtype
        if name in trained and before.numel():
            changed += not torch.equal(after[name], before)
        else:
            assert torch.equal(after[name], before), name
    assert changed > len(trained) / 2
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("method", ["sola", "slab"])
def test_the_report_measures_the_layers_after_refinement(method: str) -> None:
    dense = tiny_models.llama()
    model = refined(copy.deepcopy(dense), method, 5)
    again = refined(copy.deepcopy(dense), method, 5)
    assert model.save_pretrained.report == again.save_pretrained.report  # type: ignore[attr-defined]
    before = refined(copy.deepcopy(dense), method, 0)
    reports = [{each["name"]: each for each in m.save_pretrained.report["layers"]} for m in (model, before)]  # type: ignore[attr-defined]
    assert reports[0].keys() == reports[1].keys()
    assert any(reports[0][name]["relative_error"] != reports[1][name]["relative_error"] for name in reports[0])


def test_tokens_that_do_not_count_teach_nothing() -> None:
    dense = tiny_models.llama()
    blocks = find_blocks(dense)
    mask = torch.ones_like(IDS)
    mask[:, 16:] = 0
    other = IDS.clone()
    other[:, 16:] = 7
    found = []
    for ids in (IDS, other):
        model = refined(copy.deepcopy(dense), "slab", 0)
        batch = capture(dense, blocks, [TokenBatch(ids, mask)])[0]
        name, block = next(iter(blocks.items()))
        with torch.no_grad():
            call = batch.calls[0]
            assert call is not None
            target = block(batch.hidden, *call.args, **call.kwargs)
        compressed = model.get_submodule(name)
        train_block(compressed, 0, [batch], [target[0] if isinstance(target, tuple) else target], 4)
        found.append(compressed.state_dict())
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], rtol=1e-4, atol=1e-6)


def test_a_number_of_steps_that_cannot_be() -> None:
    with pytest.raises(CompressionError, match="refinement_steps: found -1"):
        CompressionConfig(refinement_steps=-1)
