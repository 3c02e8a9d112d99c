"""Layers and blocks that calibration never reaches, and layers that are not what they seem."""

from typing import Any

import pytest
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowrank import CompressionError, compress

from ..support.model_families import FAMILIES, text
from ..support.whole_models import answers, recipe


def test_a_vision_tower_that_calibration_never_reaches_stays_dense_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    family = FAMILIES["LLaVA"]
    model = compress(family.make(), recipe(ratio=0.3), calibration=text(4).tolist(), progress=False)
    report = model.save_pretrained.report
    assert len(report["dense"]) == 12
    assert all(layer.startswith("model.vision_tower.") for layer in report["dense"])
    assert all("no calibration batch comes through its block" in reason for reason in report["dense"].values())
    assert any("stay dense" in record.getMessage() for record in caplog.records)
    assert 0.3 <= report["ratio_stored"] <= 0.305
    with pytest.raises(CompressionError, match="out of reach"):
        compress(family.make(), recipe(ratio=0.8), calibration=text(4).tolist(), progress=False)


def test_batches_with_and_without_pictures_mix() -> None:
    family = FAMILIES["LLaVA"]
    batches = [{"input_ids": text(2)}, *family.batches(), {"input_ids": text(3)}]
    report = compress(family.make(), recipe(), calibration=batches, progress=False).save_pretrained.report
    tokens = {entry["name"].split(".")[1]: entry["tokens"] for entry in report["layers"]}
    assert tokens == {"vision_tower": 3 * 17, "language_model": 3 * 28 + 5 * 12}
    assert report["dense"] == {}


class Weightless(nn.Module):
    """Uses the weight of a layer without calling the layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.extra = inner, nn.Linear(32, 32)

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        return self.inner(hidden_states + 0.1 * hidden_states @ self.extra.weight, **arguments)


class LlamaWithWeightless(LlamaForCausalLM):
    """Makes its first block of a `Weightless`. A model that its class does not make is refused."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.layers[0] = Weightless(self.model.layers[0])
        self.post_init()


def test_a_layer_that_is_never_called_stays_dense_and_says_so() -> None:
    model = LlamaWithWeightless(FAMILIES["Llama"].make().config).eval()
    compress(model, recipe(), calibration=text(4).tolist(), progress=False)
    report = model.save_pretrained.report
    assert list(report["dense"]) == ["model.layers.0.extra"]
    assert "never calls it" in report["dense"]["model.layers.0.extra"]
    assert 0.5 <= report["ratio_stored"] <= 0.505
    answers(model, [{"input_ids": text(2)}])


class Gain(nn.Linear):
    """Has the weight of a linear layer, and computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_subclasses_of_linear_stay_dense_with_a_warning() -> None:
    model = FAMILIES["Llama"].make()
    model.model.layers[1].mlp.up_proj = Gain(32, 80, bias=False)
    report = compress(model, recipe(), calibration=text(4).tolist(), progress=False).save_pretrained.report
    assert type(model.model.layers[1].mlp.up_proj) is Gain
    assert report["warnings"] == [
        "model.layers.1.mlp.up_proj stays dense: Gain may compute something else than nn.Linear"
    ]
