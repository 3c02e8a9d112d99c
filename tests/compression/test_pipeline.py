"""`compress` stores as many bytes as asked for, the same bytes every time, and reports what happened."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_lowrank import (
    CompressionError,
    NumericalError,
    SparseLowRankBinaryLinear,
    SparseLowRankLinear,
    compress,
)
from hf_lowrank.models.architectures import find_blocks, find_layers

from ..support import tiny_models
from ..support.files import digests
from .recipes import IDS, MODELS, RECIPES, config

BITS = {"F64": 64, "F32": 32, "BF16": 16, "F16": 16, "U8": 8}
"""Bits of a value of every type in safetensors files."""


def block_bits(folder: Path, linears: list[str]) -> int:
    """Count the bits of everything that a checkpoint stores for linear layers with these names."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (an opened file is no mapping)
                if name.rpartition(".")[0] in linears:
                    entry = opened.get_slice(name)
                    total += BITS[entry.get_dtype()] * torch.Size(entry.get_shape()).numel()
    return total


def removed(dense: Path, compressed: Path, model: PreTrainedModel) -> float:
    """Return the share of the bits of the blocks' linear layers that is gone, from the safetensors files alone."""
    linears = [layer.name for layer in find_layers(find_blocks(model))]
    return 1 - block_bits(compressed, linears) / block_bits(dense, linears)


@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_the_files_hold_what_was_asked_for_and_never_more(tmp_path: Path, name: str, method: str) -> None:
    for ratio, dtype in ((0.3, torch.float32), (0.45, torch.bfloat16)):
        dense, compressed = tmp_path / f"dense-{ratio}", tmp_path / f"compressed-{ratio}"
        model = MODELS[name](dtype=dtype)
        model.save_pretrained(dense)
        linears = MODELS[name]()
        compress(model, config(method, ratio), calibration=IDS).save_pretrained(compressed)
        removed_ratio = removed(dense, compressed, linears)
        assert ratio <= removed_ratio
        # `auto` stores less than it may where eight bits per weight are all that it can use.
        assert removed_ratio <= ratio + 0.005 or method == "auto"
        report = json.loads((compressed / "compression_report.json").read_text())
        assert report["ratio_stored"] == pytest.approx(removed(dense, compressed, linears), abs=1e-12)


OPTIONS_AND_RATIOS = [
    ("sola", 0.3, {"allocation": "components"}),
    ("sola", 0.3, {"neuron_score": "output", "prime_share": 0.3}),
    ("sola", 0.3, {"skip_blocks": 0}),
    ("slab", 0.5, {"pattern": "2:4"}),
    ("slab", 0.5, {"pattern": "4:8"}),
    ("slab", 0.4, {"binary_rank": 2, "weighted": True}),
]


@pytest.mark.parametrize(("method", "ratio", "options"), OPTIONS_AND_RATIOS)
def test_options_do_not_move_the_budget(method: str, ratio: float, options: dict[str, Any]) -> None:
    model = compress(tiny_models.llama(dtype=torch.bfloat16), config(method, ratio, options=options), calibration=IDS)
    assert ratio <= model.compression_report["ratio_stored"] <= ratio + 0.005


def test_paper_accounting_leaves_the_mask_bits_out() -> None:
    model = compress(tiny_models.llama(), config("slab", 0.4, accounting="paper"), calibration=IDS)
    report = model.compression_report
    assert 0.4 <= report["ratio_paper"] <= 0.405
    # The two ratios differ by the packed bits of the masks, eight in a byte.
    masks = sum(module.weight_mask.numel() for module in model.modules() if isinstance(module, SparseLowRankLinear))
    dense = sum(entry["dense_bits"] for entry in report["layers"])
    assert report["ratio_paper"] - report["ratio_stored"] == pytest.approx(8 * masks / dense)


@pytest.mark.parametrize("method", ["slab", "sola", "soco", "lowrank"])
def test_the_bundled_model_compresses_and_reopens(tmp_path: Path, method: str) -> None:
    dense = AutoModelForCausalLM.from_pretrained(tiny_models.BUNDLED)
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.BUNDLED)
    ratio = 0.5 if method == "slab" else 0.3
    recipe = config(method, ratio, sequence_length=64)
    sentence = (
        "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
        "must be in want of a wife. "
    )
    text = [sentence] * 20
    model = compress(copy.deepcopy(dense), recipe, tokenizer, text)
    model.save_pretrained(tmp_path)
    assert ratio <= removed(tiny_models.BUNDLED, tmp_path, dense) <= ratio + 0.005
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(20, 52)[None]
    with torch.no_grad():
        assert torch.equal(reopened(ids).logits, model(ids).logits)


