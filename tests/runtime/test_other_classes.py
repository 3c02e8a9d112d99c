"""A checkpoint that is opened by another class than it was saved by is what the dense one is there, or is refused."""

import copy
import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    SiglipVisionModel,
    T5EncoderModel,
    T5ForConditionalGeneration,
)
from transformers.quantizers.auto import AutoHfQuantizer

from hf_lowrank import CheckpointError, CompressedLinear, CompressionConfig, compress
from hf_lowrank.runtime.counterparts import find_counterparts

PART = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {
    **PART,
    "vocab_size": 64,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
PICTURE = {**PART, "image_size": 16, "patch_size": 4}
LINEAR_ATTENTION = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
EYES = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32, "patch_size": 4}
LLAMA4_EYES = {**PICTURE, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}

SAVED: dict[str, tuple[str, dict[str, Any]]] = {
    "causal": ("LlamaForCausalLM", {**TEXT, "tie_word_embeddings": True}),
    "base": ("BertModel", {**PART, "vocab_size": 64}),
    "masked": ("BertForMaskedLM", {**PART, "vocab_size": 64}),
    "encoder and decoder": (
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
        | {"decoder_start_token_id": 0},
    ),
    "experts": ("MixtralForCausalLM", {**TEXT, "num_local_experts": 4}),
    "text and pictures": (
        "Gemma3ForConditionalGeneration",
        {"text_config": TEXT, "vision_config": PICTURE, "mm_tokens_per_image": 4}
        | {"image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7},
    ),
    "texts in a family's own class": (
        "Llama4ForConditionalGeneration",
        {
            "text_config": {**TEXT, "intermediate_size": 32, "intermediate_size_mlp": 64, "num_local_experts": 2},
            "vision_config": LLAMA4_EYES,
            "image_token_index": 5,
        },
    ),
    "head tied in the whole": (
        "Qwen3_5ForConditionalGeneration",
        {"tie_word_embeddings": True, "text_config": {**TEXT, **LINEAR_ATTENTION}, "vision_config": EYES}
        | {"image_token_id": 5},
    ),
    "texts of another family": (
        "Mistral3ForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "mistral"},
            "vision_config": {**PICTURE, "model_type": "pixtral", "head_dim": 8},
            "image_token_index": 5,
        },
    ),
}
"""Class and config of models, one of every way in which the classes of a family share their parts."""


@dataclass(frozen=True)
class Saved:
    """A compressed model, and the same model saved as a dense one."""

    model: PreTrainedModel
    compressed: Path
    dense: Path


_saved: dict[str, Saved] = {}


@pytest.fixture
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The model of this name in `SAVED`."""
    name = request.param
    if name not in _saved:
        class_name, fields = SAVED[name]
        folder = tmp_path_factory.mktemp("classes")
        torch.manual_seed(0)
        try:
            model_class = getattr(transformers, class_name)
            model = model_class(model_class.config_class(**fields)).eval()
        except AttributeError as error:
            pytest.skip(f"this version of transformers cannot make it: {error}")
        compress(model, CompressionConfig("magnitude", 0.3), calibration=[[7] * 24] * 2, progress=False)
        model.save_pretrained(folder / "compressed")
        model_class.from_pretrained(folder / "compressed").dequantize().save_pretrained(folder / "dense")
        _saved[name] = Saved(model, folder / "compressed", folder / "dense")
    return _saved[name]


def classes_beside(model: PreTrainedModel) -> Iterator[Any]:
    """Yield the classes in those modules of transformers that a model's parts come from, and common Auto classes."""
    modules = {type(part).__module__ for part in model.modules() if isinstance(part, PreTrainedModel)}
    for module in sorted(modules):
        for name in importlib.import_module(module).__all__:
            found = getattr(transformers, name)
            if issubclass(found, PreTrainedModel) and not name.endswith("PreTrainedModel"):
                yield found
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(model.config) in auto_class._model_mapping:
            yield auto_class


@pytest.mark.parametrize("saved", SAVED, indirect=True)
def test_every_class_gets_what_the_dense_checkpoint_gives_it(saved: Saved, tmp_path: Path) -> None:
    models = []
    for model_class in classes_beside(saved.model):
        name = model_class.__name__
        dense, info = model_class.from_pretrained(saved.dense, output_loading_info=True)
        try:
            model, own_info = model_class.from_pretrained(saved.compressed, output_loading_info=True)
        except CheckpointError as error:
            message = str(error)
            assert type(saved.model).__name__ in message, name
            assert not any(wrong in message for wrong in ("\n", "download", "damaged"))
            # Nothing of the dense checkpoint has a place in this class either.
            assert len(info["missing_keys"]) == len(dense.state_dict()), name
            continue
        models.append(model)
        assert type(model) is type(dense)
        assert set(own_info["missing_keys"]) <= set(info["missing_keys"]), name
        # What transformers finds no values for is random in both.
        found = copy.deepcopy(model).dequantize() if getattr(model, "hf_quantizer", None) else model
        tensors = found.state_dict()
        for tensor, expected in dense.state_dict().items():
            if tensor not in info["missing_keys"]:
                assert torch.equal(tensors[tensor], expected), f"{name}: {tensor}"
    assert len(models) > 1
    for model in models[:2]:
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder).state_dict()
        assert all(torch.equal(again[key], tensor) for key, tensor in model.state_dict().items())


