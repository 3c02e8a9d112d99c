"""A strategy refuses a method that it cannot use, in one line and before any work."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from hf_lowrank import CompressionConfig, CompressionError, compress
from hf_lowrank.compression.strategies import STRATEGIES, strategy_of
from hf_lowrank.methods import make_method, register_method, registered_methods, registry
from hf_lowrank.methods.base import Method
from hf_lowrank.methods.mixed import MixedMethod
from hf_lowrank.methods.soco import SoCo
from hf_lowrank.methods.spectral import SpectralMethod

from ..support import tiny_models


@pytest.mark.parametrize("name", registered_methods())
def test_every_method_can_be_used_by_the_strategy_that_it_names(name: str) -> None:
    method = make_method(name)
    assert strategy_of(method) is STRATEGIES[method.strategy]


@dataclass
class Trained(SpectralMethod):
    trains: ClassVar[bool] = True


@dataclass
class TrainedMixed(MixedMethod):
    trains: ClassVar[bool] = True


@dataclass
class TrainedLayerwise(Method):
    trains: ClassVar[bool] = True


@dataclass
class PlainSpectral(Method):
    strategy: ClassVar[str] = "spectral"


@dataclass
class PlainMixed(Method):
    strategy: ClassVar[str] = "mixed"


@dataclass
class Unknown(Method):
    strategy: ClassVar[str] = "sideways"


UNUSABLE = {
    Trained: "trains, and the strategy 'spectral' trains SoCo and its subclasses only",
    TrainedMixed: "trains, and the strategy 'mixed' trains no method",
    TrainedLayerwise: "trains, and the strategy 'layerwise' trains no method",
    PlainSpectral: "found PlainSpectral, expected a SpectralMethod for the strategy 'spectral'",
    PlainMixed: "found PlainMixed, expected a MixedMethod for the strategy 'mixed'",
    Unknown: "found strategy 'sideways', expected one of layerwise, spectral, mixed",
}


@pytest.mark.parametrize("cls", UNUSABLE, ids=lambda cls: cls.__name__)
def test_a_method_that_its_strategy_cannot_use_is_refused(cls: type[Method], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_methods", {**registry._methods})
    register_method("unusable")(cls)
    with pytest.raises(CompressionError, match=f"unusable: {UNUSABLE[cls]}"):
        compress(tiny_models.llama(num_hidden_layers=1), CompressionConfig("unusable"), calibration=[[5, 6]])


@dataclass
class LikeSoCo(SoCo):
    """A method of one's own that trains as SoCo does."""


def test_a_subclass_of_soco_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_methods", {**registry._methods})
    register_method("like-soco")(LikeSoCo)
    options = {"steps": 2, "finish_steps": 0, "batch_tokens": 16}
    model = tiny_models.llama(num_hidden_layers=1)
    compress(model, CompressionConfig("like-soco", 0.3, options=options), calibration=[[5, 6, 7]], progress=False)
    assert model.compression_report["method"] == "like-soco"
