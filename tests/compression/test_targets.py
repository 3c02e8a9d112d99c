"""Bits per weight and the size of the files in place of a ratio: each says a ratio, what a message offers is accepted,
and the files are of the size that was asked for."""

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from hf_lowrank import CheckpointError, CompressionConfig, CompressionError, compress, inspect
from hf_lowrank.budget import Layer, ModelBudget, Unit
from hf_lowrank.cli import app
from hf_lowrank.compression.checks import check_predicts_next_token
from hf_lowrank.compression.defaults import with_defaults
from hf_lowrank.compression.dry_run import describe
from hf_lowrank.compression.from_disk import compress_checkpoint
from hf_lowrank.evaluation.candidates import candidates
from hf_lowrank.evaluation.comparison_records import asked_of
from hf_lowrank.execution.files import files_size
from hf_lowrank.methods import auto, make_method, registered_methods
from hf_lowrank.runtime.configuration import DerivedRatio, size_in_bytes

from ..support import tiny_models
from ..support.model_families import FAMILIES
from .recipes import IDS
from .test_ratios import QUICK, every_variant, plan, refusal

HAIRS = {"bits": 1e-3, "size": 1}
"""The steps in which messages name bits and sizes."""
SOME_FAMILIES = ["T5", *list(FAMILIES)[::9]]
"""Families that predict next tokens, and others."""
MOST_UNUSED_HEADER = 450
"""Bytes of the names of four tensors, which a mixed method may make of a layer or not."""


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return larger_model()


def larger_model() -> PreTrainedModel:
    """Build a model in which one step of a layer is a small part of the files."""
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_key_value_heads": 4}
    return tiny_models.llama(dtype=torch.bfloat16, **sizes)


@given(
    shapes=st.lists(st.tuples(st.integers(1, 500), st.integers(1, 500)), min_size=1, max_size=8),
    value_bits=st.sampled_from([16, 32]),
    bias=st.booleans(),
    others=st.integers(0, 10**9),
    share=st.floats(0.001, 0.999),
)
@settings(deadline=None)
def test_every_unit_says_a_ratio_and_every_ratio_a_value(
    shapes: list[tuple[int, int]], value_bits: int, bias: bool, others: int, share: float
) -> None:
    layers = [Layer(f"layer{index}", 0, 1, "other", *shape) for index, shape in enumerate(shapes)]
    biases = {layer.name: layer.out_features * value_bits * bias for layer in layers}
    budget = ModelBudget(0.5, dict.fromkeys(biases, value_bits), biases)
    units: list[Unit] = [budget.bits_per_weight(layers), budget.file_bytes(layers, others)]
    for unit in units:
        asked = unit.value(share)
        assert unit.ratio(asked) == pytest.approx(share, abs=1e-9 * unit.value(0) / unit.slope)
        assert unit.value(unit.ratio(asked)) == pytest.approx(asked, rel=1e-9)
        assert unit.value(0) > asked > unit.value(1)
    stored = budget.total_dense_bits(layers) * (1 - share)
    assert units[0].value(share) * sum(m * n for m, n in shapes) == pytest.approx(stored)
    assert (units[1].value(share) - others) * 8 == pytest.approx(stored, abs=1e-5)


def offered(message: str) -> list[float]:
    """Return the bits or sizes that a message names as within reach."""
    match = re.search(
        r"(?:can store|can write weight files of) ([\d.]+) to ([\d.]+) (?:bits per weight|bytes)", message
    )
    return [float(bound) for bound in match.groups()] if match else []


@every_variant
@pytest.mark.parametrize("name", ["bits", "size"])
def test_the_bounds_that_a_message_offers_are_accepted(
    method: str, options: dict[str, Any], name: str, model: PreTrainedModel
) -> None:
    def recipe(value: float) -> CompressionConfig:
        target: dict[str, Any] = {name: value if name == "bits" else int(value)}
        return CompressionConfig(method, options=options, modules_to_not_convert=["*.0.mlp.up_proj"], **target)

    for unreachable in (0.001 if name == "bits" else 1, 1000000):
        message = refusal(model, recipe(unreachable))
        if message is not None and "nothing to compress" in message:
            continue
        assert message is not None and message.startswith(f"{name} {unreachable} is out of reach of {method}")
        least, most = offered(message)
        assert refusal(model, recipe(least)) is None and refusal(model, recipe(most)) is None
        if method != "sola":  # which compresses other layers elsewhere
            assert "out of reach" in (refusal(model, recipe(least - HAIRS[name])) or "")
            assert "out of reach" in (refusal(model, recipe(most + HAIRS[name])) or "")


