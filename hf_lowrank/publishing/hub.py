"""Uploads of compressed checkpoints to the Hub, complete and with a model card."""

import fnmatch
import glob
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from ..checkpoints.verify import code_files
from ..execution.files import human_bytes
from ..runtime.checksums import CONFIG
from ..runtime.companions import CARRIED, GENERATION_CONFIG, clear_paths, files_in, files_of
from ..runtime.errors import CheckpointError
from ..runtime.reports import CARD_FILE, is_own_card, sealed_card
from ..runtime.safetensors_headers import read_headers, weight_files
from ..runtime.saving import CompleteSave, has_users_card
from .model_card import read_config, write_model_card

Log = Callable[[str], None]
"""Function that receives one line."""

NEVER_UPLOADED = (
    # Hidden files, such as caches, and what Python and loggers leave.
    *(".*", "__pycache__", "runs", "wandb", "lightning_logs", "*.log", "events.out.tfevents*"),
    # The state of a training, which names folders and machines.
    *("checkpoint-[0-9]*", "global_step[0-9]*", "training_args.bin", "trainer_state.json"),
    *("optimizer*.pt", "optimizer*.bin", "scheduler.pt", "scaler.pt", "rng_state*"),
    # Secrets.
    *("token", "*.token", "stored_tokens", "*.pem", "*.key", "*.env", "credentials*", "id_rsa*", "id_ed25519*"),
)
"""Patterns of names of files and folders that a push leaves out."""
HUBS_OWN = ".gitattributes"
"""A hidden file that is pushed all the same: it tells the Hub which files are large."""

logger = logging.getLogger(__name__)

SAVE_AGAIN = "save the model again with hf_lowrank imported"
"""Cure for files that only a save with the package writes."""


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    announce: Log = logger.info,
) -> CommitInfo:
    """Push the compressed checkpoint in `folder` in one commit, which removes weights that the folder does not have.

    A card is written if there is none. A card that nobody has changed since it was written is renamed to the repo. A
    push that broke off is repeated by calling again, and files that have arrived are not sent again.

    Args:
        private: visibility of a repo that does not exist yet.
        revision: branch to push to, which is created if it does not exist.
        announce: receives what is about to be uploaded, line by line, before it is.

    Raises:
        CheckpointError: if the folder is not a complete checkpoint. Nothing is sent then.
    """
    check_complete(folder)
    if not has_users_card(folder):
        write_model_card(folder, name=repo_id)
    return upload(
        folder,
        repo_id,
        private=private,
        token=token,
        revision=revision,
        commit_message=commit_message,
        create_pr=create_pr,
        announce=announce,
    )


def push_model(save: CompleteSave, repo_id: str, *, max_shard_size: int | str = "50GB", **options: Any) -> CommitInfo:
    """Save a model to a folder of its own and upload that.

    What the user has put into the repo, such as a tokenizer or a card, is kept as it is in a folder.

    Args:
        options: as for `upload`.
    """
    api = HfApi(token=options.get("token"))
    repo_id = api.create_repo(repo_id, private=options.get("private"), exist_ok=True).repo_id
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        fetch_companions(repo_id, folder, options.get("revision"), options.get("token"))
        save(folder, max_shard_size=max_shard_size, name=repo_id)
        # An adapter is opened with the model that it names, wherever that is on this machine.
        clear_paths(folder / "adapter_config.json")
        return upload(folder, repo_id, **options)


