"""`verify` finds every change, and `from_pretrained` every one that matters to it. Neither runs code it is given."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from hf_lowrank import CheckpointError, CompressionError, cli
from hf_lowrank.checkpoints.verify import verify
from hf_lowrank.runtime.checksums import LOADING_CODE
from tests.fuzz.checkpoints import save_checkpoints
from tests.fuzz.mutations import CANARY, code

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {folder.name: folder for folder in save_checkpoints(tmp_path_factory.mktemp("sources"))}


@pytest.fixture
def copy_of(sources: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(sources[name], tmp_path / name))


def change_tensor(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    state = load_file(folder / "model.safetensors")
    state[name] = change(state[name].clone()).contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **fields: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | fields))


def assert_refused_everywhere(folder: Path, *parts: str) -> None:
    """Check that opening, with consent to remote code or without, and `verify` refuse a checkpoint with one line."""
    for arguments in ({}, {"trust_remote_code": True}):
        with pytest.raises(CheckpointError) as error:
            AutoModelForCausalLM.from_pretrained(folder, **arguments)
        assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)
    assert any(all(part in problem for part in parts) for problem in verify(folder).problems)


@pytest.mark.parametrize("name", ["slab", "shards", "sola", "bfloat16", "quantised", "pivoted", "gpt2"])
def test_what_was_saved_is_sound(sources: dict[str, Path], name: str) -> None:
    verification = verify(sources[name])
    assert verification.problems == []
    assert verification.layers > 0
    assert verification.runtime.startswith("hf_lowrank ")


@pytest.mark.parametrize(
    ("source", "tensor", "change", "part"),
    [
        ("slab", f"{Q_PROJ}.weight_mask", lambda mask: mask ^ 1, "bits set in row 0"),
        ("gpt2", "transformer.h.0.attn.c_attn.weight_mask", lambda mask: mask | 255, "bits set in row 0"),
        ("pivoted", None, lambda pivots: pivots * 0, "has 0 bits set, expected"),
        ("slab", f"{Q_PROJ}.scale_in", lambda scale: scale / 0, "not finite"),
        ("slab", f"{Q_PROJ}.scale_out", lambda scale: scale * torch.nan, "not finite"),
        ("quantised", None, lambda scale: scale + torch.inf, "not finite"),
    ],
)
def test_bits_that_lie(
    copy_of: Callable[[str], Path], source: str, tensor: str | None, change: Callable[[Tensor], Tensor], part: str
) -> None:
    folder = copy_of(source)
    suffix = "lowrank_pivots" if source == "pivoted" else "weight_scale"
    tensor = tensor or next(name for name in load_file(folder / "model.safetensors") if name.endswith(suffix))
    change_tensor(folder, tensor, change)
    assert_refused_everywhere(folder, tensor, part)


def test_padding_bits(copy_of: Callable[[str], Path]) -> None:
    """Rows of codes end within a byte, and so do rows of masks if the width of the layer is no multiple of eight."""
    from hf_lowrank.runtime.configuration import LayerSpec
    from hf_lowrank.runtime.content_checks import check_contents
    from hf_lowrank.runtime.layers import SparseLowRankBinaryLinear

    layer = SparseLowRankBinaryLinear(
        13, 5, "bitmask", kept=6, rank=2, weight_bits=3, weight_group=4, lowrank_bits=5, lowrank_group=4
    )
    spec: LayerSpec = layer.spec
    tensors = dict(layer.named_parameters()) | dict(layer.named_buffers())
    check_contents("layer", spec, 5, 13, tensors)
    for name, last in (
        ("weight_mask", 2**5),
        ("sign_bits", 2**7),
        ("weight", 2**2),
        ("lowrank_a", 2**1),
        ("lowrank_b", 2**2),
    ):
        bad = tensors[name].detach().clone()
        bad.view(bad.shape[0], -1)[1, -1] |= last
        if name == "weight_mask":
            bad.view(5, -1)[1, 0] &= 0xFE
        with pytest.raises(CheckpointError, match=rf"layer\.{name}: has padding bits"):
            check_contents("layer", spec, 5, 13, tensors | {name: bad})


def test_a_value_that_changed_is_found_by_its_checksum(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("slab")
    change_tensor(folder, f"{Q_PROJ}.weight", lambda weight: weight + 1)
    (problem,) = verify(folder).problems
    assert problem.startswith("model.safetensors: sha256 is not the recorded")
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: sha256 is .* delete its line under checksums in config\.json"
    ):
        AutoModelForCausalLM.from_pretrained(folder)


def test_weights_changed_on_purpose_open_once_their_checksum_is_deleted(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("slab")
    change_tensor(folder, f"{Q_PROJ}.weight", lambda weight: weight + 1)
    values = json.loads((folder / "config.json").read_text())
    del values["quantization_config"]["checksums"]["model.safetensors"]
    (folder / "config.json").write_text(json.dumps(values))
    AutoModelForCausalLM.from_pretrained(folder)


def test_a_config_saved_beside_other_weights_does_not_speak_of_the_old_ones(
    copy_of: Callable[[str], Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(copy_of("slab"))
    model.config.save_pretrained(tmp_path)
    assert not json.loads((tmp_path / "config.json").read_text())["quantization_config"].get("checksums")


def test_a_config_that_changed_is_found_by_its_checksum(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("slab")
    change_config(folder, rms_norm_eps=1e-3)
    assert any(problem.startswith("config.json: sha256") for problem in verify(folder).problems)


def test_a_saved_copy_records_its_own_checksums(copy_of: Callable[[str], Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(copy_of("slab"))
    torch.nn.init.ones_(model.get_submodule(Q_PROJ).weight)
    model.save_pretrained(tmp_path / "again")
    assert verify(tmp_path / "again").sound


def test_tensors_that_no_config_accounts_for(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("slab")
    state = load_file(folder / "model.safetensors")
    state.pop("model.norm.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert_refused_everywhere(folder, "model.norm.weight", "missing")
    state |= {"model.norm.weight": torch.ones(32), "model.more.weight": torch.ones(1)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert_refused_everywhere(folder, "model.more.weight", "unexpected")


def test_tied_layers_are_no_layers_to_compress(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("bfloat16")
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"]["layers"]["lm_head"] = values["quantization_config"]["layers"][Q_PROJ]
    change_config(folder, **values)
    assert_refused_everywhere(folder, "lm_head")


@pytest.mark.parametrize("shard", ["../slab/model.safetensors", "/etc/passwd", "model.bin", 7])
def test_shards_stay_in_their_folder(copy_of: Callable[[str], Path], shard: object) -> None:
    folder = copy_of("shards")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused_everywhere(folder, "model.norm.weight", repr(shard), "of the same folder")


def test_swapped_shards(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("shards")
    one, other = sorted(folder.glob("*.safetensors"))[:2]
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    assert_refused_everywhere(folder, "found in", "expected in")


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 90_000},
        {"num_labels": 10**12},
        {"hidden_size": 10**15},
        {"num_attention_heads": 0},
        {"vocab_size": -1},
        {"dtype": "float64"},
        {"dtype": "bfloat16"},
        {"model_type": "no-such-model"},
        {"model_type": "dinov2"},
        {"model_type": "vision-encoder-decoder"},
        {"transformers_weights": "other.safetensors"},
        {"transformers_weights": 5},
        {"architectures": ["pipeline"]},
        {"architectures": None},
        {"hidden_act": "no-such-function"},
        {"quantization_config": None},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
    ],
    ids=str,
)
def test_configs_that_no_model_has(copy_of: Callable[[str], Path], fields: dict[str, object]) -> None:
    folder = copy_of("slab")
    change_config(folder, **fields)
    assert_refused_everywhere(folder, "config")


def test_keys_that_occur_twice(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("slab")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"hidden_size": 32', '"hidden_size": 32, "hidden_size": 32'))
    assert_refused_everywhere(folder, "config.json", "'hidden_size' occurs twice")


def test_a_config_that_cannot_be_read(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("slab")
    for content in (b"", b"\xff\xfe", b"[" * 100_000, b"[]", b"null", b'{"a": ' + b"9" * 5000 + b"}"):
        (folder / "config.json").write_bytes(content)
        assert_refused_everywhere(folder, "config.json")


@pytest.mark.parametrize("levels", [200, 900])
def test_a_config_that_is_nested_deeper_than_any(copy_of: Callable[[str], Path], levels: int) -> None:
    """Python reads deeper JSON than it can copy, so both depths must be refused."""
    folder = copy_of("slab")
    dictionaries: object = 1
    lists: object = 1
    for _ in range(levels):
        dictionaries, lists = {"a": dictionaries}, [lists]
    for field in ({"deep": dictionaries}, {"dtype": lists}, {"quantization_config": lists}):
        change_config(folder, **field)
        assert_refused_everywhere(folder, "config.json")


def test_a_config_alone_that_cannot_be_read(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("slab")
    for file in [*folder.glob("*.py"), folder / "compression_report.json"]:
        file.unlink()
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace(",", "", 1))
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_the_checkpoints_code_never_runs_where_the_package_is(
    copy_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CANARY, str(tmp_path / "canary"))
    folder = copy_of("slab")
    code(random.Random(0), folder)
    for arguments in ({}, {"trust_remote_code": True}):
        assert AutoConfig.from_pretrained(folder, **arguments).model_type == "llama"
        assert type(AutoModelForCausalLM.from_pretrained(folder, **arguments)).__module__.startswith(
            "transformers.models.llama"
        )
    verification = verify(folder)
    assert not (tmp_path / "canary").exists()  # the code of the checkpoint would have written it
    assert verification.runtime == "unknown"
    assert any(LOADING_CODE in problem and "trust_remote_code" in problem for problem in verification.problems)


def test_what_is_not_ours_passes_untouched(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "auto_map": {"AutoConfig": "mine.Mine"}, "hidden_size": 8, "hidden_size": 64}'
    )
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.hidden_size, config.auto_map) == (64, {"AutoConfig": "mine.Mine"})


def test_a_dense_model_may_take_the_folder_of_a_compressed_one(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("slab")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.dequantize()
    model.save_pretrained(folder)
    assert type(AutoModelForCausalLM.from_pretrained(folder).model.layers[0].self_attn.q_proj) is torch.nn.Linear


def test_the_command(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("slab")
    result = CliRunner().invoke(cli.app, ["verify", str(folder)])
    assert result.exit_code == 0 and "verdict: sound" in result.stdout
    os.truncate(folder / "model.safetensors", 100)
    (folder / LOADING_CODE).write_text("changed = True")
    result = CliRunner().invoke(cli.app, ["verify", str(folder)])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and "not sound" in result.stderr
    assert "model.safetensors" in result.stdout and LOADING_CODE in result.stdout
    assert json.loads(CliRunner().invoke(cli.app, ["verify", str(folder), "--json"]).stdout)["problems"]
    with pytest.raises(CompressionError, match="no such folder"):
        verify(folder / "nowhere")