def header_size(folder: Path) -> int:
    """Return how many bytes the headers of a folder's weight files take."""
    return sum(8 + struct.unpack("<Q", file.read_bytes()[:8])[0] for file in folder.glob("*.safetensors"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", registered_methods())
def test_the_files_have_the_size_that_was_asked_for(method: str, tmp_path: Path) -> None:
    """They are never larger, and by less than a hundredth smaller.

    Headers count with the most tensors that a method makes of a layer, which is much in a model as small as this. And
    every layer of OATS may leave a rank unused.
    """
    options = QUICK.get(method, {})
    message = refusal(larger_model(), CompressionConfig(method, size=1, options=options))
    least, most = offered(str(message))
    asked = int(least + 0.6 * (min(most, 2 * least) - least))
    model = compress(
        larger_model(), CompressionConfig(method, size=asked, options=options), calibration=IDS, progress=False
    )
    model.save_pretrained(tmp_path)
    written = files_size(tmp_path)
    unused = 0.01 * asked + MOST_UNUSED_HEADER * len(model.config.quantization_config.layers)
    if method == "oats":
        unused += 0.03 * asked
    assert asked - unused <= written <= asked
    recorded = AutoConfig.from_pretrained(tmp_path).quantization_config
    assert recorded["size"] == asked and recorded["ratio"] == model.config.quantization_config.ratio
    report = model.compression_report
    assert report["size_asked"] == asked and report["model_bytes"] == written - header_size(tmp_path)


def test_a_recipe_keeps_its_bits_beside_the_ratio_that_they_lead_to(tmp_path: Path) -> None:
    recipe = CompressionConfig("rtn", bits=5)
    written = json.loads(json.dumps(recipe.to_dict()))
    assert "ratio" not in written and CompressionConfig.from_dict(written) == recipe
    made = plan(larger_model(), recipe).config
    assert (made.bits, made.ratio) == (5, 1 - 5 / 16) and isinstance(made.ratio, DerivedRatio)
    compress(larger_model(), recipe, calibration=IDS, progress=False).save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path).config.quantization_config
    assert (found.bits, found.size, found.ratio) == (5, None, 1 - 5 / 16)
    # For another model the bits of the recipe count, not the ratio that they have led to here.
    other = plan(tiny_models.llama(), CompressionConfig.from_dict({**found.to_dict(), "layers": {}}))
    assert other.budget.ratio == 1 - 5 / 32
    stored = inspect(tmp_path)
    assert (stored.bits_asked, stored.ratio_asked) == (5, 1 - 5 / 16) and 4.9 < stored.bits_per_weight <= 5
    assert stored.bits_per_weight == pytest.approx(16 * (1 - stored.ratio_stored))
    assert "bits" not in CompressionConfig().to_dict() and "size" not in CompressionConfig(ratio=0.3).to_dict()


CONFLICTS: list[dict[str, Any]] = [
    {"ratio": 0.5, "bits": 4.5},
    {"ratio": 0.5, "size": "80MB"},
    {"bits": 4.5, "size": 10**6},
    {"ratio": 0.5, "bits": 8, "size": 10**6},
]


@pytest.mark.parametrize("given", CONFLICTS, ids=str)
def test_two_of_the_three_are_refused_in_one_line(given: dict[str, Any], tmp_path: Path) -> None:
    expected = "ratio, bits, size: found .*, expected one of the three"
    with pytest.raises(CompressionError, match=expected) as raised:
        CompressionConfig(**given)
    assert "\n" not in str(raised.value)
    with pytest.raises(CheckpointError, match=expected):
        CompressionConfig.from_dict(given)
    options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    result = CliRunner().invoke(app, ["compress", "no/such/model", "-o", str(tmp_path / "new"), *options])
    assert result.exit_code == 1 and re.search(expected, result.output)


@pytest.mark.parametrize("bits", [0, -1, True, "4.5", float("nan"), float("inf"), [4]])
def test_what_is_no_number_of_bits_is_one_line(bits: Any) -> None:
    with pytest.raises(CompressionError, match=r"^bits: found .*, expected a number above 0"):
        CompressionConfig(bits=bits)


@pytest.mark.parametrize(
    "size", [0, -5, 0.5, True, "", "MB", "80XB", "eighty MB", "-80MB", "80MB2", float("nan"), [80]]
)
def test_what_is_no_size_is_one_line(size: Any) -> None:
    with pytest.raises(CompressionError, match=r"^size: found .*, expected the bytes of the weight files"):
        CompressionConfig(size=size)


@given(st.integers(1, 10**15), st.sampled_from(["", "B", "kB", "MB", "GB", "KiB", "MiB", "GiB", "m", " gb"]))
def test_units_of_size_are_those_of_everyone(count: int, unit: str) -> None:
    prefix = unit.strip().lower().removesuffix("b")
    powers = {"": 0, "k": 1, "m": 2, "g": 3}
    base = 1024 if prefix.endswith("i") else 1000
    assert size_in_bytes(f"{count}{unit}") == count * base ** powers[prefix.removesuffix("i")]
    assert size_in_bytes(count) == size_in_bytes(float(count)) == size_in_bytes(str(count))
    assert CompressionConfig(size="1.5 MiB").size == 3 * 2**19


def test_files_hold_masks_whatever_the_papers_count() -> None:
    with pytest.raises(CompressionError, match="size: files hold masks"):
        CompressionConfig("wanda", size="1MB", accounting="paper")


def test_the_command_line_says_all_three(tmp_path: Path) -> None:
    """The text is calibrated on block by block, from disk."""
    dense = tiny_models.saved(larger_model(), tmp_path / "dense")
    (tmp_path / "text.txt").write_text("\n".join(tiny_models.text()))
    command = ["compress", str(dense), "-o", str(tmp_path / "new"), "--method", "wanda", "--samples", "2"]
    command += ["--sequence-length", "16", "--calibration", str(tmp_path / "text.txt")]
    shown = CliRunner().invoke(app, [*command, "--bits", "8", "--dry-run"]).output
    assert re.search(r"50.00% removed, 8.00 bits per weight; embeddings: dense; weight files: [\d.]+ kB", shown)
    shown = CliRunner().invoke(app, [*command, "--bits", "8"]).output
    assert re.search(r"asked 8 bits per weight, stored 50.\d+% removed .*, (8.00|7.9\d) bits per weight", shown)
    assert "on disk" in shown
    shown = CliRunner().invoke(app, [*command, "--size", "0.15MB", "--overwrite"]).output
    assert "asked 150,000 bytes of weight files" in shown
    assert 0.98 * 150_000 <= files_size(tmp_path / "new") <= 150_000
    card = (tmp_path / "new" / "README.md").read_text()
    assert "which follows from 150,000 bytes of weight files" in card and "bits per weight" in card


def test_a_comparison_takes_bits_and_sizes() -> None:
    found = candidates(["slab", "gptq"], [0.5], [4.5], ["80MB"])
    assert [candidate.target for candidate in found[:3]] == [{"ratio": 0.5}, {"bits": 4.5}, {"size": 80_000_000}]
    assert len({candidate.file_name for candidate in found}) == 6
    # At one size the ratios of two methods differ a little, and they are compared all the same.
    assert asked_of({"ratio": 0.71, "size": 80}) == asked_of({"ratio": 0.72, "size": 80}) == ("size", 80)
    assert asked_of({"ratio": 0.5}) != asked_of({"ratio": 0.5, "bits": 0.5})
    with pytest.raises(CompressionError, match="bits: found 0"):
        candidates(["slab"], [], [0])
    with pytest.raises(CompressionError, match="size: found 'much'"):
        candidates(["slab"], [], [], ["much"])


@pytest.mark.parametrize("name", SOME_FAMILIES)
def test_a_recipe_that_names_no_method_gets_one_that_the_model_can_have(name: str) -> None:
    """`auto` where there is a loss of next tokens to learn from, at a few bits unless something else is asked for."""
    family = FAMILIES[name].make()
    try:
        check_predicts_next_token(family, make_method("auto"))
        expected = "auto"
    except CompressionError:
        expected = "slab"
    targets: list[dict[str, Any]] = [{}, {"bits": 5}, {"ratio": 0.6}, {"size": "1MB"}]
    for target in targets:
        for recipe in (CompressionConfig(**target), CompressionConfig.from_dict(target)):
            found = with_defaults(family, recipe)
            assert found.method == expected and type(found.method) is str
            assert found.bits == (target.get("bits") or (6 if expected == "auto" and not target else None))
            assert with_defaults(family, CompressionConfig("wanda", **target)).method == "wanda"


def test_nothing_but_a_model_is_compressed_as_its_defaults_say(tmp_path: Path) -> None:
    dense = tiny_models.saved(tiny_models.llama(num_hidden_layers=1), tmp_path / "dense")
    recipe = CompressionConfig(samples=2, sequence_length=8, calibration=str(tmp_path / "text.txt"))
    (tmp_path / "text.txt").write_text("\n".join(tiny_models.text(20)))
    compress_checkpoint(str(dense), tmp_path / "out", recipe, tiny_models.tokenizer())
    stored = inspect(tmp_path / "out")
    assert (stored.method, stored.bits_asked) == ("auto", 6) and stored.bits_per_weight <= 6
    assert " 6.00 bits per weight" in describe(str(dense), recipe)


def test_what_would_not_be_chosen_is_not_measured_and_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With enough bits `auto` measures quantized matrices only, and chooses what it chooses among everything."""
    made = []
    for measured in (auto.FOR_QUANTIZED, (1.0, 0.0)):
        monkeypatch.setattr(auto, "FOR_QUANTIZED", measured)
        model = tiny_models.llama(dtype=torch.bfloat16, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
        config = CompressionConfig("auto", bits=6, samples=4, sequence_length=24)
        made.append(compress(model, config, calibration=IDS, progress=False).state_dict())
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
