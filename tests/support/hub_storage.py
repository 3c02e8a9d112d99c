"""Keeps the repositories of the loopback Hub (`hub_server.py`) in folders.

One repository is one folder `ROOT/namespace/name`:

    settings.json          {"private": bool, "created": date}
    refs.json              {"heads": {branch: commit}, "tags": {tag: commit}}
    commits/<commit>.json  message, author, parent and the complete list of files
    blobs/<git sha1>       contents of small files, under the name that git gives them
    lfs/<sha256>           contents of large files

Contents are named by their hash and refs are replaced atomically, so a commit exists whole or not at all.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path


def git_sha1(content: bytes) -> str:
    """Return the name that git gives to a file with this content."""
    return hashlib.sha1(b"blob %d\x00%s" % (len(content), content)).hexdigest()


def now() -> str:
    """Return the time as the Hub writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())


@dataclass(frozen=True)
class StoredFile:
    """One file of one commit.

    Attributes:
        oid: the name that git gives to the file, or to the LFS pointer that it holds in the file's place.
        size: number of bytes of the file.
        sha256: sum of a file that is held as an LFS pointer. None for others, as is `pointer_size`.
        pointer_size: number of bytes of the LFS pointer.
    """

    oid: str
    size: int
    sha256: str | None = None
    pointer_size: int | None = None

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    @classmethod
    def from_lfs(cls, sha256: str, size: int) -> "StoredFile":
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return cls(oid=git_sha1(pointer), size=size, sha256=sha256, pointer_size=len(pointer))


@dataclass(frozen=True)
class Commit:
    """One commit, with the complete list of its files by their paths."""

    id: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, StoredFile]


class Repository:
    """A repository in its folder. Callers let one thread write at a time, for which the server has a lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(cls, folder: Path, *, private: bool, author: str) -> "Repository":
        """Create a repository with the first commit that the Hub makes: `.gitattributes` and nothing else."""
        for name in ("commits", "blobs", "lfs"):
            (folder / name).mkdir(parents=True)
        repository = cls(folder)
        repository._write("settings.json", {"private": private, "created": now()})
        repository._write("refs.json", {"heads": {}, "tags": {}})
        attributes = repository.add_blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        repository.commit("main", {".gitattributes": attributes}, title="initial commit", message="", author=author)
        return repository

    @property
    def settings(self) -> dict:
        return json.loads((self.folder / "settings.json").read_text())

    @property
    def refs(self) -> dict[str, dict[str, str]]:
        return json.loads((self.folder / "refs.json").read_text())

    def set_ref(self, kind: str, name: str, commit: str) -> None:
        """Point the branch (`kind` "heads") or the tag ("tags") at a commit."""
        refs = self.refs
        refs[kind][name] = commit
        self._write("refs.json", refs)

    def read_commit(self, revision: str) -> Commit | None:
        """Return the commit of a branch, a tag, a commit hash, or the first seven or more digits of one.

        The result is None where no commit, or more than one, goes by that name.
        """
        refs = self.refs
        name = refs["heads"].get(revision) or refs["tags"].get(revision)
        if name is None and len(revision) >= 7 and revision.isalnum():
            names = [path.stem for path in (self.folder / "commits").glob(f"{revision}*.json")]
            name = names[0] if len(names) == 1 else None
        if name is None:
            return None
        fields = json.loads((self.folder / "commits" / f"{name}.json").read_text())
        fields["files"] = {path: StoredFile(**file) for path, file in fields["files"].items()}
        return Commit(**fields)

    def history(self, revision: str) -> Iterator[Commit]:
        """Yield the commit of `revision` and its ancestors, newest first."""
        commit = self.read_commit(revision)
        while commit is not None:
            yield commit
            commit = self.read_commit(commit.parent) if commit.parent else None

    def commit(self, branch: str, files: dict[str, StoredFile], *, title: str, message: str, author: str) -> Commit:
        """Make `files` the complete content of `branch` and return the new commit."""
        about = {
            "parent": self.refs["heads"].get(branch),
            "title": title,
            "message": message,
            "author": author,
            "date": now(),
        }
        fields = {**about, "files": {path: asdict(files[path]) for path in sorted(files)}}
        name = hashlib.sha1(json.dumps(fields).encode()).hexdigest()
        self._write(f"commits/{name}.json", {"id": name, **fields})
        self.set_ref("heads", branch, name)
        commit = self.read_commit(name)
        assert commit is not None
        return commit

    def add_blob(self, content: bytes) -> StoredFile:
        file = StoredFile(oid=git_sha1(content), size=len(content))
        self.content_path(file).write_bytes(content)
        return file

    def lfs_path(self, sha256: str) -> Path:
        return self.folder / "lfs" / sha256

    def content_path(self, file: StoredFile) -> Path:
        """Return where the content of a file is kept."""
        return self.lfs_path(file.sha256) if file.sha256 else self.folder / "blobs" / file.oid

    def _write(self, name: str, value: dict) -> None:
        temporary = self.folder / f"{name}.new"
        temporary.write_text(json.dumps(value, indent=1))
        os.replace(temporary, self.folder / name)  # readers see the old file or the new one, and nothing between


@dataclass(frozen=True)
class Upload:
    """A permission to upload one large file, which an unguessable URL grants."""

    repository: Repository
    sha256: str
    size: int
