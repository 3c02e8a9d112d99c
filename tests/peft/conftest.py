"""Compressed models, and helpers that put adapters on them."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from hf_lowrank import CompressedLinear, LayerSpec
from tests.support.compressed import RECIPES, Compressed, compressed_model

RANK = 4


@pytest.fixture(scope="session", params=RECIPES)
def compressed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    return compressed_model(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def slab(tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    return compressed_model("slab", tmp_path_factory)


@pytest.fixture(scope="session")
def sola(tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    return compressed_model("sola", tmp_path_factory)


def lora(compressed: Compressed, **changes: object) -> LoraConfig:
    """Return the config of a LoRA on just the compressed layers."""
    layers = list(compressed.saved.config.quantization_config.layers)
    return LoraConfig(**({"target_modules": layers, "r": RANK, "lora_alpha": 3, "init_lora_weights": False} | changes))


def adapted(compressed: Compressed, seed: int = 0, **changes: object) -> PeftModel:
    """Return the model under a LoRA of random values, in evaluation mode."""
    torch.manual_seed(seed)
    return get_peft_model(compressed.model(), lora(compressed, **changes)).eval()


def specs(model: PreTrainedModel) -> dict[str, LayerSpec]:
    return {name: module.spec for name, module in model.named_modules() if isinstance(module, CompressedLinear)}


def stored(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return copies of all tensors of the compressed layers, by their names in the model without adapters."""
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
