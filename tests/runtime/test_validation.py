"""Whatever is wrong with an untrusted checkpoint is one line that names it, before any layer is allocated."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from hf_lowrank import CheckpointError, LayerSpec
from hf_lowrank.runtime import quantizer
from hf_lowrank.runtime.safetensors_headers import read_header
from hf_lowrank.runtime.validation import dense_shape, resolve_layers

from .conftest import Checkpoint, tiny_gpt2, tiny_llama

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(slab: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a checkpoint to damage. Building a layer from it fails the test."""
    monkeypatch.setattr(quantizer, "build_layer", lambda *arguments, **factory: pytest.fail("a layer was built"))
    return Path(shutil.copytree(slab.folder, tmp_path / "damaged"))


def assert_refused(folder: Path, *parts: str) -> None:
    """Fail unless the checkpoint is refused in one line that holds all parts."""
    with pytest.raises(CheckpointError) as error:
        LlamaForCausalLM.from_pretrained(folder)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def change_spec(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["layers"][Q_PROJ] |= fields
    file.write_text(json.dumps(config))


# The file ends before, in and after the length of the header, in the header, and one byte before its end.
@pytest.mark.parametrize("kept_bytes", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused(folder: Path, kept_bytes: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept_bytes])
    assert_refused(folder, "model.safetensors", "download it again")


def test_a_file_with_something_appended_is_refused(folder: Path) -> None:
    with open(folder / "model.safetensors", "ab") as stream:
        stream.write(b"more")
    assert_refused(folder, "model.safetensors", "expected", "truncated or damaged")


@pytest.mark.parametrize("name", ["weight", "weight_mask", "sign_bits", "scale_in", "scale_out"])
def test_a_missing_tensor_is_named(folder: Path, name: str) -> None:
    change_tensors(folder, lambda state: state.pop(f"{Q_PROJ}.{name}"))
    assert_refused(folder, f"{Q_PROJ}.{name}", "missing", "expected")


@pytest.mark.parametrize("name", ["weight", "weight_mask", "sign_bits", "scale_in", "scale_out"])
def test_a_tensor_of_another_shape_is_named(folder: Path, name: str) -> None:
    change_tensors(folder, lambda state: state.update({f"{Q_PROJ}.{name}": state[f"{Q_PROJ}.{name}"][:-1].clone()}))
    assert_refused(folder, f"{Q_PROJ}.{name}", "model.safetensors has", "expected")


@pytest.mark.parametrize(
    ("name", "dtype"), [("weight", torch.int32), ("weight_mask", torch.bool), ("sign_bits", torch.float32)]
)
def test_a_tensor_of_another_dtype_is_named(folder: Path, name: str, dtype: torch.dtype) -> None:
    change_tensors(folder, lambda state: state.update({f"{Q_PROJ}.{name}": state[f"{Q_PROJ}.{name}"].to(dtype)}))
    assert_refused(folder, f"{Q_PROJ}.{name}", "model.safetensors has", "expected")


@pytest.mark.parametrize("name", ["lowrank_a", "absmax"])
def test_a_tensor_that_the_config_does_not_know_is_named(folder: Path, name: str) -> None:
    change_tensors(folder, lambda state: state.update({f"{Q_PROJ}.{name}": torch.zeros(2, 64)}))
    assert_refused(folder, Q_PROJ, "unexpected tensors", name)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"kept": 3}, ("weight", "expected float (64, 3)")),
        ({"rank": 2}, ("lowrank_a", "missing")),
        ({"bias": True}, ("bias", "missing")),
        ({"kept": 64}, ("kept is 64", "from 0 to 63 in a 64 × 64 layer")),
        ({"kept": -1}, ("kept is -1", "expected")),
        ({"kept": 10**30}, ("kept is 10000", "expected")),
        ({"binary_rank": "1"}, ("binary_rank is '1'", "expected")),
        ({"kind": "sparse_lowrank"}, ("binary_rank is 1", "expected 0")),
        ({"sparse": "diagonal"}, ("sparse is 'diagonal'", "expected one of")),
        ({"groups": 4}, ("groups is 4", "expected only the fields")),
    ],
    ids=str,
)
def test_a_config_that_is_not_that_of_the_file_is_refused(folder: Path, fields: dict, parts: tuple[str, ...]) -> None:
    change_spec(folder, **fields)
    assert_refused(folder, Q_PROJ, *parts)


def test_a_config_of_another_model_is_refused(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 1}))
    assert_refused(folder, "model.layers.1.", "no such module", "expected a linear layer")


@settings(deadline=None)
@given(content=st.binary(max_size=64))
def test_any_bytes_are_refused_or_read(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "bytes.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bytes\.safetensors"):
        read_header(str(file))


# Values in which the keys of a safetensors header come up often.
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "w"]), inner, max_size=4)
    ),
    max_leaves=8,
)
entries = st.fixed_dictionaries({"dtype": json_values, "shape": json_values, "data_offsets": json_values})


@given(header=json_values | st.dictionaries(st.text(max_size=3), entries, max_size=2))
@settings(max_examples=300, deadline=None)
def test_any_header_is_refused_or_read(tmp_path_factory: pytest.TempPathFactory, header: object) -> None:
    file = tmp_path_factory.getbasetemp() / "header.safetensors"
    encoded = json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded)  # a header and no data
    try:
        tensors = read_header(str(file))
    except CheckpointError as error:
        assert "header.safetensors" in str(error)
    else:
        assert all(isinstance(side, int) for _, shape in tensors.values() for side in shape)


def test_headers_are_those_of_the_tensors(slab: Checkpoint) -> None:
    file = slab.folder / "model.safetensors"
    names = {torch.float32: "F32", torch.uint8: "U8"}
    expected = {name: (names[tensor.dtype], tuple(tensor.shape)) for name, tensor in load_file(file).items()}
    assert read_header(str(file)) == expected


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.7.self_attn.q_proj", "no such module"),
        ("model.embed_tokens", "Embedding"),
        ("model.layers.0", "LlamaDecoderLayer"),
        ("", "LlamaForCausalLM"),
    ],
)
def test_a_name_of_no_linear_layer_is_refused(name: str, kind: str) -> None:
    with pytest.raises(CheckpointError, match=f"found {kind} in LlamaForCausalLM, expected a linear layer"):
        resolve_layers(tiny_llama(), {Q_PROJ: LayerSpec(rank=1), name: LayerSpec(rank=1)})


def test_shapes_are_those_of_the_product() -> None:
    """`Conv1D` stores (in, out), so its shape is turned around."""
    assert dense_shape(nn.Linear(3, 5)) == (5, 3)
    assert dense_shape(tiny_gpt2().transformer.h[0].attn.c_attn) == (192, 64)
