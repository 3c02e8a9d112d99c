"""What lies beside the weights: the user's files stay, the origin's are carried over, other models' go away."""

import inspect
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    WhisperFeatureExtractor,
)
from typer.testing import CliRunner

from hf_lowrank import CompressionConfig, compress
from hf_lowrank.cli import app
from hf_lowrank.runtime.companions import CARRIED, VOCABULARY, matches
from hf_lowrank.runtime.reports import is_own_card
from hf_lowrank.runtime.saving import CompleteSave
from tests.support import tiny_models
from tests.support.files import digests

TEXTS = {
    "LICENSE": "terms",
    "USE_POLICY.md": "more terms",
    "processor_config.json": '{"processor_class": "WhisperProcessor"}',
    "video_preprocessor_config.json": "{}",
    "chat_template.json": '{"chat_template": "{{ messages }}"}',
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "vocab.json": "{}",
    "merges.txt": "#version: 0.2",
    "tokenizer.model": "sentencepiece",
    "speaker_embeddings_path.json": "{}",
    "modules.json": '[{"path": ""}, {"path": "1_Pooling"}, {"path": "../outside"}]',
    "1_Pooling/config.json": "{}",
    "config_sentence_transformers.json": "{}",
}
"""Files that a save leaves as they are."""
NOT_CARRIED = [
    "pytorch_model.bin",
    "model.gguf",
    "tf_model.h5",
    "flax_model.msgpack",
    "onnx/model.onnx",
    "optimizer.pt",
    "token",
    ".env",
    ".cache/huggingface/token",
    ".vocab.json",
    "notes.txt",
    "README.md",
    "checkpoint-5/vocab.json",
]


def put(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model with everything beside it that a folder may have."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    tiny_models.saved(tiny_models.llama(num_hidden_layers=1), folder)
    # The oldest versions 5.x of transformers have only the one, and the others want torchvision for it.
    image_processor = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
    image_processor(size={"height": 16, "width": 16}).save_pretrained(folder)
    put(folder, TEXTS)
    put(folder, dict.fromkeys(NOT_CARRIED, "not to be carried"))
    return folder


def compressed(model: PreTrainedModel, tokenizer: Any = None) -> PreTrainedModel:
    return compress(model, CompressionConfig("magnitude", 0.4), tokenizer, calibration=[[5, 6, 7] * 4], progress=False)


@pytest.fixture(scope="module")
def checkpoint(dense: Path) -> Path:
    folder = dense.parent / "compressed"
    compressed(AutoModelForCausalLM.from_pretrained(dense)).save_pretrained(folder)
    return folder


def assert_carried(folder: Path, dense: Path) -> None:
    for name, text in TEXTS.items():
        assert (folder / name).read_text() == text, name
    assert (folder / "preprocessor_config.json").read_bytes() == (dense / "preprocessor_config.json").read_bytes()
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained(dense).get_vocab()
    # The card is not that of the dense model.
    for name in set(NOT_CARRIED) - {"README.md"}:
        assert not (folder / name).exists(), name
    assert not list(folder.glob(".*"))


def cached(dense: Path, cache: Path, name: str, place: str = "") -> None:
    """Lay out the Hub's cache as if a repo had been downloaded."""
    commit = "0123456789abcdef" * 2 + "01234567"
    repo = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(dense, repo / "snapshots" / commit / place)
    put(repo, {"refs/main": commit})


def by_folder(dense: Path, home: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path=dense)


def by_relative_folder(dense: Path, home: Path) -> PreTrainedModel:
    here = Path.cwd()
    os.chdir(dense.parent)
    try:
        return AutoModelForCausalLM.from_pretrained("dense")
    finally:
        os.chdir(here)


def by_subfolder(dense: Path, home: Path) -> PreTrainedModel:
    shutil.copytree(dense, home / "repo" / "inner")
    tiny_models.saved(tiny_models.llama(num_hidden_layers=1), home / "repo")
    model = transformers.LlamaForCausalLM.from_pretrained(home / "repo", subfolder="inner")
    AutoModelForCausalLM.from_pretrained(home / "repo")  # another model of the same source
    return model


def by_cache(dense: Path, home: Path) -> PreTrainedModel:
    cached(dense, Path(constants.HF_HUB_CACHE), "owner/dense")
    return AutoModelForCausalLM.from_pretrained("owner/dense", revision="main")


def by_own_cache_and_subfolder(dense: Path, home: Path) -> PreTrainedModel:
    cached(dense, home / "own", "owner/nested", "inner")
    return AutoModelForCausalLM.from_pretrained("owner/nested", cache_dir=home / "own", subfolder="inner")


ROUTES: dict[str, Callable[[Path, Path], PreTrainedModel]] = {
    "folder": by_folder,
    "relative folder": by_relative_folder,
    "subfolder": by_subfolder,
    "cache of the Hub": by_cache,
    "own cache, subfolder": by_own_cache_and_subfolder,
}


@pytest.mark.parametrize("route", ROUTES)
def test_what_lies_beside_the_dense_weights_is_carried_over(
    route: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By every way of opening the model, and by every later save of what was saved."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = compressed(ROUTES[route](dense, tmp_path))
    model.save_pretrained(tmp_path / "first")
    assert_carried(tmp_path / "first", dense)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    assert digests(tmp_path / "second") == digests(tmp_path / "second")
    assert_carried(tmp_path / "second", dense)


def test_the_commands_carry_it_over(dense: Path, checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(tiny_models.text(40)))
    quick = ["--samples", "2", "--sequence-length", "16"]
    commands = {
        "in memory": ["compress", dense, "--method", "magnitude", "--ratio", "0.4", *quick],
        "from disk": ["compress", dense, "--method", "wanda", "--ratio", "0.4", "--calibration", text, *quick],
        "dense": ["dense", checkpoint],
        "distilled": [
            *("distill", checkpoint, "--teacher", dense, "--text", text, "--steps", "1", "--sequence-length", "16")
        ],
    }
    for name, command in commands.items():
        result = CliRunner().invoke(app, [*map(str, command), "-o", str(tmp_path / name)])
        assert result.exit_code == 0, result.output
        assert "saved in float32" not in result.output
        assert_carried(tmp_path / name, dense)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dense").config.model_type == "llama"
    assert not list((tmp_path / "dense").glob("*.py"))


def test_the_names_of_all_vocabularies_of_transformers_are_carried() -> None:
    """Whatever a tokenizer calls its files, and no weights, whatever they are called."""
    names = set()
    for kind in transformers.models.auto.tokenization_auto.TOKENIZER_MAPPING_NAMES.values():
        cls = getattr(transformers, kind or "", None)
        if inspect.isclass(cls) and issubclass(cls, PreTrainedTokenizerBase):
            names |= {name for name in (cls.vocab_files_names or {}).values() if name}
    names.discard("tokenizer_config.json")
    assert len(names) > 15
    assert [name for name in names if not matches(name, VOCABULARY)] == []
    weights = ["model.safetensors", "vocab.bin", "model.onnx", "tokenizer.gguf", ".vocab.json", "onnx/vocab.json"]
    assert [name for name in weights if matches(name, CARRIED)] == []


CHANGES: dict[str, Callable[[Any], None]] = {
    "tokens": lambda tokenizer: tokenizer.add_tokens(["<a>", "<b>"]),
    "template": lambda tokenizer: setattr(tokenizer, "chat_template", "{{ 'mine' }}"),
    "no template": lambda tokenizer: setattr(tokenizer, "chat_template", None),
    "padding": lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "<pad>"}),
}


