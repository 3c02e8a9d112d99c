"""The loopback Hub serves huggingface_hub's own client: what is pushed comes back whole, and only to whom it may."""

import hashlib
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.hub_server import OTHER_TOKEN, READ_TOKEN, WRITE_TOKEN, Fault, HubServer
from tests.support.hub_storage import Repository

PART_SIZE = 300_000
"""Number of bytes of a part of an upload, so that the weights of `folder` need several."""
PUSH = """
import sys
from huggingface_hub import create_repo, upload_folder
create_repo(sys.argv[1], exist_ok=True, private=len(sys.argv) > 3)
print(upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2], commit_message="push").oid)
"""
PULL = """
import sys
from huggingface_hub import snapshot_download
print(snapshot_download(sys.argv[1], revision=sys.argv[2], local_files_only=len(sys.argv) > 3))
"""
TRY = """
import json, sys
from huggingface_hub import HfApi
api = HfApi()
outcomes = []
for statement in sys.argv[1:]:
    try:
        exec(statement)
        outcomes.append("done")
    except Exception as error:
        outcomes.append(f"{type(error).__name__}: {error}")
print(json.dumps(outcomes))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub", part_size=PART_SIZE) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with small texts, an empty file, a folder in a folder, and LFS files of one part and of several."""
    contents = {
        "README.md": b"---\nlibrary_name: transformers\n---\n# A model\n",
        "config.json": b"{}",
        "empty.txt": b"",
        "code/deep/file.py": "x = 'é'\n".encode(),
        "tokenizer.model": bytes(range(256)),
        "model.safetensors": b"weights " * 100_000,
    }
    for name, content in contents.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "folder"


@pytest.fixture
def home(tmp_path: Path) -> Callable[[str], Path]:
    """Returns a client's cache by its name. A new name is a clean cache."""
    return lambda name: tmp_path / "homes" / name


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder and below it, except the `.gitattributes` that the Hub adds."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files.pop(".gitattributes", None)
    return files


def stored(hub: HubServer) -> dict[str, bytes]:
    """Return the files of tester/model as they lie on the server, except the `.gitattributes` that the Hub adds."""
    repository = Repository(hub.root / "tester/model")
    commit = repository.read_commit("main")
    assert commit is not None
    files = {name: repository.content_path(file).read_bytes() for name, file in commit.files.items()}
    files.pop(".gitattributes", None)
    return files


def outcomes(hub: HubServer, *statements: str, home: Path, token: str | None = None) -> list[str]:
    """Run statements in one client, and return for each the name of the exception that it raises, or "done"."""
    messages = json.loads(hub.client(TRY, *statements, home=home, token=token))
    return [message.split(":")[0] for message in messages]


def upload_bytes(hub: HubServer) -> int:
    return sum(exchange.received for exchange in hub.served("PUT", "^/lfs/"))


def test_what_is_pushed_comes_back(hub, folder, home):
    commit = hub.client(PUSH, "tester/model", folder, home=home("a"), token=WRITE_TOKEN)
    snapshot = Path(hub.client(PULL, "tester/model", "main", home=home("b")))

    assert contents(snapshot) == contents(folder)
    assert snapshot.name == commit
    sizes = sorted(exchange.received for exchange in hub.served("PUT", "^/lfs/"))
    assert sizes == [256, 200_000, PART_SIZE, PART_SIZE]  # one part for the small binary file, three for the weights
    # The client also asks for a list that this Hub does not have.
    assert {exchange.status for exchange in hub.exchanges if "agent-harnesses" not in exchange.path} == {200}

    download = """
import sys
from huggingface_hub import hf_hub_download
print(hf_hub_download("tester/model", sys.argv[1], revision=sys.argv[2]))
"""
    for name in ("model.safetensors", "code/deep/file.py"):
        assert Path(hub.client(download, name, commit, home=home(name))).read_bytes() == (folder / name).read_bytes()


def test_an_unchanged_folder_makes_no_commit(hub, folder, home):
    first = hub.client(PUSH, "tester/model", folder, home=home("a"), token=WRITE_TOKEN)
    sent = upload_bytes(hub)
    assert hub.client(PUSH, "tester/model", folder, home=home("a"), token=WRITE_TOKEN) == first
    assert upload_bytes(hub) == sent


