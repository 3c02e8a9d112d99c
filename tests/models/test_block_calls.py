"""However a model calls its blocks, and whatever they return: it is compressed on what its own forward pass gives."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowrank import CompressedLinear, CompressionError, compress
from hf_lowrank.models.architectures import find_blocks, find_layers

from ..support.model_families import Batches, text
from ..support.own_models import OWN_MODELS, Block, Chain, OwnModel, own_model
from ..support.whole_models import answers, recipe, seen_by_layers, statistics_of_layers

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
    layers = find_layers(find_blocks(model))
    # Listed by what holds the weight: a layer in common has one name, and the hooks see all its calls.
    seen = seen_by_layers(model, [layer.name for layer in layers], batches())
    for layer, entry in statistics_of_layers(model, batches()):
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


class ReadsList(Block):
    def forward(self, states: list[Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(states[0])


class ReturnsNothing(Block):
    def forward(self, hidden: Tensor) -> None:  # type: ignore[override]
        super().forward(hidden)


ODD = {
    "was not called with a tensor": lambda: OwnModel(
        Chain(
            [Block(), ReadsList(), Block()],
            lambda block, x, index: block([x]) if isinstance(block, ReadsList) else block(x),
        )
    ),
    "returned NoneType without a tensor": lambda: OwnModel(
        Chain([Block(), ReturnsNothing(), Block()], lambda block, x, index: x if block(x) is None else block(x))
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fault", ODD)
def test_a_block_that_cannot_be_run_alone_is_refused_and_the_cure_that_is_named_works(fault: str, method: str) -> None:
    arguments = {**METHODS[method]}
    config = recipe(method, 0.15, **arguments.pop("options", {}))
    for field, value in arguments.items():
        setattr(config, field, value)
    with pytest.raises(CompressionError, match=rf"body\.blocks\.1: {fault}.*leave it dense") as raised:
        compress(ODD[fault](), config, calibration=batches(), progress=False)
    cure = re.search(r"modules_to_not_convert=\['(.*)'\]", str(raised.value))
    assert cure is not None
    config.modules_to_not_convert = [cure[1]]
    report = compress(ODD[fault](), config, calibration=batches(), progress=False).save_pretrained.report
    assert {entry["name"].rpartition(".")[0] for entry in report["layers"]} == {"body.blocks.0", "body.blocks.2"}


def test_what_lies_outside_the_blocks_may_be_named_as_left_dense() -> None:
    config = recipe()
    config.modules_to_not_convert = ["heads"]
    report = compress(own_model("heads in a list"), config, calibration=batches(), progress=False)
    assert not report.save_pretrained.report["dense"]


def distance(found: list[Tensor], right: list[Tensor]) -> float:
    """Return the norm of the difference, relative to that of what is right."""
    difference = torch.cat([(one - other).flatten() for one, other in zip(found, right, strict=True)])
    return float(difference.norm() / torch.cat([tensor.flatten() for tensor in right]).norm())
