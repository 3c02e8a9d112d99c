"""Saves with a compressed model what it needs elsewhere: the loading code, the auto map, tokenizer and report."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from .checksums import CONFIG, LOADING_CODE, file_checksum, record_checksums, recorded_code
from .companions import CARRIED, GENERATION_CONFIG, Companions, clear_paths, files_in
from .errors import CompressionError, logger
from .origin import Origin
from .privacy import public_values
from .reopening import check_reopens, marked_parts
from .reports import (
    CARD_FILE,
    REPORT_FILE,
    disown_figures,
    drop_figures_of_other_weights,
    is_own_card,
    offer_reports,
    read_report,
    write_report,
)
from .safetensors_headers import read_json
from .saved_config import auto_map, record_layers
from .staging import move, staged
from .widths import width_warning

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAINER_CHECKPOINT = r"checkpoint-\d+"
"""Names of the folders in which transformers' `Trainer` saves. Its own constant lies in a module that imports PEFT."""
HUB_ARGUMENTS = ("repo_id", "private", "commit_message", "create_pr")
SAVED_WEIGHTS = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
"""Names that transformers gives weights. A save leaves none of an earlier one."""


class Publisher(Protocol):
    """Describes what the installed package adds to a save: the loading code, the model card and the upload."""

    def loading_code(self) -> bytes:
        """Return the file of code that a checkpoint carries, `modeling_hf_lowrank.py`."""

    def write_card(self, folder: Path, name: str | None) -> None:
        """Write the card of the checkpoint in `folder`. `name` is what `from_pretrained` will call the checkpoint."""

    def upload(self, folder: Path, repo_id: str, **options: Any) -> Any:
        """Upload the folder as one state of the repo."""

    def push(self, save: Any, repo_id: str, **options: Any) -> Any:
        """Save a model by its `CompleteSave` and upload it, but keep what the repo has of the user's."""


