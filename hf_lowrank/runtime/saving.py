"""Whatever a compressed model needs to live elsewhere is saved with it: the runtime's files, the auto map, tokenizer and report."""

import json
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import transformers
from transformers.utils import cached_file

from .checksums import file_checksum, record_checksums, weights_checksum
from .errors import CheckpointError, CompressionError
from .experts import ExpertBank
from .layers import CompressedLinear
from .safetensors_headers import REPORT_FILE, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RUNTIME_FILES = (
    "checksums.py",
    "configuration.py",
    "content_checks.py",
    "errors.py",
    "experts.py",
    "layers.py",
    "load_hooks.py",
    "modeling_hf_lowrank.py",
    "ops.py",
    "packing.py",
    "pivoting.py",
    "quantization.py",
    "quantized_ops.py",
    "quantizer.py",
    "safetensors_headers.py",
    "saving.py",
    "validation.py",
)
CARD_FILE = "README.md"
MEASURED = ("quality", "speed")
"""Entries of the report that were measured on the stored weights; `measured_on` beside them is the checksum of those."""
OTHER_WEIGHTS = "figures of quality and speed that were measured on other weights (before training, a merge or a cast) are left out"
ENTRY_MODULE = "modeling_hf_lowrank"
TRAINER_CHECKPOINT = r"checkpoint-\d+"
"""Names of the folders in which transformers' `Trainer` saves; its own constant lies in a module that imports PEFT."""
HUB_ARGUMENTS = ("repo_id", "private", "commit_message", "create_pr")

AUTO_CLASSES = tuple(name for name in dir(transformers) if name.startswith("AutoModel"))

logger = logging.getLogger(__name__)


class Publisher(Protocol):
    """What the installed package adds to a save: the model card and the upload."""

    def write_card(self, folder: Path, name: str | None) -> None:
        """Write the card of the checkpoint in `folder`; `name` is how `from_pretrained` will call it."""

    def upload(self, folder: Path, repo_id: str, **options: Any) -> Any:
        """Upload the folder as one state of the repo."""


class CompleteSave:
    """Stands in for `model.save_pretrained`: companions first (a push uploads what it finds), then transformers' own save.

    It lives on the instance, so that the model's class stays the native one; it copies and pickles with the model.

    Attributes:
        publisher: set by the package. The runtime alone carries over the card of the checkpoint that the model came from, and
            leaves pushing to transformers.
        state_dict: what the caller of a save brings along, who may hold the model in shards; the quantizer asks for it.
        saved: while transformers pushes, the folder to push; its push would save the model once more, to a folder of its own.
    """

    publisher: ClassVar[Publisher | None] = None

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model = model
        self.tokenizer: Any = None
        self.report: dict[str, Any] | None = None
        self.state_dict: dict[str, Any] | None = None
        self.saved: Path | None = None

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
        model, folder = self.model, Path(save_directory)
        if self.saved is not None:
            for file in filter(Path.is_file, self.saved.iterdir()):
                shutil.copyfile(file, folder / file.name)
            return
        if getattr(model, "_hf_peft_config_loaded", False):  # the adapter is all that transformers saves then
            self.native_save(
                save_directory, state_dict, is_main_process=is_main_process, push_to_hub=push_to_hub, **kwargs
            )
            return
        if kwargs.get("distributed_checkpoint"):
            raise CompressionError(
                f"{folder}: distributed_checkpoint=True writes a checkpoint of a compressed model that transformers cannot open; "
                "leave it out, and one process writes the whole model"
            )
        if kwargs.get("variant") is not None:
            raise CompressionError(
                f"{folder}: variant={kwargs['variant']!r} gives the weights a name by which nothing opens compressed ones; leave it out"
            )
        record_layers(model)
        model.config.auto_map = auto_map(model)
        here = Path(__file__).parent
        model.config.quantization_config.checksums = {name: file_checksum(here / name) for name in RUNTIME_FILES}
        if is_main_process and not folder.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            self.write_companions(folder)
        # tensors keep the names of their modules, as in `quantization_config.layers`: older formats of some families rename or split layers
        kwargs["save_original_format"] = False
        hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        self.native_save(save_directory, state_dict, is_main_process=is_main_process, **kwargs)
        if not is_main_process or not folder.is_dir():
            return
        record_checksums(folder, RUNTIME_FILES)
        changed = drop_figures_of_other_weights(folder)
        publisher, repo_id = CompleteSave.publisher, hub.pop("repo_id", folder.name)
        if publisher is not None:
            publisher.write_card(folder, name)
            if push_to_hub:
                publisher.upload(folder, repo_id, token=kwargs.get("token"), **hub)
            return
        if changed:
            disown_figures(folder)
        if push_to_hub:
            self.native_push(folder, repo_id, token=kwargs.get("token"), **hub)

    def native_push(self, folder: Path, repo_id: str, **options: Any) -> None:
        """Transformers' own push, of a folder that is complete."""
        self.saved = folder
        try:
            type(self.model).push_to_hub(self.model, repo_id, **options)
        finally:
            self.saved = None

    def native_save(
        self, save_directory: str | os.PathLike[str], state_dict: dict[str, Any] | None, **kwargs: Any
    ) -> None:
        """Transformers' own save. It drops the state dict of a quantized model and asks the quantizer for one, and that asks here."""
        self.state_dict = state_dict
        try:
            type(self.model).save_pretrained(self.model, save_directory, **kwargs)
        finally:
            self.state_dict = None

    def write_companions(self, folder: Path) -> None:
        """Write the runtime's files, the report, the tokenizer and the card; the latter three from where the model came from if need be.

        A `Trainer` that pushes while it trains copies config and weights from its `checkpoint-…` folder to the folder above and uploads
        that one, so the runtime's files go there too.
        """
        write_runtime(folder)
        if re.fullmatch(TRAINER_CHECKPOINT, folder.name):
            write_runtime(folder.parent)
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
        found = self.find(name)
        if found and Path(found).resolve() != (folder / name).resolve():
            shutil.copyfile(found, folder / name)

    def find(self, name: str) -> str | None:
        """A file of the checkpoint that the model came from, fetched if need be; None if that has no such file or cannot be reached."""
        config = self.model.config
        source = getattr(config, "_name_or_path", "")
        if not source or os.path.isdir(source):
            path = Path(source) / name
            return str(path) if source and path.is_file() else None
        quiet = {
            f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "gated_repo", "connection_errors")
        }
        revision = getattr(config, "_commit_hash", None)
        try:
            found = cached_file(source, name, revision=revision, local_files_only=True, **quiet)
            return found or cached_file(source, name, revision=revision, **quiet)
        except (OSError, ValueError):
            return None

    @staticmethod
    def attach(model: "PreTrainedModel") -> "CompleteSave":
        """Make the model's saves complete; a second call finds the first."""
        save = model.__dict__.get("save_pretrained")
        if not isinstance(save, CompleteSave):
            save = model.__dict__["save_pretrained"] = CompleteSave(model)
            if CompleteSave.publisher is not None:
                model.__dict__["push_to_hub"] = CompletePush(save, CompleteSave.publisher)
        return save

    @staticmethod
    def detach(model: "PreTrainedModel") -> None:
        """Back to transformers' own save, for a model that is dense again."""
        model.__dict__.pop("save_pretrained", None)
        model.__dict__.pop("push_to_hub", None)
        if hasattr(model.config, "auto_map"):
            del model.config.auto_map