@pytest.mark.parametrize("method", RECIPES)
def test_a_seed_always_gives_the_same_bytes(tmp_path: Path, method: str) -> None:
    def compressed_files(run: str, seed: int) -> dict[str, str]:
        folder = tmp_path / run / "model"
        model = compress(tiny_models.llama(), config(method, seed=seed), tiny_models.tokenizer(), tiny_models.text(40))
        model.save_pretrained(folder)
        return digests(folder)

    torch.manual_seed(17)
    first = compressed_files("first", seed=0)
    torch.manual_seed(18)  # the caller's random state has no say
    assert compressed_files("second", seed=0) == first
    third = compressed_files("third", seed=1)
    changed = {name for name, digest in third.items() if digest != first[name]}
    assert "config.json" in changed
    # `svd` is the only method here that never looks at the calibration.
    assert ("model.safetensors" in changed) == (method != "svd")


@pytest.mark.parametrize("method", RECIPES)
def test_every_linear_is_compressed_or_listed_with_a_reason(method: str) -> None:
    model = compress(tiny_models.llama(), config(method), calibration=IDS)
    report = model.compression_report
    compressed, dense = {layer["name"] for layer in report["layers"]}, set(report["dense"])
    assert compressed | dense == {layer.name for layer in find_layers(find_blocks(tiny_models.llama()))}
    assert not compressed & dense
    assert all(report["dense"].values())
    for name in compressed:
        assert isinstance(model.get_submodule(name), SparseLowRankLinear)
    for name in dense:
        assert type(model.get_submodule(name)) is torch.nn.Linear
    assert set(model.config.quantization_config.layers) == compressed


@pytest.mark.parametrize("method", RECIPES)
def test_the_report_describes_what_is_stored(method: str) -> None:
    model = compress(tiny_models.llama(), config(method), calibration=IDS)
    report = model.compression_report
    expected = {"method": method, "ratio_asked": 0.4, "accounting": "bits", "warnings": []}
    assert {key: report[key] for key in expected} == expected
    for entry in report["layers"]:
        layer = model.get_submodule(entry["name"])
        fields = ("kind", "sparse", "kept", "rank", "binary_rank", "pivoted", "weight_bits", "lowrank_bits")
        assert {key: entry[key] for key in fields} == {key: getattr(layer.spec, key) for key in fields}
        tensors = [*layer.parameters(), *layer.buffers()]
        assert entry["stored_bits"] == sum(tensor.numel() * tensor.itemsize * 8 for tensor in tensors)
        assert entry["bits_per_weight"] * layer.in_features * layer.out_features == pytest.approx(entry["stored_bits"])
        assert entry["dense_bits"] == 32 * layer.in_features * layer.out_features
        assert entry["tokens"] == 4 * 24
        assert 0 < entry["relative_error"] < 1
    assert (report["curve"] is not None) == (method == "soco")
    if any(entry["sparse"] == "bitmask" for entry in report["layers"]):
        assert report["ratio_paper"] > report["ratio_stored"]
    else:
        assert report["ratio_paper"] == pytest.approx(report["ratio_stored"])
    if method == "slab":
        for entry in report["layers"]:
            assert isinstance(model.get_submodule(entry["name"]), SparseLowRankBinaryLinear)


def test_the_config_records_the_recipe_and_where_it_came_from() -> None:
    model = compress(tiny_models.llama(), config("slab", seed=5), calibration=IDS)
    recorded = model.config.quantization_config
    assert (recorded.method, recorded.ratio, recorded.seed) == ("slab", 0.4, 5)
    assert (recorded.samples, recorded.sequence_length) == (4, 24)
    assert recorded.options["iterations"] == 2
    assert recorded.options["binary_rank"] == 1  # defaults too: a later version may have others
    assert recorded.provenance["calibration_tokens"] == 96
    assert len(recorded.provenance["calibration_sha256"]) == 64  # hexadecimal digits
    assert set(recorded.provenance["versions"]) == {"hf_lowrank", "torch", "transformers"}


LAYERS_OF_PATTERNS = {
    "model.layers.1.mlp.down_proj": 1,
    "down_proj": 4,
    "self_attn": 16,
    "model.layers.2": 7,
    "*.layers.[03].*": 14,
}
"""Patterns, and how many linear layers they match in a model of four blocks."""