COMPOSITE = ["text and pictures", "texts in a family's own class", "head tied in the whole", "texts of another family"]


@pytest.mark.parametrize("saved", COMPOSITE, indirect=True)
def test_the_language_model_of_a_composite_has_the_logits_of_the_whole(saved: Saved) -> None:
    text_config = AutoConfig.from_pretrained(saved.compressed).get_text_config()
    text_class = transformers.AutoModelForCausalLM._model_mapping[type(text_config)]
    ids = torch.arange(10, 42)[None]
    with torch.no_grad():
        expected = saved.model(ids).logits
        models = [
            text_class.from_pretrained(saved.compressed),
            text_class.from_pretrained(saved.compressed, config=text_config),
        ]
        if type(saved.model.config) in AutoModelForCausalLM._model_mapping:
            models.append(AutoModelForCausalLM.from_pretrained(saved.compressed))
        for model in models:
            assert any(isinstance(module, CompressedLinear) for module in model.modules())
            assert torch.allclose(model.eval()(ids).logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("saved", "model_class", "layers"),
    [
        ("text and pictures", SiglipVisionModel, 0),
        ("encoder and decoder", T5EncoderModel, 12),
        ("causal", MistralForCausalLM, 14),
    ],
    indirect=["saved"],
)
def test_a_part_comes_without_the_rest(saved: Saved, model_class: Any, layers: int) -> None:
    model, info = model_class.from_pretrained(saved.compressed, output_loading_info=True)
    assert not info["missing_keys"]
    assert sum(isinstance(module, CompressedLinear) for module in model.modules()) == layers


@pytest.mark.parametrize("saved", ["text and pictures"], indirect=True)
def test_the_text_config_of_a_caller_is_enough(saved: Saved) -> None:
    """A config made by hand does not say that the checkpoint is compressed. The files do."""
    model = Gemma3ForCausalLM.from_pretrained(saved.compressed, config=Gemma3TextConfig(**TEXT))
    assert any(isinstance(module, CompressedLinear) for module in model.modules())


@pytest.mark.parametrize("saved", COMPOSITE, indirect=True)
def test_a_part_does_not_open_where_nothing_knows_the_format(saved: Saved) -> None:
    """Transformers reads the part's own config there, and must raise at it. With the plugin, nothing of that shows."""
    values = json.loads((saved.compressed / "config.json").read_text())
    whole = AutoConfig.from_pretrained(saved.compressed)
    for part in ("text_config", "vision_config"):
        with pytest.raises(ValueError, match="quant_method"):
            AutoHfQuantizer.supports_quant_method(values[part]["quantization_config"])
        assert getattr(getattr(whole, part), "quantization_config", None) is None
        assert getattr(getattr(saved.model.config, part), "quantization_config", None) is None


@pytest.mark.parametrize("saved", ["causal"], indirect=True)
@pytest.mark.parametrize("layers", [1, 3])
def test_another_number_of_blocks_is_what_it_is_for_dense_models(saved: Saved, layers: int) -> None:
    dense, info = LlamaForCausalLM.from_pretrained(saved.dense, num_hidden_layers=layers, output_loading_info=True)
    model = LlamaForCausalLM.from_pretrained(saved.compressed, num_hidden_layers=layers).dequantize()
    for name, tensor in dense.state_dict().items():
        if name not in info["missing_keys"]:
            assert torch.equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize("saved", ["causal"], indirect=True)
def test_other_sizes_are_refused_by_name(saved: Saved) -> None:
    with pytest.raises(CheckpointError, match=r"down_proj: is \(32, 96\) in the model, but \(32, 64\)"):
        LlamaForCausalLM.from_pretrained(saved.compressed, intermediate_size=96, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("saved", ["text and pictures"], indirect=True)
def test_nothing_of_the_way_of_loading_stays(saved: Saved, tmp_path: Path) -> None:
    model = Gemma3ForCausalLM.from_pretrained(saved.compressed)
    copy.deepcopy(model).dequantize().save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() <= model.state_dict().keys()
    assert not Gemma3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)[1]["missing_keys"]


def test_two_candidates_are_not_told_apart_by_guessing() -> None:
    """A decoder of the same class as an encoder does not take its weights."""
    fields = SAVED["encoder and decoder"][1]
    whole = T5ForConditionalGeneration(T5ForConditionalGeneration.config_class(**fields))
    encoder = T5EncoderModel(whole.config)
    encoder.tower = encoder.encoder
    del encoder.encoder
    counterparts = find_counterparts(whole, encoder)
    assert counterparts.name("encoder.block.0.layer.0.SelfAttention.q.weight") is None
    assert counterparts.name("shared.weight") == "shared.weight"
