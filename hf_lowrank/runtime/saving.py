"""Saves with a compressed model what it needs elsewhere: the loading code, the auto map, tokenizer and report."""

import hashlib
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import transformers
from transformers.utils import cached_file

from .checksums import LOADING_CODE, file_checksum, record_checksums, recorded_code
from .errors import CompressionError
from .experts import ExpertBank
from .layers import CompressedLinear
from .reports import (
    CARD_FILE,
    REPORT_FILE,
    disown_figures,
    drop_figures_of_other_weights,
    offer_reports,
    read_report,
    write_report,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAINER_CHECKPOINT = r"checkpoint-\d+"
"""Names of the folders in which transformers' `Trainer` saves. Its own constant lies in a module that imports PEFT."""
HUB_ARGUMENTS = ("repo_id", "private", "commit_message", "create_pr")

AUTO_CLASSES = tuple(name for name in dir(transformers) if name.startswith("AutoModel"))

logger = logging.getLogger(__name__)


class Publisher(Protocol):
    """Describes what the installed package adds to a save: the loading code, the model card and the upload."""

    def loading_code(self) -> bytes:
        """Return the file of code that a checkpoint carries, `modeling_hf_lowrank.py`."""

    def write_card(self, folder: Path, name: str | None) -> None:
        """Write the card of the checkpoint in `folder`. `name` is what `from_pretrained` will call the checkpoint."""

    def upload(self, folder: Path, repo_id: str, **options: Any) -> Any:
        """Upload the folder as one state of the repo."""


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
        """
        model, folder = self.model, Path(save_directory)
        if self.saved is not None:
            # Transformers' push is saving the model to a folder of its own: give it the files that are complete.
            for file in filter(Path.is_file, self.saved.iterdir()):
                shutil.copyfile(file, folder / file.name)
            return
        if getattr(model, "_hf_peft_config_loaded", False):  # transformers then saves nothing but the adapter
            self.native_save(
                save_directory, state_dict, is_main_process=is_main_process, push_to_hub=push_to_hub, **kwargs
            )
            return
        _check_arguments(folder, kwargs)
        record_layers(model)
        model.config.auto_map = auto_map(model)
        # Those of all files take its place as soon as these are written.
        checksum = hashlib.sha256(loading_code()).hexdigest()
        model.config.quantization_config.checksums = {LOADING_CODE: checksum}
        if is_main_process and not folder.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            self.write_companions(folder)
        # Tensors keep the names of their modules, which `quantization_config.layers` uses. The older formats of some
        # families rename or split layers.
        kwargs["save_original_format"] = False
        # They belong to the push, which comes last.
        hub_options = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        self.native_save(save_directory, state_dict, is_main_process=is_main_process, **kwargs)
        if is_main_process and folder.is_dir():
            record_checksums(folder)
            self.publish(folder, name, push_to_hub, token=kwargs.get("token"), **hub_options)

    def publish(self, folder: Path, name: str | None, push_to_hub: bool, **hub_options: Any) -> None:
        """Bring report and card of a saved checkpoint up to date, and push it if that is asked for."""
        figures_dropped = drop_figures_of_other_weights(folder)
        repo_id = hub_options.pop("repo_id", folder.name)
        publisher = CompleteSave.publisher
        if publisher is not None:
            publisher.write_card(folder, name)
            if push_to_hub:
                publisher.upload(folder, repo_id, **hub_options)
            return
        if figures_dropped:
            disown_figures(folder)
        if push_to_hub:
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
            type(self.model).save_pretrained(self.model, save_directory, **kwargs)
        finally:
            self.state_dict = None

    def write_companions(self, folder: Path) -> None:
        """Write the loading code, the report, the tokenizer and the card to a folder.

        Report, tokenizer and card come from the checkpoint that the model came from, where there are no others.
        """
        write_loading_code(folder)
        # A `Trainer` that pushes while it trains copies config and weights from its `checkpoint-…` folder to the one
        # above, and uploads that one.
        if re.fullmatch(TRAINER_CHECKPOINT, folder.name):
            write_loading_code(folder.parent)
        if self.report is not None:
            write_report(folder, self.report)
        else:
            self.carry_over(REPORT_FILE, folder)
        if CompleteSave.publisher is None:
            self.carry_over(CARD_FILE, folder)
        tokenizer = self.tokenizer
        if tokenizer is None and self.find("tokenizer_config.json"):
            config = self.model.config
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                config._name_or_path, revision=getattr(config, "_commit_hash", None)
            )
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    def carry_over(self, name: str, folder: Path) -> None:
        """Copy a file of the checkpoint that the model came from, if that has it."""
        file = self.find(name)
        if file and Path(file).resolve() != (folder / name).resolve():
            shutil.copyfile(file, folder / name)

    def find(self, name: str) -> str | None:
        """Return a file of the checkpoint that the model came from, fetching it from the Hub if need be.

        Returns:
            The path of the file, None if the checkpoint has no such file or cannot be reached.
        """
        config = self.model.config
        # Transformers keeps there what `from_pretrained` was given: a path, or the name of a repo on the Hub.
        source = getattr(config, "_name_or_path", "")
        if not source or os.path.isdir(source):
            path = Path(source) / name
            return str(path) if source and path.is_file() else None
        revision = getattr(config, "_commit_hash", None)
        quiet = {
            "_raise_exceptions_for_missing_entries": False,
            "_raise_exceptions_for_gated_repo": False,
            "_raise_exceptions_for_connection_errors": False,
        }
        try:
            # What is in the cache needs no connection.
            file = cached_file(source, name, revision=revision, local_files_only=True, **quiet)
            return file or cached_file(source, name, revision=revision, **quiet)
        except (OSError, ValueError):
            return None

    def current_report(self) -> dict[str, Any]:
        """Return the report that a save of the model would come with, {} if there is none.

        Raises:
            CheckpointError: if the report of the checkpoint that the model came from is damaged.
        """
        if self.report is not None:
            return self.report
        if self.source_report is None:
            file = self.find(REPORT_FILE)
            if file is None:
                return {}  # not kept: the Hub may be within reach the next time
            self.source_report = read_report(Path(file))
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

    def __call__(self, repo_id: str, *, max_shard_size: int | str = "50GB", **options: Any) -> Any:
        """Save the model to a folder of its own and upload that."""
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder, max_shard_size=max_shard_size, name=repo_id)
            return self.publisher.upload(Path(folder), repo_id, **options)


def loading_code() -> bytes:
    """Return the file of code that a save writes, made by the package, or else the one that this very code is in."""
    publisher = CompleteSave.publisher
    return CompleteSave.own_code if publisher is None else publisher.loading_code()


def write_loading_code(folder: Path) -> None:
    """Write the loading code to a folder, in place of what an earlier save has left there.

    Once that was some twenty files. Those that nobody has changed since are removed.
    """
    for name, checksum in recorded_code(folder).items():
        file = folder / name
        if name != LOADING_CODE and file.is_file() and file_checksum(file) == checksum:
            file.unlink()
    (folder / LOADING_CODE).write_bytes(loading_code())


def record_layers(model: "PreTrainedModel") -> None:
    """Write into the model's config what its layers store now, and which experts are stored one by one.

    Layers grow when adapters are merged into them.

    Raises:
        CompressionError: if a layer is not where the config has it, because an adapter wraps it.
    """
    model.config.quantization_config.experts = [
        name for name, module in model.named_modules() if isinstance(module, ExpertBank)
    ]
    layers = model.config.quantization_config.layers
    for name in layers:
        module = model.get_submodule(name)
        if not isinstance(module, CompressedLinear):
            raise CompressionError(
                f"{name}: found {type(module).__name__}, expected a compressed layer; if that is an adapter's, "
                "save the adapter by itself (PeftModel.save_pretrained) or merge it first (merge_and_unload)"
            )
        layers[name] = module.spec


def auto_map(model: "PreTrainedModel") -> dict[str, str]:
    """Return the `auto_map` of a checkpoint: AutoConfig and every Auto class that knows the model's config."""
    module = LOADING_CODE.removesuffix(".py")
    entries = {"AutoConfig": f"{module}.CompressedAutoConfig"}
    for name in AUTO_CLASSES:
        if type(model.config) in getattr(transformers, name)._model_mapping:
            entries[name] = f"{module}.Compressed{name}"
    return entries


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
