"""Every command says in one line what is wrong with a checkpoint, and names the file and the cure."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, pipeline
from typer.testing import CliRunner

from hf_lowrank import CheckpointError, CompressionConfig, cli, compress
from hf_lowrank.evaluation.tasks import evaluate_tasks
from hf_lowrank.models.loading import load_model
from tests.support import tiny_models


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three shards."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    config = CompressionConfig(method="svd", ratio=0.4, samples=4, sequence_length=16)
    model = compress(tiny_models.llama(), config, tiny_models.tokenizer(), tiny_models.text(8), progress=False)
    model.save_pretrained(folder, max_shard_size="60KB")
    assert (folder / "model-00002-of-00003.safetensors").is_file()
    return folder


def newer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (folder / "config.json").write_text(json.dumps(config))


def truncated(folder: Path) -> None:
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:20_000])


def without_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


DAMAGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "newer format": (newer, "config.json", "pip install -U hf_lowrank"),
    "truncated shard": (truncated, "model-00002-of-00003.safetensors", "download"),
    "missing shard": (without_shard, "model-00002-of-00003.safetensors", "download"),
}
"""How a checkpoint is damaged, and the file and the cure that every message must name."""
VERBS = {
    "inspect": [],
    "dense": ["-o", "{folder}-dense"],
    "report": ["--out", "{folder}.html"],
    "push": ["me/model"],
    "evaluate": ["--tasks", "items.jsonl"],
}
"""Commands that open a checkpoint, with the arguments that come after its folder."""


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_route_names_the_damaged_file_and_the_cure(whole: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    change, file, cure = DAMAGES[damage]
    change(folder)
    with pytest.raises(CheckpointError, match=file):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=file) as error:  # transformers puts its own words and a traceback before ours
        pipeline("text-generation", str(folder))
    last = str(error.value).strip().splitlines()[-1]
    assert file in last and cure in last
    for verb, arguments in VERBS.items():
        arguments = [argument.format(folder=folder) for argument in arguments]
        result = CliRunner().invoke(cli.app, [verb, str(folder), *arguments])
        assert result.exit_code == 1, verb
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ") and file in line and cure in line, line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_missing_loading_code_is_not_pushed_and_comes_back_with_a_save(whole: Path, tmp_path: Path) -> None:
    name = "modeling_hf_lowrank.py"
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    (folder / name).unlink()
    result = CliRunner().invoke(cli.app, ["push", str(folder), "me/model"])
    (line,) = result.stderr.splitlines()
    assert name in line and "save the model again" in line
    model = AutoModelForCausalLM.from_pretrained(folder)  # the plugin does not need it
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / name).read_bytes() == (whole / name).read_bytes()


def test_a_missing_tokenizer_is_named_with_the_cure(whole: Path, tmp_path: Path) -> None:
    """This holds for a compressed checkpoint. For other folders, transformers' own errors come through."""
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(
        CheckpointError, match=r"tokenizer_config.json: missing, .* save that of the model it was compressed from"
    ):
        AutoTokenizer.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: missing"):
        pipeline("text-generation", str(folder))
    result = CliRunner().invoke(cli.app, ["evaluate", str(folder), "--tasks", "items.jsonl"])
    (line,) = result.stderr.splitlines()
    assert str(folder / "tokenizer_config.json") in line and "save_pretrained" in line
    for name in ("modeling_hf_lowrank.py", "compression_report.json"):
        (folder / name).unlink()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="tokenizer") as error:
        AutoTokenizer.from_pretrained(folder)
    assert not isinstance(error.value, CheckpointError)


def test_a_hub_that_cannot_be_reached_is_one_line(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A stand-in for the error of httpx: which version of httpx is installed depends on huggingface_hub.
    refused = type("ConnectError", (Exception,), {"__module__": "httpx"})

    def unreachable(*arguments: object, **options: object) -> None:
        raise refused("connection refused")

    monkeypatch.setattr("hf_lowrank.publishing.hub.push_folder", unreachable)
    result = CliRunner().invoke(cli.app, ["push", str(whole), "me/model"])
    (line,) = result.stderr.splitlines()
    assert (
        line
        == "error: me/model: the Hub cannot be reached (connection refused); push again when there is a connection"
    )


def test_a_model_that_gives_no_likelihoods_is_refused_for_tasks(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(**sizes, vocab_size=20)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tasks score text by its likelihood, which BertModel does not give"):
        evaluate_tasks(load_model(str(tmp_path)), tiny_models.tokenizer(), ["items.jsonl"])
