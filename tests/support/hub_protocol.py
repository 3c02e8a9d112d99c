"""Answers the requests about model repositories that huggingface_hub's client makes (`hub_server.py` lists them)."""

import base64
import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import yaml

from tests.support.hub_card import check_card, index_fields
from tests.support.hub_http import ConnectionCut, HttpHandler, HubError, route
from tests.support.hub_storage import Commit, Repository, StoredFile, Upload

if TYPE_CHECKING:
    from tests.support.hub_server import HubServer

WRITE_TOKEN, READ_TOKEN, OTHER_TOKEN = "hf_write_tester", "hf_read_tester", "hf_write_other"
_ACCOUNTS = {WRITE_TOKEN: ("tester", "write"), READ_TOKEN: ("tester", "read"), OTHER_TOKEN: ("other", "write")}
_LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".onnx", ".gguf", ".h5", ".npz", ".parquet")
"""Files that go through LFS whatever their size."""
_PIECE = 2**20
"""Maximum number of bytes of a file that are read at once."""


class HubHandler(HttpHandler):
    """Serves one connection of a client.

    Attributes:
        user: name of the account that asks, or None without a token.
        role: "read" or "write", what the account's token allows.
    """

    server: "HubServer"
    user: str | None
    role: str | None

    # --- who may do what

    def authenticate(self) -> None:
        self.user, self.role = None, None
        header = self.headers.get("Authorization")
        if header is not None:
            token = header.removeprefix("Bearer ")
            if token not in _ACCOUNTS:
                raise HubError(401, "Invalid credentials in Authorization header")
            self.user, self.role = _ACCOUNTS[token]

    def repository(self, namespace: str, name: str, *, write: bool = False) -> Repository:
        """Return the repository, if the caller may see it.

        A repository that the caller may not see is answered exactly like one that does not exist.
        """
        repository = Repository(self.server.root / namespace / name)
        if not repository.folder.is_dir() or (repository.settings["private"] and self.user != namespace):
            if self.user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write:
            self.require_write(namespace)
        return repository

    def require_user(self) -> str:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        return self.user

    def require_write(self, namespace: str) -> None:
        if self.require_user() != namespace or self.role != "write":
            raise HubError(
                403, f"You don't have the rights to write under the namespace {namespace!r}, or the token is read-only"
            )

    def commit_of(self, repository: Repository, revision: str) -> Commit:
        commit = repository.read_commit(revision)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # --- accounts, repositories, cards

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        user = self.require_user()
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": self.role}}
        self.answer_json({"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": token})

    @route("POST", "/api/repos/create")
    def create(self) -> None:
        request = self.read_json()
        if request.get("type", "model") != "model":
            raise HubError(501, f"the loopback Hub has no repositories of type {request['type']!r}")
        namespace = request.get("organization") or self.require_user()
        self.require_write(namespace)
        repo_id = f"{namespace}/{request['name']}"
        answer = {"url": f"{self.server.url}/{repo_id}", "name": repo_id, "id": repo_id}
        with self.server.lock:
            if (self.server.root / repo_id).exists():
                return self.answer_json(answer | {"error": "You already created this model repo"}, status=409)
            Repository.create(
                self.server.root / repo_id, private=request.get("visibility") == "private", author=namespace
            )
        self.answer_json(answer)

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        errors, warnings = check_card(self.read_json()["content"])
        status = 400 if errors else 200
        if self.headers.get("Accept") == "text/plain":
            text = "\n".join(errors + warnings).encode()
            return self.answer(iter([text]), len(text), status=status)
        answer = {
            "errors": [{"message": message} for message in errors],
            "warnings": [{"message": message} for message in warnings],
        }
        self.answer_json(answer, status=status)

    # --- reading

    @route("GET", "/api/models/{repo}(?:/revision/(?P<revision>[^/]+))?")
    def info(self, namespace: str, name: str, revision: str) -> None:
        repository = self.repository(namespace, name)
        commit = self.commit_of(repository, revision or "main")
        repo_id, settings = f"{namespace}/{name}", repository.settings
        about: dict[str, Any] = {
            "_id": repo_id,
            "id": repo_id,
            "modelId": repo_id,
            "author": namespace,
            "sha": commit.id,
        }
        about |= {"createdAt": settings["created"], "lastModified": commit.date, "private": settings["private"]}
        about |= {"gated": False, "disabled": False, "tags": []}
        siblings = []
        for path, file in commit.files.items():
            sibling: dict[str, Any] = {"rfilename": path}
            if "blobs" in self.query:
                lfs = {"size": file.size, "sha256": file.sha256, "pointerSize": file.pointer_size}
                sibling |= {"size": file.size, "blobId": file.oid, "lfs": lfs if file.sha256 else None}
            siblings.append(sibling)
        if "README.md" in commit.files:
            with contextlib.suppress(yaml.YAMLError):  # the Hub shows such a model without metadata
                about |= index_fields(repository.content_path(commit.files["README.md"]).read_text())
        self.answer_json(about | {"siblings": siblings})

    @route("GET", "/api/models/{repo}/tree/{revision}(?:/(?P<folder>.+))?")
    def tree(self, namespace: str, name: str, revision: str, folder: str) -> None:
        commit = self.commit_of(self.repository(namespace, name), revision)
        prefix = f"{folder.strip('/')}/" if folder else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries: dict[str, dict[str, Any]] = {}
        for path, file in commit.files.items():
            if path.startswith(prefix):
                *folders, _ = path.removeprefix(prefix).split("/")
                deepest = len(folders) if recursive else min(len(folders), 1)
                for depth in range(1, deepest + 1):
                    entries[prefix + "/".join(folders[:depth])] = {"type": "directory", "oid": commit.id, "size": 0}
                if recursive or not folders:
                    entries[path] = _describe(file)
        if prefix and not entries:
            raise HubError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        self.answer_json([{"path": path} | entry for path, entry in entries.items()])

    @route("POST", "/api/models/{repo}/paths-info/{revision}")
    def paths_info(self, namespace: str, name: str, revision: str) -> None:
        files = self.commit_of(self.repository(namespace, name), revision).files
        paths = parse_qs(self.read_all().decode()).get("paths", [])
        self.answer_json([{"path": path} | _describe(files[path]) for path in paths if path in files])

    @route("GET", "/api/models/{repo}/refs")
    def refs(self, namespace: str, name: str) -> None:
        refs = self.repository(namespace, name).refs
        listed: dict[str, list[dict[str, str]]] = {"converts": [], "pullRequests": []}
        for kind, plural in (("heads", "branches"), ("tags", "tags")):
            listed[plural] = []
            for ref, commit in refs[kind].items():
                listed[plural].append({"name": ref, "ref": f"refs/{kind}/{ref}", "targetCommit": commit})
        self.answer_json(listed)

    @route("GET", "/api/models/{repo}/commits/{revision}")
    def commits(self, namespace: str, name: str, revision: str) -> None:
        repository = self.repository(namespace, name)
        self.commit_of(repository, revision)
        listed = []
        for commit in repository.history(revision):
            about = {"id": commit.id, "title": commit.title, "message": commit.message, "date": commit.date}
            listed.append(about | {"authors": [{"user": commit.author}]})
        self.answer_json(listed)

    @route("GET", "/{repo}/resolve/{revision}/(?P<path>.+)")
    def resolve(self, namespace: str, name: str, revision: str, path: str) -> None:
        repository = self.repository(namespace, name)
        commit = self.commit_of(repository, revision)
        headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
        file = commit.files.get(path)
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        headers |= {"ETag": f'"{file.etag}"', "Content-Type": "application/octet-stream"}
        if file.sha256:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        start, stop, status = 0, file.size, 200
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if span:
            first, last = span.groups()  # one of them may be empty: "500-" is all but 500 bytes, "-500" the last 500
            start = int(first) if first else max(file.size - int(last), 0)
            stop = min(int(last) + 1, file.size) if first and last else file.size
            if start >= stop:
                raise HubError(
                    416, "Range not satisfiable", headers=headers | {"Content-Range": f"bytes */{file.size}"}
                )
            headers |= {"Content-Range": f"bytes {start}-{stop - 1}/{file.size}"}
            status = 206
        self.answer(_read(repository.content_path(file), start, stop), stop - start, status=status, headers=headers)

    # --- writing

    @route("POST", "/api/models/{repo}/branch/{branch}")
    def create_branch(self, namespace: str, name: str, branch: str) -> None:
        self.create_ref("heads", namespace, name, branch, self.read_json().get("startingPoint", "main"))

    @route("POST", "/api/models/{repo}/tag/{revision}")
    def create_tag(self, namespace: str, name: str, revision: str) -> None:
        self.create_ref("tags", namespace, name, self.read_json()["tag"], revision)

    def create_ref(self, kind: str, namespace: str, name: str, ref: str, revision: str) -> None:
        repository = self.repository(namespace, name, write=True)
        with self.server.lock:
            if ref in repository.refs[kind]:
                raise HubError(409, f"the reference {ref} exists already")
            repository.set_ref(kind, ref, self.commit_of(repository, revision).id)
        self.answer_json({})

    @route("POST", "/api/models/{repo}/preupload/{revision}")
    def preupload(self, namespace: str, name: str, revision: str) -> None:
        self.refuse_pull_request()
        files = self.commit_of(self.repository(namespace, name, write=True), revision).files
        answers = []
        for file in self.read_json()["files"]:
            path, sample = file["path"], base64.b64decode(file["sample"])
            # As on the Hub, weights and binary files go through LFS whatever their size.
            large = file["size"] >= self.server.lfs_size or path.endswith(_LFS_SUFFIXES) or b"\x00" in sample
            answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if path in files:
                answer["oid"] = files[path].etag
            answers.append(answer)
        self.answer_json({"files": answers})

    @route("POST", r"/{repo}\.git/info/lfs/objects/batch")
    def lfs_batch(self, namespace: str, name: str) -> None:
        """Answer with the URLs to upload to. A file that the repository has already gets none."""
        repository = self.repository(namespace, name, write=True)
        objects = []
        for announced in self.read_json()["objects"]:
            actions = {}
            if not repository.lfs_path(announced["oid"]).exists():
                ticket = secrets.token_urlsafe()
                self.server.uploads[ticket] = Upload(repository, announced["oid"], announced["size"])
                upload: dict[str, Any] = {"href": f"{self.server.url}/lfs/{ticket}"}
                parts = -(-announced["size"] // self.server.part_size)
                if parts > 1:
                    urls = {str(part): f"{upload['href']}/{part}" for part in range(1, parts + 1)}
                    upload["header"] = {"chunk_size": str(self.server.part_size)} | urls
                verify = {"href": f"{self.server.url}/api/models/{namespace}/{name}/lfs/verify"}
                actions = {"actions": {"upload": upload, "verify": verify}}
            objects.append({"oid": announced["oid"], "size": announced["size"]} | actions)
        self.answer_json({"transfer": "multipart", "objects": objects})

    @route("PUT", "/lfs/{ticket}")
    def upload_whole(self, ticket: str) -> None:
        self.receive(ticket, 1)
        self.complete(ticket, parts=1)

    @route("PUT", "/lfs/{ticket}/{part}")
    def upload_part(self, ticket: str, part: str) -> None:
        self.answer_json({}, headers={"ETag": f'"{self.receive(ticket, int(part))}"'})

    @route("POST", "/lfs/{ticket}")
    def upload_complete(self, ticket: str) -> None:
        self.complete(ticket, parts=len(self.read_json()["parts"]))

    def receive(self, ticket: str, part: int) -> str:
        """Store one part of an upload and return its sha256. A part that breaks off leaves nothing behind."""
        if ticket not in self.server.uploads:
            raise HubError(403, "this upload URL is unknown or has expired")
        digest = hashlib.sha256()
        path = self.server.part_path(ticket, part)
        try:
            with path.open("wb") as file:
                for piece in self.unread:
                    file.write(piece)
                    digest.update(piece)
        except (ConnectionCut, ConnectionError):
            path.unlink()
            raise
        return digest.hexdigest()

    def complete(self, ticket: str, parts: int) -> None:
        """Join the parts of an upload and keep them, if together they are what the client had announced."""
        upload = self.server.uploads[ticket]
        whole = self.server.part_path(ticket, 0)
        digest = hashlib.sha256()
        with whole.open("wb") as file:
            for part in range(1, parts + 1):
                path = self.server.part_path(ticket, part)
                for piece in _read(path, 0, path.stat().st_size):
                    file.write(piece)
                    digest.update(piece)
                path.unlink()
        if (digest.hexdigest(), whole.stat().st_size) != (upload.sha256, upload.size):
            whole.unlink()
            raise HubError(400, f"the uploaded content has sha256 {digest.hexdigest()}, announced was {upload.sha256}")
        os.replace(whole, upload.repository.lfs_path(upload.sha256))
        self.answer_json({})

    @route("POST", "/api/models/{repo}/lfs/verify")
    def verify(self, namespace: str, name: str) -> None:
        announced = self.read_json()
        path = self.repository(namespace, name, write=True).lfs_path(announced["oid"])
        if not path.exists() or path.stat().st_size != announced["size"]:
            raise HubError(404, f"the LFS object {announced['oid']} was not uploaded")
        self.answer_json({})

    @route("POST", "/api/models/{repo}/commit/{revision}")
    def commit(self, namespace: str, name: str, revision: str) -> None:
        """Carry out the operations, one per line of the request: all of them or none."""
        self.refuse_pull_request()
        repository = self.repository(namespace, name, write=True)
        operations = [(line["key"], line["value"]) for line in map(json.loads, self.read_all().splitlines())]
        header = dict(operations)["header"]
        with self.server.lock:  # no other commit may come between the head that is read and the new one
            if revision not in repository.refs["heads"]:
                raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            head = self.commit_of(repository, revision)
            if not head.id.startswith(header.get("parentCommit", "")):
                raise HubError(
                    412, f"A commit has happened since {header['parentCommit']}. Please refresh and try again."
                )
            files = dict(head.files)
            for key, value in operations:
                _apply(repository, files, key, value)
            new = repository.commit(
                revision, files, title=header["summary"], message=header["description"], author=self.require_user()
            )
        url = f"{self.server.url}/{namespace}/{name}/commit/{new.id}"
        self.answer_json({"success": True, "commitUrl": url, "commitOid": new.id, "hookOutput": ""})

    def refuse_pull_request(self) -> None:
        if "create_pr" in self.query:
            raise HubError(501, "the loopback Hub has no pull requests; push without create_pr")


def _apply(repository: Repository, files: dict[str, StoredFile], key: str, value: dict[str, Any]) -> None:
    """Carry out one line of a commit on `files`, the content of the branch."""
    path = value.get("path", "")
    if ".." in path.split("/") or path.startswith("/"):
        raise HubError(400, f"invalid path {path!r}")
    if key == "file":
        files[path] = repository.add_blob(base64.b64decode(value["content"]))
    elif key == "lfsFile":
        content = repository.lfs_path(value["oid"])
        if not content.exists():
            raise HubError(400, f"{path} points to the LFS object {value['oid']}, which was not uploaded")
        files[path] = StoredFile.from_lfs(value["oid"], content.stat().st_size)
    elif key in ("deletedFile", "deletedFolder"):
        deleted = [path] if path in files else []
        if key == "deletedFolder":
            folder = path.rstrip("/") + "/"
            deleted += [name for name in files if name.startswith(folder)]
        if not deleted:
            raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        for name in deleted:
            del files[name]
    elif key != "header":
        raise HubError(501, f"the loopback Hub does not speak the commit operation {key!r}")


def _describe(file: StoredFile) -> dict[str, Any]:
    """Return what listings of a repository say about a file."""
    entry: dict[str, Any] = {"type": "file", "oid": file.oid, "size": file.size}
    if file.sha256:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
    return entry


def _read(path: Path, start: int, stop: int) -> Iterator[bytes]:
    """Yield the bytes from `start` up to `stop`, in pieces."""
    with path.open("rb") as file:
        file.seek(start)
        while start < stop:
            piece = file.read(min(_PIECE, stop - start))
            start += len(piece)
            yield piece