def test_each_revision_keeps_its_own_files(hub, folder, home):
    """Commits, branches and tags stay what they were when later commits change and delete files."""
    first = hub.client(PUSH, "tester/model", folder, home=home("a"), token=WRITE_TOKEN)
    old = contents(folder)
    name_commits = """
from huggingface_hub import HfApi
HfApi().create_tag("tester/model", tag="v1")
HfApi().create_branch("tester/model", branch="stable")
"""
    hub.client(name_commits, home=home("a"), token=WRITE_TOKEN)
    change = """
import json
from huggingface_hub import CommitOperationAdd as Add, CommitOperationDelete as Delete, HfApi
api = HfApi()
operations = [Add("config.json", b"[1]"), Delete("code/", is_folder=True), Delete("empty.txt")]
api.create_commit("tester/model", operations, commit_message="change", commit_description="why")
titles = [commit.title for commit in api.list_repo_commits("tester/model")]
refs = api.list_repo_refs("tester/model")
print(json.dumps([titles, {ref.name: ref.target_commit for ref in refs.branches + refs.tags}]))
"""
    titles, refs = json.loads(hub.client(change, home=home("a"), token=WRITE_TOKEN))

    assert titles == ["change", "push", "initial commit"]
    assert refs.keys() == {"main", "stable", "v1"}
    assert refs["stable"] == refs["v1"] == first != refs["main"]
    pull = """
import sys
from huggingface_hub import snapshot_download
for revision in sys.argv[1:]:
    print(snapshot_download("tester/model", revision=revision))
"""
    snapshots = hub.client(pull, first, "v1", "stable", "main", first[:8], home=home("b")).split()
    new = old | {"config.json": b"[1]"}
    del new["empty.txt"], new["code/deep/file.py"]
    assert [contents(Path(snapshot)) for snapshot in snapshots] == [old, old, old, new, old]


def test_what_is_missing_is_named(hub, home):
    Repository.create(hub.root / "tester/model", private=False, author="tester")
    missing = [
        "api.snapshot_download('tester/model', revision='v2')",
        "api.hf_hub_download('tester/model', 'x')",
        "api.model_info('tester/x')",
    ]
    expected = ["RevisionNotFoundError", "RemoteEntryNotFoundError", "RepositoryNotFoundError"]
    assert outcomes(hub, *missing, home=home("a")) == expected


def test_a_downloaded_model_needs_no_server(tmp_path, folder, home):
    with HubServer(tmp_path / "hub") as hub:
        hub.client(PUSH, "tester/model", folder, home=home("a"), token=WRITE_TOKEN)
        snapshot = hub.client(PULL, "tester/model", "main", home=home("b"))
    assert hub.client(PULL, "tester/model", "main", "local_files_only", home=home("b")) == snapshot
    assert outcomes(hub, "api.snapshot_download('tester/model')", home=home("c")) == ["LocalEntryNotFoundError"]

    with HubServer(tmp_path / "hub") as restarted:  # the repositories outlive the server
        assert contents(Path(restarted.client(PULL, "tester/model", "main", home=home("d")))) == contents(folder)


def test_a_private_repo_is_for_its_owner(hub, home):
    """Every token may do its own part of three things: read a public repo, read a private one, and write to that.

    Whoever may not see a repo cannot tell it from a missing one.
    """
    Repository.create(hub.root / "tester/open", private=False, author="tester")
    Repository.create(hub.root / "tester/closed", private=True, author="tester")
    write = "HfApi(token={!r}).upload_file(path_or_fileobj=b'x', path_in_repo='x', repo_id='tester/{}')".format
    read = "HfApi(token={!r}).model_info('tester/{}')".format
    expected = {
        WRITE_TOKEN: ["done", "done", "done"],
        READ_TOKEN: ["done", "done", "HfHubHTTPError"],
        OTHER_TOKEN: ["done", "RepositoryNotFoundError", "RepositoryNotFoundError"],
        False: ["done", "RepositoryNotFoundError", "RepositoryNotFoundError"],
        "hf_wrong": ["HfHubHTTPError", "HfHubHTTPError", "HfHubHTTPError"],
    }
    statements = []
    for token in expected:
        statements += [read(token, "open"), read(token, "closed"), write(token, "closed")]
    results = outcomes(hub, *statements, home=home("a"))
    for number, (token, of_token) in enumerate(expected.items()):
        assert results[3 * number : 3 * number + 3] == of_token, token
    for token in (OTHER_TOKEN, False):
        hidden, missing = json.loads(hub.client(TRY, write(token, "closed"), write(token, "missing"), home=home("a")))
        assert hidden.replace("closed", "missing") == missing


