"""The config survives JSON, refuses everything that cannot be in one clear line, and counts the bits of the file."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hf_lowrank import CheckpointError, CompressionConfig, CompressionError, LayerSpec
from hf_lowrank.runtime.configuration import FORMAT_VERSION
from hf_lowrank.runtime.errors import quoted
from hf_lowrank.runtime.safetensors_headers import read_header

from .layer_cases import layer_cases, random_layer

LAYER = "model.layers.0.self_attn.q_proj"
SPEC = {"kind": "sparse_lowrank", "sparse": "bitmask", "kept": 3, "rank": 2, "binary_rank": 0, "bias": False}

option_values = st.one_of(st.integers(), st.booleans(), st.text(max_size=5), st.none())
recipes = st.builds(
    CompressionConfig,
    method=st.sampled_from(["slab", "sola", "soco"]),
    ratio=st.floats(0.01, 0.99),
    options=st.dictionaries(st.text(max_size=5), option_values, max_size=3),
    samples=st.integers(1, 1000),
    sequence_length=st.none() | st.integers(1, 4096),
    seed=st.integers(0, 2**32),
    accounting=st.sampled_from(["bits", "paper"]),
    modules_to_not_convert=st.lists(st.text(min_size=1, max_size=8), max_size=3),
    layers=st.dictionaries(st.text(min_size=1, max_size=8), layer_cases().map(lambda case: case[0]), max_size=3),
)


@given(config=recipes)
@settings(deadline=None)
def test_a_config_survives_json(config: CompressionConfig) -> None:
    reread = CompressionConfig.from_dict(json.loads(config.to_json_string()))
    assert reread == config
    assert all(isinstance(spec, LayerSpec) for spec in reread.layers.values())


def test_reading_leaves_the_dictionary_alone() -> None:
    values = CompressionConfig(layers={LAYER: LayerSpec(**SPEC)}).to_dict()
    before = json.dumps(values)
    CompressionConfig.from_dict(values)
    assert json.dumps(values) == before


def test_layers_may_leave_out_the_bias() -> None:
    values = CompressionConfig().to_dict() | {"layers": {LAYER: {name: SPEC[name] for name in SPEC if name != "bias"}}}
    assert CompressionConfig.from_dict(values).layers == {LAYER: LayerSpec(**SPEC)}


@pytest.mark.parametrize("described", [CompressionConfig, LayerSpec])
def test_every_field_has_a_help_text(described: Any) -> None:
    assert all(field.metadata.get("help") for field in dataclasses.fields(described))


def assert_one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    """Fail unless the message is one line that holds all parts."""
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("method", [3, None, ""]),
        ("ratio", [0, 1, -0.5, 1.5, "0.5", None, True, float("nan"), float("inf")]),
        ("options", [None, "rank=3", [1]]),
        ("calibration", [None, 3]),
        ("samples", [0, -1, 1.5, True, "8", None]),
        ("sequence_length", [0, -1, 1.5, True, "8"]),
        ("seed", [-1, 1.5, True, "0", None]),
        ("accounting", ["bytes", None, 1]),
        ("modules_to_not_convert", ["lm_head", None, [1]]),
        ("provenance", [None, "me"]),
    ],
)
def test_a_bad_recipe_is_one_line_with_field_found_and_expected(field: str, values: list) -> None:
    for value in values:
        with pytest.raises(CompressionError) as error:
            CompressionConfig(**{field: value})
        assert_one_line(error, f"{field}: found {value!r}, expected ")


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 99, 0, -1, "1", 1.0, True, None, [1]])
def test_another_format_version_is_refused(version: Any) -> None:
    with pytest.raises(CheckpointError) as error:
        CompressionConfig.from_dict(CompressionConfig().to_dict() | {"format_version": version})
    assert_one_line(error, f"format_version: found {version!r}, expected 1 to {FORMAT_VERSION}", "pip install -U")


def test_only_a_recipe_may_leave_the_format_version_out() -> None:
    assert CompressionConfig.from_dict({"quant_method": "hf_lowrank", "ratio": 0.3}) == CompressionConfig(ratio=0.3)
    layer = {"kind": "sparse_lowrank", "sparse": "none", "kept": 0, "rank": 2, "binary_rank": 0, "bias": False}
    with pytest.raises(CheckpointError, match="format_version"):
        CompressionConfig.from_dict({"ratio": 0.3, "layers": {"q_proj": layer}})


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(CheckpointError) as error:
        CompressionConfig.from_dict(CompressionConfig().to_dict() | {"entropy_coding": "rans"})
    assert_one_line(error, "entropy_coding", "unknown field")


def test_the_config_of_another_plugin_is_refused() -> None:
    with pytest.raises(CheckpointError, match="quant_method: found 'gptq', expected 'hf_lowrank'"):
        CompressionConfig.from_dict(CompressionConfig().to_dict() | {"quant_method": "gptq"})


@pytest.mark.parametrize("layers", [[], "all", 3, None])
def test_layers_must_be_a_dictionary(layers: Any) -> None:
    with pytest.raises(CheckpointError) as error:
        CompressionConfig.from_dict(CompressionConfig().to_dict() | {"layers": layers})
    assert_one_line(error, "layers: found", "expected a dictionary")


@pytest.mark.parametrize("spec", [None, 3, "dense", [SPEC]])
def test_a_spec_must_be_a_dictionary(spec: Any) -> None:
    with pytest.raises(CheckpointError) as error:
        LayerSpec.from_dict(LAYER, spec)
    assert_one_line(error, LAYER, quoted(spec), "expected a dictionary")


@pytest.mark.parametrize("field", ["kind", "sparse", "kept", "rank", "binary_rank"])
def test_a_missing_field_of_a_layer_is_named(field: str) -> None:
    with pytest.raises(CheckpointError) as error:
        LayerSpec.from_dict(LAYER, {name: SPEC[name] for name in SPEC if name != field})
    assert_one_line(error, LAYER, repr(field), "missing")


def test_an_unknown_field_of_a_layer_is_named() -> None:
    with pytest.raises(CheckpointError) as error:
        LayerSpec.from_dict(LAYER, {**SPEC, "groups": 4})
    assert_one_line(error, LAYER, "groups", "expected only the fields")


NO_COUNTS = (-1, 1.0, True, "1", None, 10**30)
"""Values that are no number of rows, columns or ranks."""


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("kind", "dense", "one of sparse_lowrank"),
        ("kind", None, "one of sparse_lowrank"),
        ("sparse", "diagonal", "one of none, rows, columns, bitmask"),
        ("sparse", ["rows"], "one of none"),
        ("kept", 8, "from 0 to 7 in a 6 × 8 layer"),
        ("rank", 7, "from 0 to 6 in a 6 × 8 layer"),
        ("binary_rank", 1, "0 for sparse_lowrank"),
        *[("kept", value, "an integer from 0") for value in NO_COUNTS],
        *[("rank", value, "an integer from 0") for value in NO_COUNTS],
        *[("binary_rank", value, "an integer from 0") for value in NO_COUNTS],
        ("bias", 1, "true or false"),
    ],
)
def test_a_bad_field_of_a_layer_is_one_line_with_layer_field_found_and_expected(
    field: str, value: Any, expected: str
) -> None:
    with pytest.raises(CheckpointError) as error:
        LayerSpec.from_dict(LAYER, {**SPEC, field: value}).validate(LAYER, out_features=6, in_features=8)
    assert_one_line(error, LAYER, f"{field} is {value!r}", expected)


@pytest.mark.parametrize(("sparse", "most"), [("none", 0), ("rows", 5), ("columns", 7), ("bitmask", 7)])
def test_at_least_one_row_or_column_is_not_kept(sparse: str, most: int) -> None:
    LayerSpec(sparse=sparse, kept=most).validate(LAYER, 6, 8)
    with pytest.raises(CheckpointError, match=f"kept is {most + 1}"):
        LayerSpec(sparse=sparse, kept=most + 1).validate(LAYER, 6, 8)


@given(case=layer_cases(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(deadline=None, max_examples=60)
def test_stored_bits_are_those_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, case: tuple, dtype: torch.dtype
) -> None:
    spec, m, n = case
    file = tmp_path_factory.mktemp("bits") / "layer.safetensors"
    save_file(random_layer(spec, m, n, dtype).state_dict(), file)
    assert spec.stored_bits(m, n, dtype.itemsize * 8) == 8 * data_bytes(file)
    shapes_in_file = {name: shape for name, (_, shape) in read_header(str(file)).items()}
    assert shapes_in_file == {name: shape for name, (shape, _) in spec.tensors(m, n).items()}


def data_bytes(file: Path) -> int:
    """Return the number of bytes of a safetensors file that follow its header."""
    with open(file, "rb") as stream:
        return file.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")


@given(case=layer_cases())
def test_paper_accounting_leaves_out_the_mask_and_nothing_else(case: tuple) -> None:
    spec, m, n = case
    mask_bits = 8 * m * ((n + 7) // 8) if spec.sparse == "bitmask" else 0  # every row of the mask ends in a whole byte
    assert spec.stored_bits(m, n, 16) - spec.stored_bits(m, n, 16, accounting="paper") == mask_bits
