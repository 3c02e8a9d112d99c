"""Compressed models on the Hub are complete and open on both routes. Their cards say what was measured and no more."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowrank import CheckpointError, CompressionConfig, compress
from hf_lowrank.checkpoints.inspect import inspect
from hf_lowrank.publishing.hub import announcement, check_complete
from hf_lowrank.publishing.measurements import text_quality
from hf_lowrank.publishing.model_card import make_card, model_card, read_config, record, write_model_card
from hf_lowrank.runtime.checksums import LOADING_CODE
from hf_lowrank.runtime.reports import REPORT_FILE
from tests.support import tiny_models
from tests.support.hub_card import check_card
from tests.support.hub_server import READ_TOKEN, WRITE_TOKEN, Fault, HubServer
from tests.support.hub_storage import Repository

QUALITY = {
    "metric": "perplexity",
    "dataset": "WikiText-2",
    "dataset_id": "Salesforce/wikitext",
    "split": "test",
    "settings": "256 | tokens",
}
SPEED = {"what": "decode, batch 1", "device": "a | CPU", "unit": "tokens/s", "dense": 101.25, "compressed": 202.5}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed checkpoint in shards, beside a file with the logits that it must give."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    compress(
        model,
        CompressionConfig(method="slab", ratio=0.5),
        calibration=[torch.randint(64, (32,)).tolist() for _ in range(4)],
        progress=False,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-slab"
    model.save_pretrained(folder, max_shard_size="40KB")
    torch.save(model.eval()(torch.arange(16)[None]).logits, folder.parent / "logits.pt")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / saved.name))


def saved_bytes(report: dict) -> int:
    """Return the number of bytes that the compression saved."""
    return sum(layer["dense_bits"] - layer["stored_bits"] for layer in report["layers"]) // 8


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as server:
        yield server


PUSH = """
import sys
from pathlib import Path
from huggingface_hub.errors import HfHubHTTPError
from hf_lowrank.publishing.hub import push_folder
folder = Path(sys.argv[1])
try:
    push_folder(folder, "tester/tiny-slab", private=True)
    raise SystemExit("the first push was to fail")
except HfHubHTTPError:
    first = push_folder(folder, "tester/tiny-slab", private=True).oid
(folder / "README.md").write_text((folder / "README.md").read_text() + "\\nWritten by hand.\\n")
push_folder(folder, "tester/tiny-slab")
print(first)
"""
LOAD = """
import sys
if sys.argv[1] == "remote code":
    sys.modules["hf_lowrank"] = None  # as if it were not installed
else:
    import hf_lowrank
import torch
from transformers import AutoModelForCausalLM
expected = torch.load(sys.argv[2])
trust = sys.argv[1] == "remote code"
for options in ({}, {"revision": sys.argv[3]}, {"revision": sys.argv[3], "local_files_only": True}):
    model = AutoModelForCausalLM.from_pretrained("tester/tiny-slab", trust_remote_code=trust, **options)
    print(type(model).__name__, torch.equal(model(torch.arange(16)[None]).logits, expected))
"""


def test_a_pushed_model_opens_on_both_routes(hub, folder, saved, tmp_path):
    """One process pushes, after a push that failed at the commit. Others load with clean caches."""
    # The weights are uploaded before the commit fails, and the second push must not depend on what was left.
    hub.faults.append(Fault("POST", "/commit/main", 403))
    commit = hub.client(PUSH, folder, home=tmp_path / "a", token=WRITE_TOKEN)
    for route in ("plugin", "remote code"):  # each has a cache of its own
        loaded = hub.client(LOAD, route, saved.parent / "logits.pt", commit, home=tmp_path / route, token=READ_TOKEN)
        assert loaded.splitlines() == ["LlamaForCausalLM True"] * 3
    read = "from huggingface_hub import ModelCard; print(ModelCard.load('tester/tiny-slab').text)"
    card = hub.client(read, home=tmp_path / "b", token=READ_TOKEN)
    assert 'from_pretrained("tester/tiny-slab"' in card
    assert "Written by hand." in card


PUSH_MODEL = """
import sys, tempfile
if sys.argv[1] == "remote code":
    sys.modules["hf_lowrank"] = None
else:
    import hf_lowrank
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=sys.argv[1] == "remote code")
model.push_to_hub(sys.argv[3], tags=["mine"], max_shard_size="40KB")
with tempfile.TemporaryDirectory() as local:
    model.save_pretrained(local, push_to_hub=True, repo_id=sys.argv[3])
