"""Names stand in place of paths: what a path ends in stays, and nothing else of it."""

import json
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_lowrank.runtime.privacy import public_command, public_name, public_names, public_text, public_values

NAMES = st.text("abcXYZ019._- é", min_size=1, max_size=8).filter(lambda name: name.strip(". ") == name)
FOLDERS = st.lists(st.just("secret-folder") | NAMES.map(lambda name: f"secret-{name}"), min_size=1, max_size=3)
PREFIXES = ["/", "~/", "file:///", "C:\\", "../", "./", ""]


def path_of(prefix: str, folders: list[str], name: str) -> str:
    return prefix + ("\\" if "\\" in prefix else "/").join([*folders, name])


@pytest.mark.parametrize("prefix", PREFIXES)
@given(folders=FOLDERS, name=NAMES)
def test_a_path_becomes_the_name_at_its_end(prefix: str, folders: list[str], name: str) -> None:
    path = path_of(prefix, folders, name)
    if prefix == "" and len(folders) == 1:
        return  # it may be an id on the Hub
    assert public_name(path) == name
    assert public_name(f"{path}/") == name
    command = public_command(["hf-lowrank", "compress", path, f"--calibration={path}", f"-o{path}", "--seed", "0"])
    assert "secret" not in command
    if prefix not in ("", "../", "./"):
        assert "secret" not in json.dumps(public_values({"a": [path], "b": {"_name_or_path": path}}))
    assert "secret" not in public_text(f"'{path}': no such file", known=[path])


@pytest.mark.parametrize("name", ["org/name", "gpt2", "self", "wikitext2", "meta-llama/Llama-3.2-1B", ""])
def test_an_id_on_the_hub_stays_as_it_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert public_name(name) == name
    assert public_values({"_name_or_path": name}) == {"_name_or_path": name}
    assert public_command(["hf-lowrank", "compress", name]) == shlex.join(["hf-lowrank", "compress", name])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert public_name("org/name") == "name"  # a folder here, which transformers would open, too


def test_a_folder_in_the_cache_of_the_hub_has_the_name_of_its_repo() -> None:
    assert public_name("/home/me/.cache/hub/models--org--a-name/snapshots/0123/") == "org/a-name"
    assert public_name("C:\\me\\hub\\models--gpt2\\snapshots\\0123") == "gpt2"


def test_the_current_folder_has_a_name_and_a_home_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "author"))
    (tmp_path / "author" / "model").mkdir(parents=True)
    assert [public_name("."), public_name("./"), public_name("..")] == [
        tmp_path.name,
        tmp_path.name,
        tmp_path.parent.name,
    ]
    assert [public_name("~"), public_name("~author"), public_name("author"), public_name("/")] == ["", "", "", ""]
    assert public_name("author/model") == "model"


def test_what_only_looks_like_a_path_stays_as_it_is() -> None:
    values = {
        "id2label": {"0": "/m/0dgw9r"},
        "eos_token": "</s>",
        "think": "/think",
        "chat_template": "{{ a }}\n/home/x/y\n",
        "scale": 1.5,
        "auto_map": {"AutoConfig": "org/name--configuration.Config"},
        "url": "https://huggingface.co/org/name",
    }
    assert public_values(values) == values
    for text in ("12 tokens/s and/or 3/4", "expected </s>, found 0.5/1", "see docs/promises.md"):
        assert public_text(text) == text


def test_files_of_one_name_are_told_apart() -> None:
    assert public_names(["/a/x.txt", "/b/x.txt", "y.txt", "/c/d/x.txt"]) == [
        "x.txt",
        "x.txt (2)",
        "y.txt",
        "x.txt (3)",
    ]