def signature(tokenizer: Any) -> tuple[Any, ...]:
    return (tokenizer.get_vocab(), tokenizer.chat_template, tokenizer.pad_token, tokenizer.padding_side)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("order", ["tokenizer first", "model first", "both twice"])
def test_a_tokenizer_that_the_user_has_saved_stays(change: str, order: str, checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    CHANGES[change](tokenizer)
    saves = [tokenizer.save_pretrained, model.save_pretrained]
    if order == "model first":
        saves.reverse()
    for save in saves * (2 if order == "both twice" else 1):
        save(tmp_path / "new")
    if order == "model first":  # a tokenizer that is saved later replaces files, and removes none
        tokenizer.chat_template = AutoTokenizer.from_pretrained(tmp_path / "new").chat_template
    assert signature(AutoTokenizer.from_pretrained(tmp_path / "new")) == signature(tokenizer)
    model.save_pretrained(tmp_path / "new")
    assert signature(AutoTokenizer.from_pretrained(tmp_path / "new")) == signature(tokenizer)


def test_every_file_that_the_user_has_put_there_stays(checkpoint: Path, tmp_path: Path) -> None:
    """Whatever its name, by the first save, a second, and one that `Trainer` makes."""
    mine = {name: f"mine: {name}" for name in [*TEXTS, ".gitattributes", "README.md", "notes.txt", "adapter/x.bin"]}
    mine |= {"tokenizer_config.json": '{"mine": 1}', "tokenizer.json": "{}", "generation_config.json": '{"top_k": 7}'}
    put(tmp_path, mine)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    arguments = TrainingArguments(str(tmp_path / "trainer"), report_to=[], use_cpu=True)
    for save in (model.save_pretrained, model.save_pretrained, Trainer(model, arguments).save_model):
        save(tmp_path)
        assert {name: (tmp_path / name).read_text() for name in mine} == mine
    assert (tmp_path / "preprocessor_config.json").exists() is False  # a processor of the user's is not mixed
    put(tmp_path, {"generation_config.json": '{"top_k": 7, "max_length": 64}'})
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.top_k == 7


def test_parts_of_the_users_are_completed_by_the_origins(checkpoint: Path, tmp_path: Path) -> None:
    put(tmp_path, {"chat_template.jinja": "{{ 'by hand' }}"})
    WhisperFeatureExtractor(feature_size=8).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(checkpoint).get_vocab()
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ 'by hand' }}"
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["feature_size"] == 8
    assert (tmp_path / "processor_config.json").is_file()


