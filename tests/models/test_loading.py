"""A source that cannot be opened is one line: a path that is none, or a name that the Hub does not give."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import AutoConfig

from hf_lowrank import CompressionError
from hf_lowrank.models.loading import load_config

from ..support import tiny_models


def message_of(source: str) -> str:
    with pytest.raises(CompressionError) as raised:
        load_config(source)
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(f"{source}: ")
    return message


def refuse_the_hub(*arguments: Any, **keywords: Any) -> None:
    raise AssertionError("the Hub was asked for a path")


@pytest.mark.parametrize(
    "source",
    [
        "/no/such/folder",
        "./nothing",
        "../nothing",
        "~/nothing",
        "nothing",
        "models/llama/7b",
        "models/",
        "models/model.safetensors",
        "models/config.json",
        "models\\llama",
        "my models/llama",
    ],
)
def test_a_path_that_does_not_exist_is_never_looked_for_on_the_hub(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse_the_hub)
    assert "no such folder" in message_of(source)


def test_a_name_whose_first_part_is_a_folder_here_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse_the_hub)
    (tmp_path / "models").mkdir()
    assert "no such folder, though models is one" in message_of("models/llama")


def test_a_model_in_the_cache_opens_beside_a_folder_of_its_owners_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "cache" / "models--owner--model" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    tiny_models.saved(tiny_models.llama(), snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(snapshot.name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "owner").mkdir()
    assert load_config("owner/model").model_type == "llama"


def test_a_name_that_is_in_no_cache_has_both_readings_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    assert message_of("nobody/nothing") == (
        "nobody/nothing: no such folder here, and no such model in the Hub's cache (HF_HUB_OFFLINE is set); "
        "check the path or the name"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fail_with(monkeypatch, LocalEntryNotFoundError("Cannot find the requested files\nin the disk cache"))
    assert "no such folder here, and the Hub cannot be reached" in message_of("nobody/nothing")


def test_what_the_hub_says_about_a_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, hub_error(RepositoryNotFoundError))
    assert "no such folder here, and the Hub has no such model" in message_of("nobody/nothing")
    fail_with(monkeypatch, hub_error(GatedRepoError))
    assert message_of("somebody/gated") == "somebody/gated: cannot be opened as a model (first line)"


def hub_error(kind: type[Exception]) -> Exception:
    """An error of the Hub's client, without the response that led to it."""
    error = kind.__new__(kind)
    error.args = ("not there",)
    return error


def fail_with(monkeypatch: pytest.MonkeyPatch, cause: Exception) -> None:
    """Let transformers fail as it does on an error of the Hub's client."""

    def from_pretrained(*arguments: Any, **keywords: Any) -> None:
        raise OSError("first line\nsecond line") from cause

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
