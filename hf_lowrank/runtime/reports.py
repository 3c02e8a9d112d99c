"""Reads and writes the report of a compression, and keeps its figures apart from those of other weights.

Cards that the package has written end in a seal, by which they are told from those that somebody else has written or
changed.

The report says what was stored and what was lost, layer by layer. Later measurements are added to it.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from .checksums import weights_checksum
from .errors import CheckpointError
from .safetensors_headers import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPORT_FILE = "compression_report.json"
CARD_FILE = "README.md"
MEASURED = ("quality", "speed")
"""Entries of the report that were measured on the stored weights.

The entry `measured_on` beside them is the checksum of these weights.
"""
OTHER_WEIGHTS = (
    "figures of quality and speed that were measured on other weights (before training, a merge or a cast) "
    "are left out"
)
"""Warning in a report from which such figures were taken out."""


SEAL = re.compile(r"\n<!-- written by hf_lowrank, sha256 ([0-9a-f]{64}); a card that is changed is kept -->\n?$")


def sealed_card(text: str) -> str:
    """Return a card with the seal that says that nobody has changed it. A seal that it has is replaced."""
    content = SEAL.sub("", text).rstrip("\n") + "\n"
    checksum = hashlib.sha256(content.encode()).hexdigest()
    return f"{content}\n<!-- written by hf_lowrank, sha256 {checksum}; a card that is changed is kept -->\n"


def is_own_card(text: str) -> bool:
    """Return whether a card is as this package has written it."""
    text = text.replace("\r\n", "\n")
    return SEAL.search(text) is not None and text.rstrip("\n") == sealed_card(text).rstrip("\n")


def offer_reports() -> None:
    """Give transformers' models the property `compression_report`. A second call does nothing.

    An instance cannot have a property of its own, and reading the report of every model that is loaded would ask the
    Hub for one more file, even where the caller has forbidden it. So the class gets the property, and the report is
    read when somebody asks for it.
    """
    if not hasattr(transformers.PreTrainedModel, "compression_report"):
        transformers.PreTrainedModel.compression_report = property(_compression_report)  # type: ignore[attr-defined]


def _compression_report(model: "PreTrainedModel") -> dict[str, Any]:
    """The report of the model's compression as a dictionary, as in the checkpoint's report file.

    It is {} if the checkpoint has no report. After `compress()`, saves write this dictionary. For a loaded model it is
    read, when it is first asked for, from the checkpoint that the model came from; changes to it are then not saved.

    Raises:
        AttributeError: if the model is not compressed.
        CheckpointError: if the report of the checkpoint is damaged.
    """
    save: Any = model.__dict__.get("save_pretrained")
    # Not isinstance: it may be of another copy of this file, which some checkpoint has brought along.
    if not hasattr(save, "current_report"):
        raise AttributeError(f"{type(model).__name__!r} object has no attribute 'compression_report'")
    report: dict[str, Any] = save.current_report()
    return report


def read_report(file: Path) -> dict[str, Any]:
    """Return the content of a report file.

    Raises:
        CheckpointError: if it is not a dictionary in JSON.
    """
    report = read_json(str(file))
    if not isinstance(report, dict):
        raise CheckpointError(
            f"{file}: is damaged (found {type(report).__name__}); delete it to go on without measurements"
        )
    return report


def read_current_report(folder: Path) -> dict[str, Any]:
    """Return the report of a checkpoint, {} if it has none.

    Figures are left out if they were measured on other weights than are in the folder now.

    Raises:
        CheckpointError: if the report is not a dictionary in JSON, or has figures and the weights cannot be read.
    """
    file = folder / REPORT_FILE
    # `lexists`: a link that leads nowhere is damage, and not a missing report.
    report = read_report(file) if os.path.lexists(file) else {}
    # Hashing all weights takes a while, so it is done for figures only.
    has_figures = any(report.get(name) for name in MEASURED)
    if not has_figures or report.get("measured_on") == weights_checksum(folder):
        return report
    current = {name: value for name, value in report.items() if name not in (*MEASURED, "measured_on")}
    return {**current, "warnings": [*current.get("warnings", []), OTHER_WEIGHTS]}


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write the report of a checkpoint. The same report gives the same bytes."""
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def drop_figures_of_other_weights(folder: Path) -> bool:
    """Bring the report of a checkpoint that was just saved up to date. Return whether figures had to go."""
    report, file = read_current_report(folder), folder / REPORT_FILE
    changed = file.is_file() and read_json(str(file)) != report
    if changed:
        write_report(folder, report)
    return changed


def disown_figures(folder: Path) -> None:
    """Take the figures out of the metadata of a card that was written for other weights, and say so in its text."""
    card = folder / CARD_FILE
    if card.is_file():
        content = card.read_text(encoding="utf-8")
        metadata = re.match(r"---\n.*?\n---\n", content, re.DOTALL)
        end = metadata.end() if metadata else 0
        # The metadata is YAML; the figures are its top-level entry `model-index`.
        kept = re.sub(r"^model-index:\n(?:[ -].*\n)*?(?=\w|---\n)", "", content[:end], flags=re.MULTILINE)
        note = (
            "> Written before the weights were changed (training, a merge or a cast): figures of quality and speed "
            "are of those before."
        )
        changed = f"{kept}\n{note}\n\n{content[end:].lstrip()}"
        # It is still no card of the user's.
        changed = sealed_card(changed) if is_own_card(content) else changed
        card.write_text(changed, encoding="utf-8")
