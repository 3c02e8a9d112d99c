"""Small compressed models, saved once; every test opens its own."""

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from hf_lowrank import CompressedLinear, CompressionConfig, LayerSpec, compress
from tests.runtime.conftest import calibration, tiny_gpt2, tiny_llama
from tests.support.fresh_process import INPUT_IDS

RECIPES = {
    "sola": ("sola", 0.3, {}),
    "soco": ("soco", 0.3, {"steps": 6, "finish_steps": 2, "batch_tokens": 64}),
    "slab": ("slab", 0.5, {}),
    "slab-gpt2": ("slab", 0.5, {}),
    "pivoted": ("lowrank", 0.3, {}),
    "quantised": ("auto", 0.7, {}),
}
RANK = 4


@dataclass(frozen=True)
class Compressed:
    """A saved compressed model."""

    name: str
    folder: Path
    saved: PreTrainedModel

    def model(self) -> PreTrainedModel:
        return copy.deepcopy(self.saved)

    def adapted(self, seed: int = 0, **changes: object) -> PeftModel:
        """The model under a LoRA of random values that stays within the compressed layers, in evaluation mode."""
        torch.manual_seed(seed)
        return get_peft_model(self.model(), self.lora(**changes)).eval()

    def lora(self, **changes: object) -> LoraConfig:
        layers = list(self.saved.config.quantization_config.layers)
        return LoraConfig(**({"target_modules": layers, "r": RANK, "lora_alpha": 3, "init_lora_weights": False} | changes))


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor(INPUT_IDS))[0]


def specs(model: PreTrainedModel) -> dict[str, LayerSpec]:
    return {name: module.spec for name, module in model.named_modules() if isinstance(module, CompressedLinear)}


def stored(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor of the compressed layers, under the names of the model without adapters."""
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = {name: module for name, module in whole.named_modules() if isinstance(module, CompressedLinear)}
    return {
        f"{name.removesuffix('.base_layer')}.{key}": tensor.clone()
        for name, layer in layers.items()
        for key, tensor in layer.state_dict().items()
    }


def assert_stored(model: PreTrainedModel, before: dict[str, Tensor]) -> None:
    now = stored(model)
    assert now.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(now[name], tensor), name


@pytest.fixture(scope="session", params=RECIPES)
def compressed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    return made(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def slab(tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    return made("slab", tmp_path_factory)


@pytest.fixture(scope="session")
def sola(tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    return made("sola", tmp_path_factory)


_made: dict[str, Compressed] = {}


def made(name: str, factory: pytest.TempPathFactory) -> Compressed:
    if name not in _made:
        method, ratio, options = RECIPES[name]
        model = tiny_gpt2() if name.endswith("gpt2") else tiny_llama(num_hidden_layers=3)
        config = CompressionConfig(method=method, ratio=ratio, options=options, samples=4, sequence_length=16)
        compress(model, config, calibration=calibration(), progress=False)
        folder = factory.mktemp("compressed") / name
        model.save_pretrained(folder)
        _made[name] = Compressed(name, folder, type(model).from_pretrained(folder))
    return _made[name]