class CompleteSave:
    """Stands in for `model.save_pretrained`, so that every save of a compressed model is complete.

    It writes the companions first, as a push uploads what it finds, and then calls transformers' own save. It lives on
    the instance, so that the model's class stays the native one. It is copied and pickled with the model.

    Attributes:
        publisher: set by the package. The runtime alone carries over the card of the checkpoint that the model came
            from, and leaves pushing to transformers.
        own_code: set by the code in a checkpoint: the file that it is in. Its saves write the same file.
        tokenizer: saved with the model. None to take that of the checkpoint that the model came from.
        report: the report of a compression in this process, which every save writes. None if the model was loaded.
        source_report: the report of the checkpoint that the model came from, kept once `current_report` has read it.
            Saves do not write it: they copy the file.
        state_dict: what the caller of a save brings along, for instance because the model is held in shards. The
            quantizer asks for it.
        saved: the folder to push, while transformers pushes. Its push would save the model once more, to a folder of
            its own.
        stored_dtype: the dtype of the checkpoint that the model came from.
        intended_dtype: a dtype in which saves are meant to be, however much larger that makes them.
        base: the folder on this machine with the files beside the dense or compressed model that this one came from,
            once a save has found it.
    """

    publisher: ClassVar[Publisher | None] = None
    own_code: ClassVar[bytes] = b""

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model = model
        self.tokenizer: Any = None
        self.report: dict[str, Any] | None = None
        self.source_report: dict[str, Any] | None = None
        self.state_dict: dict[str, Any] | None = None
        self.saved: Path | None = None
        self.stored_dtype: torch.dtype | None = None
        self.intended_dtype: torch.dtype | None = None
        self.base: Path | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or unpickled save, in whatever process."""
        vars(self).update(state)
        offer_reports()

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        *,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the model as transformers does, with all that it needs elsewhere.

        Args:
            name: what `from_pretrained` will call the checkpoint, for the model card.
            kwargs: other arguments of transformers' `save_pretrained`.

        Raises:
            CompressionError: for arguments that would give a checkpoint which cannot be opened.
            SaveError: if the folder cannot be written. What was there before is then as it was.
        """
        model, folder = self.model, Path(save_directory)
        if self.saved is not None:
            # Transformers' push is saving the model to a folder of its own: give it the files that are complete.
            shutil.copytree(self.saved, folder, ignore=shutil.ignore_patterns(".*", "__pycache__"), dirs_exist_ok=True)
            return
        if getattr(model, "_hf_peft_config_loaded", False):  # transformers then saves nothing but the adapter
            self.native_save(
                save_directory, state_dict, is_main_process=is_main_process, push_to_hub=push_to_hub, **kwargs
            )
            return
        _check_arguments(folder, kwargs)
        record_layers(model)
        if not model.config.quantization_config.layers:
            # All compressed layers have been replaced by dense ones: it is a dense model, and is saved as one.
            model.dequantize()
            kwargs |= {"state_dict": state_dict, "push_to_hub": push_to_hub}
            model.save_pretrained(save_directory, is_main_process, **kwargs)
            return
        self.complete_config(state_dict)
        # Tensors keep the names of their modules, which `quantization_config.layers` uses. The older formats of some
        # families rename or split layers.
        kwargs["save_original_format"] = False
        # They belong to the push, which comes last.
        hub_options = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        if not is_main_process:
            self.native_save(save_directory, state_dict, is_main_process=False, **kwargs)
            return
        self.warn_of_width(folder, state_dict)
        name = name or folder.resolve().name
        with staged(folder) as partial:
            companions = self.write_companions(partial, folder)
            self.native_save(partial, state_dict, is_main_process=True, **kwargs)
            # In a group of processes, transformers may let another one write.
            if not (partial / CONFIG).is_file():
                return
            finish_folder(partial, companions)
            self.write_card(partial, folder, name)
            # Known before the config is replaced that has the checksums of what an earlier save has put there.
            stale = stale_files(partial, folder, companions)
            move(partial, folder)
            for file in stale:
                file.unlink(missing_ok=True)
        # A `Trainer` that pushes while it trains copies config and weights from its `checkpoint-…` folder to the one
        # above, and uploads that one.
        if re.fullmatch(TRAINER_CHECKPOINT, folder.name):
            write_loading_code(folder.parent)
        if push_to_hub:
            self.publish(folder, token=kwargs.get("token"), **hub_options)

    def complete_config(self, state_dict: dict[str, Any] | None) -> None:
        """Write into the model's config what opens the checkpoint, after checking that this is possible.

        Raises:
            CompressionError: if the config makes another model.
        """
        model = self.model
        if state_dict is None:  # else the model may be held in shards, under other names
            check_reopens(model)
        model.config.auto_map = auto_map(model)
        # Those of all files take its place as soon as these are written.
        checksum = hashlib.sha256(loading_code()).hexdigest()
        recorded: Any = model.config.quantization_config
        recorded.checksums = {LOADING_CODE: checksum}

    def write_card(self, partial: Path, folder: Path, name: str) -> None:
        """Bring report and card of a checkpoint up to date, before it is moved to its folder.

        Args:
            name: what `from_pretrained` will call the checkpoint.
        """
        figures_dropped = drop_figures_of_other_weights(partial)
        if has_users_card(folder):
            return
        if CompleteSave.publisher is not None:
            CompleteSave.publisher.write_card(partial, name)
            return
        self.carry_over(CARD_FILE, partial)
        if figures_dropped:
            disown_figures(partial)

    def publish(self, folder: Path, **hub_options: Any) -> None:
        """Push a checkpoint that was just saved."""
        repo_id = hub_options.pop("repo_id", folder.resolve().name)
        if CompleteSave.publisher is not None:
            CompleteSave.publisher.upload(folder, repo_id, **hub_options)
        else:
            self.native_push(folder, repo_id, **hub_options)

    def native_push(self, folder: Path, repo_id: str, **options: Any) -> None:
        """Push a folder that is complete, by transformers' own push."""
        self.saved = folder
        try:
            type(self.model).push_to_hub(self.model, repo_id, **options)
        finally:
            self.saved = None

    def native_save(
        self, save_directory: str | os.PathLike[str], state_dict: dict[str, Any] | None, **kwargs: Any
    ) -> None:
        """Save by transformers' own `save_pretrained`.

        It drops the state dict of a quantized model and asks the quantizer for one, and the quantizer asks here.
        """
        self.state_dict = state_dict
        try:
            with marked_parts(self.model.config):
                type(self.model).save_pretrained(self.model, save_directory, **kwargs)
        finally:
            self.state_dict = None

    def write_companions(self, partial: Path, folder: Path) -> Companions:
        """Write to a new folder what belongs beside the weights: the loading code, the report, the tokenizer, ….

        Report and tokenizer come from the checkpoint that the model came from, where there are no others.

        Args:
            folder: the place of the new folder's files in the end. What the user has put there stays.
        """
        origin = Origin.of(self.model)
        if self.base is None or not self.base.is_dir():
            self.base = origin.fetch(CARRIED)
        companions = Companions(origin, self.base, folder)
        companions.write(partial, self.tokenizer)
        write_loading_code(partial)
        if self.report is not None:
            write_report(partial, self.report)
        else:
            self.carry_over(REPORT_FILE, partial)
        return companions

    def carry_over(self, name: str, folder: Path) -> None:
        """Copy a file of the checkpoint that the model came from, if that has it."""
        file = Origin.of(self.model).find(name)
        if file is not None:
            shutil.copyfile(file, folder / name)

    def warn_of_width(self, folder: Path, state_dict: dict[str, Any] | None) -> None:
        """Warn if the weights take more than those that were compressed or loaded, as their dtype is wider."""
        tensors = self.model.parameters() if state_dict is None else state_dict.values()
        provenance = self.model.config.quantization_config.provenance
        compressed_in = getattr(torch, str(provenance.get("dtype")), None)
        warning = width_warning(tensors, [compressed_in, self.stored_dtype], self.intended_dtype)
        if warning:
            logger.warning(f"{folder}: {warning}")

    def current_report(self) -> dict[str, Any]:
        """Return the report that a save of the model would come with, {} if there is none.

        Raises:
            CheckpointError: if the report of the checkpoint that the model came from is damaged.
        """
        if self.report is not None:
            return self.report
        if self.source_report is None:
            file = Origin.of(self.model).find(REPORT_FILE)
            if file is None:
                return {}  # not kept: the Hub may be within reach the next time
            self.source_report = read_report(file)
        return self.source_report

    @staticmethod
    def attach(model: "PreTrainedModel") -> "CompleteSave":
        """Make the model's saves complete. A second call returns what the first has made."""
        offer_reports()
        save = model.__dict__.get("save_pretrained")
        if not isinstance(save, CompleteSave):
            save = model.__dict__["save_pretrained"] = CompleteSave(model)
            if CompleteSave.publisher is not None:
                model.__dict__["push_to_hub"] = CompletePush(save, CompleteSave.publisher)
        return save

    @staticmethod
    def detach(model: "PreTrainedModel") -> None:
        """Give a model that is dense again transformers' own save back."""
        model.__dict__.pop("save_pretrained", None)
        model.__dict__.pop("push_to_hub", None)
        if hasattr(model.config, "auto_map"):
            del model.config.auto_map


