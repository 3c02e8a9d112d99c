"""Pushes: how a compressed checkpoint gets to the Hub, whole and with a card (`model_card.py`) that says what it is."""

import logging
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, ModelCard

from ..runtime.errors import CheckpointError
from ..runtime.reports import CARD_FILE
from ..runtime.safetensors_headers import read_headers, weight_files
from ..runtime.saving import RUNTIME_FILES
from .model_card import make_card, read_config, write_model_card

logger = logging.getLogger(__name__)

_SAVE = "save the model again with hf_lowrank imported"


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Push the compressed checkpoint in `folder` as one state of the repo: old weights that it does not have are removed.

    A card is written if there is none, and renamed to the repo if nobody has changed it since it was written. A push that broke off is
    repeated by calling again; what arrived the first time is not sent again.

    Args:
        private: visibility of a repo that does not exist yet.
        revision: the branch to push to; made if it does not exist.

    Raises:
        CheckpointError: if the folder is not a complete checkpoint; nothing is sent.
    """
    check_complete(folder)
    card = folder / CARD_FILE
    if not card.is_file() or card.read_text(encoding="utf-8") == str(make_card(folder)):
        write_model_card(folder, name=repo_id)
    return upload(
        folder,
        repo_id,
        private=private,
        token=token,
        revision=revision,
        commit_message=commit_message,
        create_pr=create_pr,
    )


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
) -> CommitInfo:
    """Upload a checkpoint's folder as one state of the repo: old weights that it does not have are removed.

    Args:
        tags: added to those of the card.
    """
    path = folder / CARD_FILE
    if tags and path.is_file():
        card = ModelCard.load(path)
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *([tags] if isinstance(tags, str) else tags)]))
        card.save(path)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message=commit_message or "Upload compressed model",
        commit_description=commit_description,
        create_pr=create_pr,
        delete_patterns=["*.safetensors", "*.safetensors.index.json"],
        ignore_patterns=["__pycache__/**"],
    )


def check_complete(folder: Path) -> None:
    """See that everything that a load needs lies in `folder`: config with auto map, runtime files, weights with readable headers.

    Raises:
        CheckpointError: naming the file and the cure.
    """
    config = read_config(folder)
    if not config.get("auto_map"):
        raise CheckpointError(f"{folder / 'config.json'}: no auto_map, so it opens only with the package; {_SAVE}")
    for name in RUNTIME_FILES:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: missing, so trust_remote_code=True would fail; {_SAVE}")
    if not (folder / "tokenizer_config.json").is_file():
        logger.warning(
            "%s: no tokenizer; save it there too (tokenizer.save_pretrained), or users must find it themselves", folder
        )
    read_headers(weight_files(str(folder)))
