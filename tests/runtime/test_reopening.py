"""What was compressed opens again, or is refused before any work. What is dense is saved as dense."""

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutput

from hf_lowrank import CompressedLinear, CompressionConfig, CompressionError, compress, inspect, verify
from hf_lowrank.runtime.quantizer import dense_module, swap_module
from hf_lowrank.runtime.saving import CompleteSave

from .conftest import Checkpoint, tiny_llama

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FIELDS = {**SIZES, "vocab_size": 64, "num_key_value_heads": 4, "head_dim": 8}
IDS = torch.tensor([[1, 2, 3]])


class OwnLlama(LlamaForCausalLM):
    """Is a Llama under another name."""


class OwnLlamaWithPart(LlamaForCausalLM):
    """Has a layer that no Llama has."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.extra = nn.Linear(32, 64)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **arguments: Any) -> CausalLMOutput:
        hidden = self.model(input_ids, **arguments)[0]
        return CausalLMOutput(logits=self.lm_head(hidden) + self.extra(hidden))


class UnregisteredConfig(LlamaConfig):
    model_type = "unregistered_llama"


class Unregistered(LlamaForCausalLM):
    config_class = UnregisteredConfig


class RegisteredConfig(LlamaConfig):
    model_type = "registered_llama"


class Registered(LlamaForCausalLM):
    config_class = RegisteredConfig


class StackConfig(PreTrainedConfig):
    model_type = "stack"

    def __init__(self, width: int = 32, blocks: int = 2, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.width, self.blocks = width, blocks


class Stack(PreTrainedModel):
    """Is no model of transformers in any of its parts."""

    config_class = StackConfig

    def __init__(self, config: StackConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(64, config.width)
        self.blocks = nn.ModuleList()
        for _ in range(config.blocks):
            self.blocks.append(nn.Sequential(nn.Linear(config.width, 64), nn.ReLU(), nn.Linear(64, config.width)))
        self.head = nn.Linear(config.width, 64)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, input_ids: torch.Tensor, **arguments: Any) -> CausalLMOutput:
        hidden = self.embeddings(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return CausalLMOutput(logits=self.head(hidden))


AutoConfig.register("registered_llama", RegisteredConfig, exist_ok=True)
AutoModelForCausalLM.register(RegisteredConfig, Registered, exist_ok=True)


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**FIELDS, **changes))


def pruned() -> PreTrainedModel:
    model = llama()
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    return model


def untied() -> PreTrainedModel:
    model = llama(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(torch.randn(64, 32))
    return model


def resized() -> PreTrainedModel:
    model = llama()
    model.resize_token_embeddings(70)
    return model


def compressed(model: PreTrainedModel) -> PreTrainedModel:
    return compress(model.eval(), CompressionConfig("magnitude", 0.3), calibration=[[5] * 16] * 2, progress=False)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS)[0]


def layers_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, CompressedLinear)]


@pytest.mark.parametrize(
    ("make", "auto_class"),
    [
        (lambda: OwnLlama(LlamaConfig(**FIELDS)), AutoModelForCausalLM),
        (lambda: OwnLlamaWithPart(LlamaConfig(**FIELDS)), None),
        (lambda: Unregistered(UnregisteredConfig(**FIELDS)), None),
        (lambda: Registered(RegisteredConfig(**FIELDS)), AutoModelForCausalLM),
        (lambda: Stack(StackConfig()), None),
        (pruned, AutoModelForCausalLM),
        (untied, AutoModelForCausalLM),
        (resized, AutoModelForCausalLM),
    ],
    ids=[
        "own class",
        "own part",
        "own config",
        "registered",
        "no part of transformers",
        "pruned",
        "untied",
        "resized",
    ],
)
def test_a_model_of_any_class_comes_back(make: Callable[[], PreTrainedModel], auto_class: Any, tmp_path: Path) -> None:
    model = compressed(make())
    model.save_pretrained(tmp_path)
    for model_class in filter(None, (type(model), auto_class)):
        again = model_class.from_pretrained(tmp_path)
        assert layers_of(again) == layers_of(model)
        assert torch.equal(logits(again), logits(model))
    assert verify(tmp_path).sound
    assert inspect(tmp_path).layers


def borrowed_types() -> Iterator[Any]:
    """Yield the config classes that `AutoModelForCausalLM` opens by a class of another family."""
    mapping = AutoModelForCausalLM._model_mapping
    for model_type, names in mapping._model_mapping.items():
        config_class = transformers.CONFIG_MAPPING[model_type]
        # By the names first, as a look at the class imports the module.
        if isinstance(names, str) and not names.startswith(config_class.__name__[:4]):
            model_class = getattr(transformers, names)
            own = config_class, *config_class.__mro__, *config_class.sub_configs.values()
            if model_class.config_class is not None and model_class.config_class not in own:
                yield config_class


def test_types_that_borrow_a_class_come_back(tmp_path: Path) -> None:
    borrowed = list(borrowed_types())
    assert len(borrowed) > 1
    for config_class in borrowed:
        folder = tmp_path / config_class.model_type
        model = compressed(AutoModelForCausalLM.from_config(config_class(**FIELDS)))
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder)
        assert type(again) is type(model)
        assert torch.equal(logits(again), logits(model))


def pruned_without_the_config() -> PreTrainedModel:
    model = llama()
    model.model.layers = model.model.layers[:1]
    return model


def pruned_with_half_of_the_config() -> PreTrainedModel:
    model = Qwen2ForCausalLM(Qwen2Config(**FIELDS))
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1  # and `layer_types` has two entries
    return model


def tied_by_hand() -> PreTrainedModel:
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def with_another_head() -> PreTrainedModel:
    model = llama()
    model.lm_head = nn.Sequential(nn.Linear(32, 7))
    return model


def with_an_adapter() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).get_base_model()


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (pruned_without_the_config, ("model.layers.1.", "LlamaForCausalLM", "num_hidden_layers")),
        (pruned_with_half_of_the_config, ("Qwen2ForCausalLM", "change the config")),
        (tied_by_hand, ("lm_head.weight", "LlamaForCausalLM", "tie_word_embeddings")),
        (with_another_head, ("lm_head.0", "LlamaForCausalLM", "a class of your own")),
        (with_an_adapter, ("LlamaForCausalLM", "merge_and_unload")),
        (lambda: torch.compile(llama()), ("OptimizedModule", "take off")),
        (lambda: nn.DataParallel(llama()), ("DataParallel", "take off")),
    ],
)
def test_what_could_not_be_opened_again_is_refused_first(make: Callable[[], Any], parts: tuple[str, ...]) -> None:
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CompressionError) as raised:
        # A calibration that cannot be read: nothing may ask for it.
        compress(model, CompressionConfig("magnitude", 0.3), calibration=iter(lambda: 1 / 0, 0), progress=False)
    message = str(raised.value)
    assert "\n" not in message
    assert all(part in message for part in parts)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def reused(checkpoint: Checkpoint) -> PreTrainedModel:
    return LlamaForCausalLM(checkpoint.load().config)


def config_of(checkpoint: Checkpoint) -> Any:
    return AutoConfig.from_pretrained(checkpoint.folder)


def without_compressed_layers(checkpoint: Checkpoint) -> PreTrainedModel:
    model = checkpoint.load()
    for name in layers_of(model):
        swap_module(model, name, dense_module(model.get_submodule(name)))
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda checkpoint: AutoModelForCausalLM.from_config(config_of(checkpoint)),
        lambda checkpoint: LlamaForCausalLM(config_of(checkpoint)),
        lambda checkpoint: LlamaModel(copy.deepcopy(config_of(checkpoint))),
        lambda checkpoint: LlamaForSequenceClassification(
            LlamaConfig.from_dict({**config_of(checkpoint).to_dict(), "pad_token_id": 0})
        ),
        reused,
        lambda checkpoint: copy.deepcopy(reused(checkpoint)),
        lambda checkpoint: checkpoint.load().dequantize(),
        without_compressed_layers,
    ],
    ids=["from_config", "class", "deepcopy", "from_dict", "reused", "copied", "dequantize", "replaced by hand"],
)
def test_a_dense_model_is_saved_as_one_whatever_its_config_says(
    slab: Checkpoint, make: Callable[[Checkpoint], PreTrainedModel], tmp_path: Path
) -> None:
    model = make(slab)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not {"quantization_config", "auto_map"} & written.keys()
    assert (
        {"config.json", "model.safetensors"}
        <= set(os.listdir(tmp_path))
        <= {
            "config.json",
            "generation_config.json",
            "model.safetensors",
        }
    )
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))


def test_a_config_that_two_models_share_is_right_for_both(slab: Checkpoint, tmp_path: Path) -> None:
    model = slab.load()
    dense = LlamaForCausalLM(model.config).eval()
    for turn in ("first", "second"):
        for name, each in (("dense", dense), ("compressed", model)):
            each.save_pretrained(tmp_path / turn / name)
            again = AutoModelForCausalLM.from_pretrained(tmp_path / turn / name)
            assert layers_of(again) == layers_of(each)
            assert torch.equal(logits(again), logits(each))


@pytest.mark.parametrize("second", [LlamaForCausalLM, LlamaForSequenceClassification])
def test_models_of_one_config_object_are_compressed_one_after_the_other(
    second: type[PreTrainedModel], tmp_path: Path
) -> None:
    config = LlamaConfig(**FIELDS, pad_token_id=0)
    models = []
    for method, model_class in (("svd", LlamaForCausalLM), ("wanda", second)):
        recipe = CompressionConfig(method, 0.4)
        models.append(compress(model_class(config).eval(), recipe, calibration=[[5] * 16], progress=False))
    for model in models:  # only now, as the config says by now what the second one stores
        model.save_pretrained(tmp_path / "saved")
        again = type(model).from_pretrained(tmp_path / "saved").eval()
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_part_of_a_compressed_model_is_saved_as_what_it_is(slab: Checkpoint, tmp_path: Path) -> None:
    """The base model without its head, and a new model that was given the layers."""
    whole = slab.load()
    given = LlamaForCausalLM(whole.config).eval()
    given.model, given.lm_head = whole.model, whole.lm_head
    for part in (whole.model, given):
        part.save_pretrained(tmp_path / "part")
        again = type(part).from_pretrained(tmp_path / "part").eval()
        assert len(layers_of(again)) == len(layers_of(whole)) > 0
        assert torch.equal(again(IDS)[0], part(IDS)[0])
    whole.save_pretrained(tmp_path / "whole")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "whole")), logits(whole))
    stranger = tiny_llama()
    stranger.model.layers[0].mlp = whole.model.layers[0].mlp
    with pytest.raises(CompressionError, match="its config says nothing of them"):
        stranger.save_pretrained(tmp_path / "stranger")


@pytest.mark.parametrize("folder", ["dense", "compressed"])
@pytest.mark.parametrize("config", ["dense", "compressed", "of the compressed model"])
def test_the_checkpoint_says_whether_it_is_compressed(
    slab: Checkpoint, folder: str, config: str, tmp_path: Path
) -> None:
    """Whatever config a caller gives to `from_pretrained`."""
    dense = tiny_llama()
    dense.save_pretrained(tmp_path)
    sources = {"dense": (tmp_path, dense), "compressed": (slab.folder, slab.model)}
    configs = {"dense": dense.config, "compressed": config_of(slab), "of the compressed model": slab.load().config}
    source, expected = sources[folder]
    for model_class in (LlamaForCausalLM, AutoModelForCausalLM):
        model = model_class.from_pretrained(source, config=configs[config])
        assert layers_of(model) == layers_of(expected)
        assert torch.equal(logits(model), logits(expected))


def test_layers_that_were_replaced_by_hand_are_dense_in_the_checkpoint(slab: Checkpoint, tmp_path: Path) -> None:
    model = slab.load()
    replaced = layers_of(model)[:3]
    for name in replaced:
        swap_module(model, name, dense_module(model.get_submodule(name)))
    model.save_pretrained(tmp_path)
    again = slab.load().from_pretrained(tmp_path)
    assert set(layers_of(again)) == set(layers_of(slab.model)) - set(replaced)
    assert torch.equal(logits(again), logits(model))


def test_blocks_that_are_taken_out_after_compression(slab: Checkpoint, tmp_path: Path) -> None:
    model = slab.load()
    model.model.layers = model.model.layers[1:]
    with pytest.raises(CompressionError, match=r"model\.layers\.1\..*: missing in the model.*num_hidden_layers"):
        model.save_pretrained(tmp_path / "refused")
    model.config.num_hidden_layers = 1
    model.model.layers[0].self_attn.layer_idx = 0
    model.save_pretrained(tmp_path / "saved")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))


def test_a_config_that_was_replaced_is_completed(slab: Checkpoint, tmp_path: Path) -> None:
    model = slab.load()
    model.config = tiny_llama().config
    model.save_pretrained(tmp_path)
    assert isinstance(model.__dict__["save_pretrained"], CompleteSave)
    assert torch.equal(logits(slab.load().from_pretrained(tmp_path)), logits(model))
