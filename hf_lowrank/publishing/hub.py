"""Uploads of compressed checkpoints to the Hub, complete and with a model card."""

import logging
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, ModelCard

from ..checkpoints.verify import code_files
from ..runtime.errors import CheckpointError
from ..runtime.reports import CARD_FILE
from ..runtime.safetensors_headers import read_headers, weight_files
from .model_card import make_card, read_config, write_model_card

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
) -> CommitInfo:
    """Push the compressed checkpoint in `folder` in one commit, which removes weights that the folder does not have.

    A card is written if there is none. A card that nobody has changed since it was written is renamed to the repo. A
    push that broke off is repeated by calling again, and files that have arrived are not sent again.

    Args:
        private: visibility of a repo that does not exist yet.
        revision: branch to push to, which is created if it does not exist.

    Raises:
        CheckpointError: if the folder is not a complete checkpoint. Nothing is sent then.
    """
    check_complete(folder)
    card = folder / CARD_FILE
    # The card is a function of the folder, so one that differs was changed by hand and stays.
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
    """Upload the folder of a checkpoint in one commit, which removes weights that the folder does not have.

    Args:
        private: visibility of a repo that does not exist yet.
        revision: branch to upload to, which is created if it does not exist.
        create_pr: open a pull request in place of a commit on the branch.
        tags: tags that are added to those of the card.
    """
    if tags:
        _add_tags(folder / CARD_FILE, [tags] if isinstance(tags, str) else tags)
    api = HfApi(token=token)
    # The Hub answers with the full id, where the caller may have left out the name of the user.
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    # A pull request has a branch of its own.
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message=commit_message or "Upload compressed model",
        commit_description=commit_description,
        create_pr=create_pr,
        # Shards of an earlier upload with other sizes would otherwise stay beside the new ones.
        delete_patterns=["*.safetensors", "*.safetensors.index.json"],
        ignore_patterns=["__pycache__/**"],
    )


def _add_tags(card_file: Path, tags: list[str]) -> None:
    """Add tags to a model card, if there is one, without repeating any."""
    if card_file.is_file():
        card = ModelCard.load(card_file)
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
        card.save(card_file)


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