def test_a_generation_config_of_the_model_is_saved_unless_the_user_has_put_one_there(
    checkpoint: Path, tmp_path: Path
) -> None:
    def stored() -> int:
        return GenerationConfig.from_pretrained(tmp_path).max_new_tokens

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    for number in (3, 4):  # an earlier save's file is replaced
        model.generation_config.max_new_tokens = number
        model.save_pretrained(tmp_path)
        assert stored() == number
    GenerationConfig(max_new_tokens=5).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert stored() == 5
    again = AutoModelForCausalLM.from_pretrained(tmp_path)  # whose own config it is now
    again.generation_config.max_new_tokens = 6
    again.save_pretrained(tmp_path)
    assert stored() == 6


def test_another_model_in_the_same_folder_leaves_nothing_of_the_first(
    dense: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Neither shards nor their index, neither tokenizer nor card; in either order of one file and many."""
    other = tiny_models.llama(seed=1, num_hidden_layers=2)
    other.save_pretrained(tmp_path / "other")
    for shards in ("50GB", "10KB"):
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        model.save_pretrained(tmp_path / "shared", max_shard_size=shards)
        second = compressed(AutoModelForCausalLM.from_pretrained(tmp_path / "other"))
        opposite = "10KB" if shards == "50GB" else "50GB"
        second.save_pretrained(tmp_path / "shared", max_shard_size=opposite)
        second.save_pretrained(tmp_path / "alone" / "shared", max_shard_size=opposite)
        assert digests(tmp_path / "shared") == digests(tmp_path / "alone" / "shared")
        assert not (tmp_path / "shared" / "tokenizer.json").exists()
        shutil.rmtree(tmp_path / "alone")
        shutil.rmtree(tmp_path / "shared")


def test_saving_to_where_the_model_came_from_changes_nothing_beside_it(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    before = digests(folder)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)
    assert digests(folder) == {**before, "README.md": digests(folder)["README.md"]}
    # Nor does a compressed model in the place of the dense one, but a tokenizer that was given is newer.
    dense = tiny_models.saved(tiny_models.llama(num_hidden_layers=1), tmp_path / "dense")
    put(dense, {"LICENSE": "terms", "README.md": "about the dense model"})
    tokenizer = AutoTokenizer.from_pretrained(dense)
    model = compressed(AutoModelForCausalLM.from_pretrained(dense), tokenizer)
    tokenizer.chat_template = "{{ 'newer' }}"
    model.save_pretrained(dense)
    assert (dense / "LICENSE").read_text() == "terms"
    assert AutoTokenizer.from_pretrained(dense).chat_template == "{{ 'newer' }}"
    assert AutoModelForCausalLM.from_pretrained(dense).is_quantized


def test_custom_code_of_a_tokenizer_is_carried_as_far_as_it_is_named(dense: Path, tmp_path: Path) -> None:
    shutil.copytree(dense, tmp_path / "dense")
    entries = {"AutoTokenizer": ["tokenization_mine.Mine", None], "AutoProcessor": "other/repo--processing.Theirs"}
    put(
        tmp_path / "dense",
        {
            "tokenizer_config.json": json.dumps({"auto_map": entries, "name_or_path": str(tmp_path / "dense")}),
            "tokenization_mine.py": "from .mine_parts import part\nfrom .modeling_hf_lowrank import stolen\n",
            "mine_parts.py": "part = 1",
            "modeling_hf_lowrank.py": "stolen = 1",
            "processing.py": "",
            "unrelated.py": "",
        },
    )
    compressed(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")).save_pretrained(tmp_path / "new")
    new = tmp_path / "new"
    assert (new / "tokenization_mine.py").is_file() and (new / "mine_parts.py").is_file()
    assert not (new / "unrelated.py").exists() and not (new / "processing.py").exists()
    assert "stolen" not in (new / "modeling_hf_lowrank.py").read_text()
    assert json.loads((new / "tokenizer_config.json").read_text())["name_or_path"] == "dense"


def test_a_card_is_replaced_only_if_nobody_has_changed_it(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(folder)
    card = folder / "README.md"
    assert is_own_card(card.read_text())
    # The runtime alone brings the card along, and marks none as its own that is not.
    monkeypatch.setattr(CompleteSave, "publisher", None)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "README.md").read_text() == card.read_text()
    monkeypatch.undo()
    model.to(torch.bfloat16).save_pretrained(folder)
    assert is_own_card(card.read_text())
    card.write_text(card.read_text().replace("# model", "# My model"))
    changed = card.read_text()
    model.save_pretrained(folder)
    assert card.read_text() == changed and not is_own_card(changed)


def test_a_model_whose_folder_is_gone_is_saved_with_a_warning(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(checkpoint, tmp_path / "gone")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    model.save_pretrained(tmp_path / "new")
    assert any("is gone" in record.message for record in caplog.records)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "new").is_quantized