class CompletePush:
    """Stands in for `model.push_to_hub`, which would put a card without content in the place of the model's own."""

    def __init__(self, save: CompleteSave, publisher: Publisher) -> None:
        self.save, self.publisher = save, publisher

    def __call__(self, repo_id: str, *, max_shard_size: int | str = "50GB", **options: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder, max_shard_size=max_shard_size, name=repo_id)
            return self.publisher.upload(Path(folder), repo_id, **options)


def read_current_report(folder: Path) -> dict[str, Any]:
    """The report of a checkpoint, {} if it has none; without figures that were measured on other weights than are in the folder now.

    Raises:
        CheckpointError: if the report is not a dictionary in JSON, or has figures and the weights cannot be read.
    """
    file = folder / REPORT_FILE
    report = read_json(str(file)) if os.path.lexists(file) else {}
    if not isinstance(report, dict):
        raise CheckpointError(
            f"{file}: is damaged (found {type(report).__name__}); delete it to go on without measurements"
        )
    if not any(report.get(name) for name in MEASURED) or report.get("measured_on") == weights_checksum(folder):
        return report
    current = {name: value for name, value in report.items() if name not in (*MEASURED, "measured_on")}
    return {**current, "warnings": [*current.get("warnings", []), OTHER_WEIGHTS]}


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write the report of a checkpoint; the same report gives the same bytes."""
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def drop_figures_of_other_weights(folder: Path) -> bool:
    """Bring the report of a checkpoint that was just saved up to date; whether figures had to go."""
    report, file = read_current_report(folder), folder / REPORT_FILE
    changed = file.is_file() and read_json(str(file)) != report
    if changed:
        write_report(folder, report)
    return changed


def disown_figures(folder: Path) -> None:
    """Say in a card that was written for other weights that its figures are of those, and take them out of its metadata."""
    card = folder / CARD_FILE
    if card.is_file():
        content = card.read_text(encoding="utf-8")
        metadata = re.match(r"---\n.*?\n---\n", content, re.DOTALL)
        end = metadata.end() if metadata else 0
        kept = re.sub(r"^model-index:\n(?:[ -].*\n)*?(?=\w|---\n)", "", content[:end], flags=re.MULTILINE)
        note = "> Written before the weights were changed (training, a merge or a cast): figures of quality and speed are of those before."
        card.write_text(f"{kept}\n{note}\n\n{content[end:].lstrip()}", encoding="utf-8")


def write_runtime(folder: Path) -> None:
    """Copy the runtime's files, those beside this one, to a folder."""
    here = Path(__file__).parent
    if here.resolve() != folder.resolve():
        for name in RUNTIME_FILES:
            shutil.copyfile(here / name, folder / name)


def record_layers(model: "PreTrainedModel") -> None:
    """Write into the model's config what its layers store now, which grow when adapters are merged, and which experts are apart.

    Raises:
        CompressionError: if a layer is not where the config has it, as it is wrapped by an adapter.
    """
    model.config.quantization_config.experts = [
        name for name, module in model.named_modules() if isinstance(module, ExpertBank)
    ]
    layers = model.config.quantization_config.layers
    for name in layers:
        module = model.get_submodule(name)
        if not isinstance(module, CompressedLinear):
            raise CompressionError(
                f"{name}: found {type(module).__name__}, expected a compressed layer; if that is an adapter's, save the adapter by itself "
                "(PeftModel.save_pretrained) or merge it first (merge_and_unload)"
            )
        layers[name] = module.spec


def auto_map(model: "PreTrainedModel") -> dict[str, str]:
    """The `auto_map` of a checkpoint: AutoConfig and every Auto class that knows the model's config."""
    entries = {"AutoConfig": f"{ENTRY_MODULE}.CompressedAutoConfig"}
    for name in AUTO_CLASSES:
        if type(model.config) in getattr(transformers, name)._model_mapping:
            entries[name] = f"{ENTRY_MODULE}.Compressed{name}"
    return entries
