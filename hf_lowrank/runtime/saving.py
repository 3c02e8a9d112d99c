"""Whatever a compressed model needs to live elsewhere is saved with it: the runtime's files, the auto map, tokenizer and report."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file

RUNTIME_FILES = (
    "configuration.py",
    "errors.py",
    "layers.py",
    "modeling_hf_lowrank.py",
    "ops.py",
    "packing.py",
    "pivoting.py",
    "quantization.py",
    "quantized_ops.py",
    "quantizer.py",
    "saving.py",
    "validation.py",
)
REPORT_FILE = "compression_report.json"
ENTRY_MODULE = "modeling_hf_lowrank"

AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForAudioClassification",
    "AutoModelForCausalLM",
    "AutoModelForImageClassification",
    "AutoModelForImageTextToText",
    "AutoModelForMaskedLM",
    "AutoModelForMultipleChoice",
    "AutoModelForNextSentencePrediction",
    "AutoModelForPreTraining",
    "AutoModelForQuestionAnswering",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForTokenClassification",
)

logger = logging.getLogger(__name__)


class CompleteSave:
    """Stands in for `model.save_pretrained`: companions first (a push uploads what it finds), then transformers' own save.

    It lives on the instance, so that the model's class stays the native one; it copies and pickles with the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.tokenizer: Any = None
        self.report: dict[str, Any] | None = None

    def __call__(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any) -> None:
        model = self.model
        model.config.auto_map = auto_map(model)
        if is_main_process and not os.path.isfile(save_directory):
            os.makedirs(save_directory, exist_ok=True)
            self.write_companions(Path(save_directory))
        type(model).save_pretrained(model, save_directory, is_main_process=is_main_process, **kwargs)

    def write_companions(self, folder: Path) -> None:
        """Write the runtime's files, the report and the tokenizer; the latter two from where the model came from if need be."""
        here = Path(__file__).parent
        for name in RUNTIME_FILES:
            if here.resolve() != folder.resolve():
                shutil.copyfile(here / name, folder / name)
        source = getattr(self.model.config, "_name_or_path", "")
        if self.report is not None:
            (folder / REPORT_FILE).write_text(json.dumps(self.report, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        elif report := _find(source, REPORT_FILE):
            if Path(report).resolve() != (folder / REPORT_FILE).resolve():
                shutil.copyfile(report, folder / REPORT_FILE)
        tokenizer = self.tokenizer
        if tokenizer is None and _find(source, "tokenizer_config.json"):
            tokenizer = AutoTokenizer.from_pretrained(source)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    @staticmethod
    def attach(model: PreTrainedModel) -> "CompleteSave":
        """Make the model's saves complete; a second call finds the first."""
        save = model.__dict__.get("save_pretrained")
        if not isinstance(save, CompleteSave):
            save = model.__dict__["save_pretrained"] = CompleteSave(model)
        return save

    @staticmethod
    def detach(model: PreTrainedModel) -> None:
        """Back to transformers' own save, for a model that is dense again."""
        model.__dict__.pop("save_pretrained", None)
        if hasattr(model.config, "auto_map"):
            del model.config.auto_map


def auto_map(model: PreTrainedModel) -> dict[str, str]:
    """The `auto_map` of a checkpoint: AutoConfig and every Auto class that knows the model's config."""
    entries = {"AutoConfig": f"{ENTRY_MODULE}.CompressedAutoConfig"}
    for name in AUTO_CLASSES:
        auto_class = getattr(transformers, name, None)
        if auto_class is not None and type(model.config) in auto_class._model_mapping:
            entries[name] = f"{ENTRY_MODULE}.Compressed{name}"
    return entries


def _find(source: str, name: str) -> str | None:
    """Where a file of the checkpoint that the model came from lies on this machine, if it has one."""
    if not source:
        return None
    try:
        return cached_file(
            source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False, local_files_only=True,
        )
    except OSError:
        return None