"""


def test_a_model_pushes_itself_complete(hub, folder, tmp_path):
    """All files arrive by `model.push_to_hub` and by a save that pushes, with the plugin and with remote code alone.

    The plugin also pushes the card and deletes old shards. That much of a push needs the package.
    """
    hub.client(PUSH_MODEL, "plugin", folder, "tester/first", home=tmp_path / "a", token=WRITE_TOKEN)
    hub.client(PUSH_MODEL, "remote code", "tester/first", "tester/second", home=tmp_path / "b", token=WRITE_TOKEN)
    expected = {
        LOADING_CODE,
        "README.md",
        REPORT_FILE,
        "config.json",
        "generation_config.json",
        "model.safetensors",
        ".gitattributes",
    }
    first, second = (Repository(hub.root / name).read_commit("main") for name in ("tester/first", "tester/second"))
    assert first is not None and set(first.files) == expected
    assert second is not None and set(second.files) >= expected
    for name, commit in (("tester/first", first), ("tester/second", second)):
        # The checksums come last into the files on disk, so what was pushed was finished.
        config = json.loads(Repository(hub.root / name).content_path(commit.files["config.json"]).read_text())
        assert "model.safetensors" in config["quantization_config"]["checksums"]
    card = ModelCard.load(Repository(hub.root / "tester/first").content_path(first.files["README.md"]))
    assert {"hf_lowrank", "slab"} <= set(card.data.tags)
    assert "| removed |" in card.text


PUSH_COMMAND = """
import sys
from hf_lowrank.cli import app
app([*sys.argv[1:], "--private"], standalone_mode=False)
app(sys.argv[1:])  # the repo is there now
"""


def test_a_push_says_what_it_uploads_before_it_does(hub, folder, tmp_path):
    """Number, size, repo and visibility; the names of all files; and those that it leaves out."""
    left_out = [
        *(".env", ".cache/huggingface/token", "checkpoint-5/model.safetensors", "training_args.bin", "token"),
        *("optimizer.pt", "runs/events.out.tfevents.1.host", "__pycache__/x.pyc", "id_rsa", "[x].log"),
    ]
    kept = {"extra/notes.txt": "mine", "LICENSE": "terms", ".gitattributes": ""}
    kept["plan.md"] = f"see {folder.parent}/plan"
    for name, text in {**dict.fromkeys(left_out, "secret"), **kept}.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text)
    said = hub.client(
        PUSH_COMMAND, "push", folder, "tester/said", home=tmp_path / "home", token=WRITE_TOKEN
    ).splitlines()
    commit = Repository(hub.root / "tester/said").read_commit("main")
    assert commit is not None and commit.files.keys() & left_out == set()
    assert set(kept) <= set(commit.files)
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} - set(left_out)
    shown = {".env", ".cache/", "checkpoint-5/", "training_args.bin", "token", "optimizer.pt", "runs/"}
    half = len(said) // 2
    for lines in (said[:half], said[half:]):
        assert lines[0].startswith(f"pushing {len(files)} files, ")
        assert "to tester/said (private): " in lines[0]
        assert set(lines[0].partition("): ")[2].split(", ")) == files == commit.files.keys()
        assert set(lines[1].removeprefix("left out: ").split(", ")) == shown | {"__pycache__/", "id_rsa", "[x].log"}
        assert lines[-1].startswith("pushed ")
    assert announcement(folder, "repo", left_out)[-1].startswith("warning: plan.md names a folder")


KEEP = """
import sys
import hf_lowrank
from transformers import AutoModelForCausalLM, AutoTokenizer
from huggingface_hub import ModelCard
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model.push_to_hub("tester/kept")
tokenizer.add_tokens(["<mine>"])
tokenizer.push_to_hub("tester/kept")
card = ModelCard.load("tester/kept")
card.text += "by hand"
card.push_to_hub("tester/kept")
model.generation_config.max_new_tokens = 7
model.push_to_hub("tester/kept")
"""


def test_what_the_user_has_put_into_the_repo_stays(hub, folder, tmp_path):
    """A tokenizer and a card that were pushed before the model, but not what the model's own push has put there."""
    tiny_models.tokenizer().save_pretrained(folder)
    hub.client(KEEP, folder, home=tmp_path / "home", token=WRITE_TOKEN)
    repository = Repository(hub.root / "tester/kept")
    commit = repository.read_commit("main")
    assert commit is not None

    def content(name: str) -> str:
        return repository.content_path(commit.files[name]).read_text()

    assert "<mine>" in content("tokenizer.json") and "by hand" in content("README.md")
    assert json.loads(content("generation_config.json"))["max_new_tokens"] == 7


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / LOADING_CODE).unlink(), f"{LOADING_CODE}: missing"),
        (lambda folder: next(folder.glob("*.safetensors")).unlink(), "(safetensors: missing|holds neither)"),
        (lambda folder: next(folder.glob("*.safetensors")).write_bytes(b"\x10"), "not a safetensors file"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "the model is dense"),
    ],
    ids=["no loading code", "no shard", "truncated shard", "no config", "dense"],
)
def test_an_incomplete_checkpoint_is_not_pushed(folder, damage, message):
    check_complete(folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        check_complete(folder)


def test_the_hub_accepts_the_card(folder):
    record(
        folder,
        quality=[{**QUALITY, "dense": 58.88, "compressed": 61.5}],
        speed=[SPEED],
        command="hf-lowrank compress ...",
        license="mit",
    )
    card = ModelCard.load(folder / "README.md")
    assert check_card(str(card)) == ([], [])
    assert {"hf_lowrank", "slab", "sparse", "binary"} <= set(card.data.tags)
    assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == (
        "transformers",
        "text-generation",
        "mit",
    )
    [result] = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type, result.dataset_split) == (
        "perplexity",
        61.5,
        "Salesforce/wikitext",
        "test",
    )