def test_a_broken_download_goes_on_where_it_broke(tmp_path, home):
    """The client writes to its file in pieces of 10 MiB, so it goes on at the last of them."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/model.safetensors").write_bytes(b"weights " * 1_500_000)
    with HubServer(tmp_path / "hub") as hub:
        hub.client(PUSH, "tester/model", tmp_path / "folder", home=home("a"), token=WRITE_TOKEN)
        hub.faults.append(Fault("GET", "resolve/.*/model.safetensors", after=11_000_000))
        snapshot = Path(hub.client(PULL, "tester/model", "main", home=home("b")))
        assert contents(snapshot) == contents(tmp_path / "folder")
        assert [exchange.range for exchange in hub.served("GET", "model.safetensors")] == [
            None,
            f"bytes={10 * 2**20}-",
        ]


def test_a_broken_upload_is_sent_again(hub, folder, home):
    """After a cut connection, the client repeats the part that broke, and the file is whole."""
    hub.faults.append(Fault("PUT", "^/lfs/.*/2", after=1_000))
    hub.client(PUSH, "tester/model", folder, home=home("a"), token=WRITE_TOKEN)
    assert hub.faults[0].reached.is_set()
    assert stored(hub) == contents(folder)


@pytest.mark.parametrize(
    ("method", "path"), [("PUT", "^/lfs/.*/2"), ("POST", "/commit/main")], ids=["upload", "commit"]
)
def test_a_killed_push_leaves_nothing_half_done(hub, folder, home, method, path):
    """A client that dies in the middle has committed nothing. The next push completes the repo."""
    fault = Fault(method, path, "stall", after=300)
    hub.faults.append(fault)
    command = [sys.executable, "-c", PUSH, "tester/model", str(folder)]
    client = subprocess.Popen(command, env=hub.environment(home("a"), WRITE_TOKEN), stdout=subprocess.DEVNULL)
    assert fault.reached.wait(timeout=60)  # the client is in the middle of its request now
    client.kill()
    client.wait()
    assert stored(hub) == {}

    hub.client(PUSH, "tester/model", folder, home=home("a"), token=WRITE_TOKEN)
    assert stored(hub) == contents(folder)


@pytest.mark.parametrize("action", ["drop", "lose answer", 403])
def test_a_push_that_fails_at_the_commit_does_not_send_the_weights_again(hub, folder, home, action):
    hub.faults.append(Fault("POST", "/commit/main", action))
    with pytest.raises(AssertionError, match=r"HfHubHTTPError|RemoteProtocolError|ReadError"):
        hub.client(PUSH, "tester/model", folder, home=home("a"), token=WRITE_TOKEN)
    sent = upload_bytes(hub)
    hub.client(PUSH, "tester/model", folder, home=home("a"), token=WRITE_TOKEN)

    assert upload_bytes(hub) == sent
    assert stored(hub) == contents(folder)
    assert [commit.title for commit in Repository(hub.root / "tester/model").history("main")] == [
        "push",
        "initial commit",
    ]


def test_content_that_is_not_what_was_announced_is_refused(hub):
    Repository.create(hub.root / "tester/model", private=False, author="tester")
    announced, sent = b"good weights", b"evil weights"
    batch = {"objects": [{"oid": hashlib.sha256(announced).hexdigest(), "size": len(announced)}]}

    def ask(method: str, url: str, body: bytes) -> dict:
        request = urllib.request.Request(
            url, data=body, method=method, headers={"Authorization": f"Bearer {WRITE_TOKEN}"}
        )
        # Without proxies, as the environment of the tests may name some.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            return json.load(answer)

    def upload_url() -> str:
        answer = ask("POST", f"{hub.url}/tester/model.git/info/lfs/objects/batch", json.dumps(batch).encode())
        return answer["objects"][0]["actions"]["upload"]["href"]

    with pytest.raises(urllib.error.HTTPError, match="400"):
        ask("PUT", upload_url(), sent)
    ask("PUT", upload_url(), announced)
    with pytest.raises(KeyError, match="actions"):  # the content is there, so there is nothing to upload
        upload_url()


def test_a_wrong_card_is_refused_before_anything_is_sent(hub, folder, home):
    (folder / "README.md").write_text("---\nbase_model_relation: compressed\n---\n")
    with pytest.raises(AssertionError, match="base_model_relation"):
        hub.client(PUSH, "tester/model", folder, home=home("a"), token=WRITE_TOKEN)
    assert upload_bytes(hub) == 0


def test_the_card_is_indexed(hub, folder, home):
    metadata = [
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "base_model: me/base",
        "base_model_relation: quantized",
        "tags: [small]",
    ]
    (folder / "README.md").write_text("\n".join(["---", *metadata, "---", "# A model", ""]))
    hub.client(PUSH, "tester/model", folder, home=home("a"), token=WRITE_TOKEN)
    read = """