@pytest.mark.parametrize("pattern", LAYERS_OF_PATTERNS)
def test_modules_to_not_convert_stay_as_they_are(pattern: str) -> None:
    dense = tiny_models.llama()
    model = compress(tiny_models.llama(), config("svd", 0.3, modules_to_not_convert=[pattern]), calibration=IDS)
    reasons = model.compression_report["dense"]
    listed = {name for name, reason in reasons.items() if "modules_to_not_convert" in reason}
    assert len(listed) == LAYERS_OF_PATTERNS[pattern]
    for name in listed:
        assert torch.equal(model.get_submodule(name).weight, dense.get_submodule(name).weight)
    assert 0.3 <= model.compression_report["ratio_stored"] <= 0.305  # the others pay for them


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(CompressionError, match="modules_to_not_convert: 'dwon_proj' matches no linear layer"):
        compress(tiny_models.llama(), config("svd", modules_to_not_convert=["dwon_proj"]), calibration=IDS)


class LlamaWithTiedLayers(LlamaForCausalLM):
    """Has one tensor in two of its blocks."""

    def __init__(self, model_config: LlamaConfig) -> None:
        super().__init__(model_config)
        self.model.layers[1].mlp.up_proj.weight = self.model.layers[0].mlp.up_proj.weight
        self.post_init()


def test_tied_layers_stay_dense() -> None:
    model = LlamaWithTiedLayers(tiny_models.llama().config)
    report = compress(model, config("svd"), calibration=IDS).compression_report
    assert report["dense"] == {f"model.layers.{i}.mlp.up_proj": "its weight is tied to another module" for i in (0, 1)}


def test_a_compressed_model_is_not_compressed_again() -> None:
    model = compress(tiny_models.llama(), config("svd"), calibration=IDS)
    with pytest.raises(CompressionError, match="compressed already"):
        compress(model, config("svd"), calibration=IDS)


def test_an_argument_of_another_type_is_refused_by_its_name() -> None:
    model = tiny_models.llama()
    with pytest.raises(CompressionError, match="config: found dict, expected a CompressionConfig"):
        compress(model, {"method": "svd"}, calibration=IDS)  # type: ignore[arg-type]
    with pytest.raises(CompressionError, match="model: found Sequential, expected a plain model of transformers"):
        compress(torch.nn.Sequential(model), config("svd"), calibration=IDS)  # type: ignore[arg-type]
    with pytest.raises(CompressionError, match="tokenizer: found list, expected a tokenizer; .* calibration="):
        compress(model, config("svd"), ["a text"])
    with pytest.raises(CompressionError, match="has no values"):
        compress(model.to("meta"), config("svd"), calibration=IDS)


@pytest.mark.parametrize("method", RECIPES)
def test_a_ratio_out_of_reach_is_an_error_that_leaves_the_model_as_it_was(method: str) -> None:
    model = tiny_models.llama()
    with pytest.raises(
        CompressionError,
        match=rf"ratio 0.99 is out of reach of {method} .*can remove [\d.]+ to [\d.]+ of the stored bits",
    ):
        compress(model, config(method, 0.99), calibration=IDS)
    for name, value in tiny_models.llama().state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize("calibration", ["ids", "self"])
@pytest.mark.parametrize(
    "damaged", ["model.layers.1.self_attn.k_proj", "model.layers.2.mlp.down_proj", "model.layers.0.input_layernorm"]
)
def test_a_weight_that_is_not_finite_is_named(method: str, calibration: str, damaged: str) -> None:
    model = tiny_models.llama()
    with torch.no_grad():
        model.get_submodule(damaged).weight.view(-1)[7] = float("nan")
    with pytest.raises(NumericalError, match=damaged.replace(".", r"\.")):
        compress(model, config(method), calibration=IDS if calibration == "ids" else "self")


def test_activations_that_overflow_are_an_error_in_self_calibration_too() -> None:
    model = tiny_models.llama()
    with torch.no_grad():
        # Every weight is finite, and the logits are not.
        model.model.norm.weight.fill_(3e38)
        model.lm_head.weight.mul_(1e5)
    with pytest.raises(NumericalError, match="not finite"):
        compress(model, config("svd"), calibration="self")


@pytest.mark.parametrize("method", RECIPES)
def test_the_callers_modes_and_gradients_stay_as_they_are(method: str) -> None:
    model = tiny_models.llama().train()
    model.model.embed_tokens.weight.requires_grad_(False)
    compress(model, config(method), calibration=IDS)
    assert model.training
    for module in model.modules():
        assert module.training
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name != "model.embed_tokens.weight")
    assert torch.is_grad_enabled()


def test_loading_with_a_config_compresses_as_compress_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_models.llama().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config("svd-llm"))
    assert "calibrating on text sampled from the model itself" in caplog.text
    expected = compress(tiny_models.llama(), config("svd-llm"), calibration="self").state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name])