def test_each_measurement_keeps_its_text(folder):
    """The model index groups results by data set, and two local texts are two data sets."""
    texts = {"a.txt": 10.0, "b.txt": 20.0}
    rows = [{"metric": "perplexity", "dataset": text, "compressed": value} for text, value in texts.items()]
    record(folder, quality=rows)
    results = ModelCard.load(folder / "README.md").data.eval_results
    assert {result.dataset_name: result.metric_value for result in results} == texts


def test_what_was_measured_is_in_the_card_and_nothing_else(folder):
    bare = make_card(folder)
    assert bare.text.count("Not measured.") == 2
    assert bare.data.eval_results is None

    record(folder, quality=[{**QUALITY, "dense": 58.88, "compressed": 61.5}])
    record(folder, speed=[SPEED], command="hf-lowrank compress BASE --method slab")
    text = (folder / "README.md").read_text()
    assert "Not measured." not in text
    for fact in (
        "58.88 | 61.5 | +2.62",
        "256 \\| tokens",
        "101.2 tokens/s | 202.5 tokens/s",
        "hf-lowrank compress BASE --method slab",
    ):
        assert fact in text
    report = json.loads((folder / REPORT_FILE).read_text())
    assert report["method"] == "slab"  # what the compression reported is still there


def test_an_evaluation_becomes_rows_of_the_card(folder):
    """The rows are the perplexity of both models and the figures that compare them.

    A data set of the Hub is named by its id, and a file by its name without folders.
    """
    figures = {
        "windows": 3,
        "window": 8,
        "stride": 8,
        "perplexity": 4.0,
        "reference_nll": 1.0,
        "kl": 0.5,
        "top1_agreement": 0.75,
    }
    rows = []
    for text in ("wikitext2", "/home/me/private/text.txt"):
        rows += text_quality({**figures, "text": text})
    record(folder, quality=rows)
    card = ModelCard.load(folder / "README.md")
    results = [(result.dataset_type, result.metric_type, result.metric_value) for result in card.data.eval_results]
    assert results == [
        ("Salesforce/wikitext", "perplexity", 4.0),
        ("Salesforce/wikitext", "kl_divergence", 0.5),
        ("Salesforce/wikitext", "top1_agreement", 0.75),
        ("custom", "perplexity", 4.0),
        ("custom", "kl_divergence", 0.5),
        ("custom", "top1_agreement", 0.75),
    ]
    assert "| text.txt, 3 windows of 8 tokens | 2.718 | 4 | +1.28" in card.text
    assert "private" not in str(card)


def test_the_card_says_what_the_files_hold(folder):
    """Sizes are counted from the weight files, whatever the report of the compression claims."""
    tensors = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    report = json.loads((folder / REPORT_FILE).read_text())
    reached = f"{report['ratio_stored']:.2%}"
    record(folder, ratio_stored=0.99)
    text = (folder / "README.md").read_text()
    assert f"| removed | {reached} (" in text
    assert "99.00%" not in text
    assert f"| whole model | {(tensors + saved_bytes(report)) / 1e3:.2f} kB | {tensors / 1e3:.2f} kB |" in text


@pytest.mark.parametrize(
    ("base", "linked"),
    [("me/base", True), ("/home/me/private/base", False), ("tests/support", False), ("base", False), ("", False)],
    ids=["on the Hub", "path", "path that looks like an id", "name", "unknown"],
)
def test_only_a_base_model_on_the_hub_is_linked(folder, base, linked):
    config = read_config(folder)
    config["quantization_config"]["provenance"]["base_model"] = base
    card = model_card(config, asdict(inspect(folder)), {}, "name")
    expected = (base, "quantized") if linked else (None, None)
    assert (card.data.base_model, card.data.get("base_model_relation")) == expected
    assert (f"https://huggingface.co/{base}" in card.text) == linked
    assert "/home/me" not in str(card)


def test_the_same_folder_gives_the_same_card(folder):
    assert str(make_card(folder)) == str(write_model_card(folder)) == str(ModelCard.load(folder / "README.md"))