from huggingface_hub import model_info
info = model_info("tester/model")
print(info.library_name, info.pipeline_tag, *info.tags)
"""
    library, pipeline, *tags = hub.client(read, home=home("b")).split()
    assert (library, pipeline) == ("transformers", "text-generation")
    assert {"small", "base_model:me/base", "base_model:quantized:me/base"} <= set(tags)


def test_a_request_that_the_server_does_not_speak_is_refused_by_name(hub, home):
    pull_request = "api.upload_file(path_or_fileobj=b'x', path_in_repo='x', repo_id='tester/model', create_pr=True)"
    Repository.create(hub.root / "tester/model", private=False, author="tester")
    statements = [pull_request, "api.create_repo('tester/data', repo_type='dataset')"]
    messages = json.loads(hub.client(TRY, *statements, home=home("a"), token=WRITE_TOKEN))
    assert "no pull requests" in messages[0]
    assert "type 'dataset'" in messages[1]


def test_a_client_reaches_no_other_host(hub, home):
    code = "from huggingface_hub import HfApi; HfApi(endpoint='https://huggingface.co').model_info('gpt2')"
    with pytest.raises(AssertionError, match=r"ConnectError|ProxyError"):
        hub.client(code, home=home("a"))


TRANSFORMERS_PUSH = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
config = LlamaConfig(vocab_size=64, **sizes)
model = LlamaForCausalLM(config).eval()
print(model.push_to_hub("tester/llama", max_shard_size="40KB", private=True).oid)
with torch.no_grad():
    model.lm_head.weight.zero_()
model.push_to_hub("tester/llama", max_shard_size="40KB")
"""
TRANSFORMERS_PULL = """
import sys, torch
from transformers import AutoModelForCausalLM
def logits(**options):
    model = AutoModelForCausalLM.from_pretrained("tester/llama", **options)
    return model(torch.arange(8)[None]).logits
first, last = logits(revision=sys.argv[1]), logits()
again = logits(revision=sys.argv[1], local_files_only=True)
print(first.abs().max().item() > 0, last.abs().max().item() == 0, torch.equal(first, again))
"""


def test_transformers_pushes_and_loads(hub, home):
    """A private, sharded model that `push_to_hub` pushed is what `from_pretrained` loads in another process.

    It loads an older revision, then the last one, and then the older one from its cache without asking the server.
    """
    first = hub.client(TRANSFORMERS_PUSH, home=home("a"), token=WRITE_TOKEN)
    assert hub.client(TRANSFORMERS_PULL, first, home=home("b"), token=READ_TOKEN) == "True True True"
    assert len(hub.served("GET", r"resolve/.*/model-\d+-of-\d+\.safetensors")) > 2