def fetch_companions(repo_id: str, folder: Path, revision: str | None, token: str | bool | None) -> None:
    """Copy the card, the config and the files beside the weights from a repo to a folder, as far as it has any."""
    names = [CONFIG, CARD_FILE, GENERATION_CONFIG]
    try:
        snapshot = snapshot_download(repo_id, revision=revision, token=token, allow_patterns=[*names, *CARRIED])
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return
    present = [name for name in names if Path(snapshot, name).is_file()]
    for name in present + files_of(Path(snapshot)):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(Path(snapshot, name), folder / name)


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    tags: list[str] | str | None = None,
    announce: Log = logger.info,
) -> CommitInfo:
    """Upload the folder of a checkpoint in one commit, which removes weights that the folder does not have.

    Args:
        private: visibility of a repo that does not exist yet.
        revision: branch to upload to, which is created if it does not exist.
        create_pr: open a pull request in place of a commit on the branch.
        tags: tags that are added to those of the card.
        announce: receives what is about to be uploaded, line by line, before it is.
    """
    if tags:
        _add_tags(folder / CARD_FILE, [tags] if isinstance(tags, str) else tags)
    api = HfApi(token=token)
    # The Hub answers with the full id, where the caller may have left out the name of the user.
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    # A pull request has a branch of its own.
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    visibility = "private" if api.repo_info(repo_id).private else "public"
    left_out = [name for name in files_in(folder) if is_left_out(name)]
    for line in announcement(folder, f"{repo_id} ({visibility})", left_out):
        announce(line)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message=commit_message or "Upload compressed model",
        commit_description=commit_description,
        create_pr=create_pr,
        # Shards of an earlier upload with other sizes would otherwise stay beside the new ones.
        delete_patterns=["*.safetensors", "*.safetensors.index.json"],
        ignore_patterns=[glob.escape(name) for name in left_out],
    )


def is_left_out(name: str) -> bool:
    """Return whether a file, by its path in the folder, is left out of every push."""
    if name == HUBS_OWN:
        return False
    parts = PurePosixPath(name).parts
    return any(fnmatch.fnmatch(part, pattern) for part in parts for pattern in NEVER_UPLOADED)


def announcement(folder: Path, repo: str, left_out: list[str]) -> list[str]:
    """Return what a push says before it uploads: the files and their size, what is left out, and what to look at.

    Args:
        repo: id and visibility.
    """
    files = [name for name in files_in(folder) if name not in left_out]
    size = sum((folder / name).stat().st_size for name in files)
    lines = [f"pushing {len(files)} files, {human_bytes(size)}, to {repo}: {', '.join(files)}"]
    if left_out:
        # Of a folder that is left out, one line says enough.
        tops = dict.fromkeys(_left_out_part(name) for name in left_out)
        lines.append(f"left out: {', '.join(tops)}")
    # The user's own files are uploaded as they are.
    places = [re.escape(str(place)) for place in (Path.home(), folder.resolve().parent) if len(place.parts) > 1]
    pattern = rf"(?:{'|'.join(places)})[/\\]"
    for name in files:
        is_text = name.endswith(("config.json", ".md", ".yaml", ".yml", ".html"))
        if is_text and places and re.search(pattern, (folder / name).read_text("utf-8", "replace")):
            lines.append(f"warning: {name} names a folder of this machine; edit it if that shall stay private")
    return lines


def _left_out_part(name: str) -> str:
    """Return the outermost folder for which a file is left out, with a slash behind it, or else the file itself."""
    parts = PurePosixPath(name).parts
    for depth in range(1, len(parts)):
        if is_left_out("/".join(parts[:depth])):
            return "/".join(parts[:depth]) + "/"
    return name


def _add_tags(card_file: Path, tags: list[str]) -> None:
    """Add tags to a model card, if there is one, without repeating any."""
    if card_file.is_file():
        text = card_file.read_text(encoding="utf-8")
        card: Any = ModelCard(text)
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
        card_file.write_text(sealed_card(str(card)) if is_own_card(text) else str(card), encoding="utf-8")


def check_complete(folder: Path) -> None:
    """Check that `folder` holds what a load needs: a config with auto map, the loading code, and readable weights.

    Raises:
        CheckpointError: if something is missing or damaged. The message names the file and the cure.
    """
    config = read_config(folder)
    if not config.get("auto_map"):
        raise CheckpointError(
            f"{folder / 'config.json'}: no auto_map, so it opens only with the package; {SAVE_AGAIN}"
        )
    for name in sorted(code_files(folder)):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: missing, so trust_remote_code=True would fail; {SAVE_AGAIN}")
    if not (folder / "tokenizer_config.json").is_file():
        logger.warning(
            "%s: no tokenizer; save it there too (tokenizer.save_pretrained), or users must find it themselves", folder
        )
    # The headers tell a truncated file from a complete one without reading the weights.
    read_headers(weight_files(str(folder)))