class CompletePush:
    """Stands in for `model.push_to_hub`, which would put a card without content in the place of the model's own."""

    def __init__(self, save: CompleteSave, publisher: Publisher) -> None:
        self.save = save
        self.publisher = publisher

    def __call__(self, repo_id: str, **options: Any) -> Any:
        """Save the model to a folder of its own and upload that."""
        return self.publisher.push(self.save, repo_id, **options)


def finish_folder(folder: Path, companions: Companions) -> None:
    """Record in the config of a folder that is complete the sha256 of its files, and take paths out of its configs."""
    if companions.keeps(GENERATION_CONFIG):
        (folder / GENERATION_CONFIG).unlink(missing_ok=True)
    clear_paths(folder / GENERATION_CONFIG)
    ours = {} if not companions.in_place else dict(companions.own)
    beside = {CONFIG, REPORT_FILE, LOADING_CODE}
    for name in files_in(folder):
        if name not in beside and not re.fullmatch(SAVED_WEIGHTS, name):
            ours[name] = file_checksum(folder / name)
    values = public_values(read_json(str(folder / CONFIG)))
    values["quantization_config"]["companions"] = dict(sorted(ours.items()))
    # The format in which transformers writes it.
    (folder / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    record_checksums(folder)


def stale_files(partial: Path, folder: Path, companions: Companions) -> list[Path]:
    """Return the files of an earlier save in a folder that do not belong to the one which is moved there now."""
    earlier = [name for name in os.listdir(folder) if re.fullmatch(SAVED_WEIGHTS, name) or name == REPORT_FILE]
    if not companions.in_place:
        earlier += companions.own
    earlier += own_code_files(folder)
    return [folder / name for name in earlier if not (partial / name).exists()]


def own_code_files(folder: Path) -> list[str]:
    """Return the files of loading code that a save has put into a folder, and that nobody has changed since."""
    recorded = recorded_code(folder).items()
    return [
        name for name, checksum in recorded if (folder / name).is_file() and file_checksum(folder / name) == checksum
    ]


def has_users_card(folder: Path) -> bool:
    """Return whether a folder has a card that somebody else has written or changed."""
    card = folder / CARD_FILE
    return card.is_file() and not is_own_card(card.read_text(encoding="utf-8", errors="replace"))


def loading_code() -> bytes:
    """Return the file of code that a save writes, made by the package, or else the one that this very code is in."""
    publisher = CompleteSave.publisher
    return CompleteSave.own_code if publisher is None else publisher.loading_code()


def write_loading_code(folder: Path) -> None:
    """Write the loading code to a folder, in place of what an earlier save has left there.

    Once that was some twenty files. Those that nobody has changed since are removed.
    """
    for name in own_code_files(folder):
        (folder / name).unlink()
    (folder / LOADING_CODE).write_bytes(loading_code())


def _check_arguments(folder: Path, kwargs: dict[str, Any]) -> None:
    """Raise CompressionError for arguments of a save that give a checkpoint which nothing opens."""
    if kwargs.get("distributed_checkpoint"):
        raise CompressionError(
            f"{folder}: distributed_checkpoint=True writes a checkpoint of a compressed model that transformers "
            "cannot open; leave it out, and one process writes the whole model"
        )
    if kwargs.get("variant") is not None:
        raise CompressionError(
            f"{folder}: variant={kwargs['variant']!r} gives the weights a name by which nothing opens compressed "
            "ones; leave it out"
        )
