"""However a model calls its blocks, and whatever they return: it is compressed on what its own forward pass gives."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowrank import CompressedLinear, compress
from hf_lowrank.calibration import block_statistics, calibration_batches, capture
from hf_lowrank.models.architectures import find_blocks, find_layers

from ..support.model_families import Batches, text
from ..support.own_models import OWN_MODELS, own_model
from ..support.whole_models import answers, recipe, seen_by_layers

SHARED_LAYER = "blocks with a layer in common"
METHODS: dict[str, dict[str, Any]] = {
    "wanda": {},
    "svd-llm": {"options": {"update": True}},
    "slab": {"refinement_steps": 2},
}


def batches() -> Batches:
    return [{"input_ids": text(4)}, {"input_ids": text(2, seed=1)}]


@pytest.fixture(params=OWN_MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_statistics_count_every_call_of_every_layer(name: str) -> None:
    model = own_model(name)
    blocks = find_blocks(model)
    layers = find_layers(blocks)
    # Listed by what holds the weight: a layer in common has one name, and the hooks see all its calls.
    seen = seen_by_layers(model, [layer.name for layer in layers], batches())
    captured = capture(model, blocks, calibration_batches(model, recipe(), calibration=batches()))
    for index, block in enumerate(blocks.values()):
        for batch in captured:
            batch.enter_block_list(index)
        modules = {layer.name: model.get_submodule(layer.name) for layer in layers if layer.block == index}
        statistics = block_statistics(block, index, captured, modules, needs_gram=True, move=True)
        for layer, entry in statistics.items():
            x = torch.cat([part.double().flatten(0, -2) for part in seen[layer]])
            assert entry is not None and entry.gram is not None
            if "in common" not in name:  # what blocks share is calibrated in the first of them
                assert entry.tokens == len(x)
                torch.testing.assert_close(entry.gram, x.T @ x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_it_is_compressed_as_a_whole_and_computes_nearly_the_same(name: str, method: str) -> None:
    model = own_model(name)
    right = answers(model, batches())
    linears = {layer.name for layer in find_layers(find_blocks(model))}
    arguments = {**METHODS[method]}
    options = arguments.pop("options", {})
    config = recipe(method, 0.15, **options)
    for field, value in arguments.items():
        setattr(config, field, value)
    compress(model, config, calibration=batches(), progress=False)
    report = model.save_pretrained.report
    assert {entry["name"] for entry in report["layers"]} | report["dense"].keys() == linears
    expected = ["tied to another module"] if name == SHARED_LAYER else []
    assert all(any(part in reason for part in expected) for reason in report["dense"].values())
    assert any(isinstance(module, CompressedLinear) for module in model.modules())
    assert distance(answers(model, batches()), right) < 0.5


def distance(found: list[Tensor], right: list[Tensor]) -> float:
    """Return the norm of the difference, relative to that of what is right."""
    difference = torch.cat([(one - other).flatten() for one, other in zip(found, right, strict=True)])
    return float(difference.norm() / torch.cat([tensor.flatten() for tensor in right]).norm())
