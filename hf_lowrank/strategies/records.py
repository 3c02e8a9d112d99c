"""What becomes of a block as a record of the work folder, and the block as it was from its record."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..calibration import BlockBatch
from ..linears import dense_weight
from ..report import LayerReport
from ..runtime.configuration import LayerSpec
from ..runtime.layers import CompressedLinear, build_layer
from ..runtime.quantizer import swap_module
from ..work_folder import Record

if TYPE_CHECKING:
    from .run import Run


@dataclass(frozen=True)
class Mark:
    """How far the notes of a run had come when it entered a block."""

    reports: int
    warnings: int
    reasons: frozenset[str]

    @staticmethod
    def of(run: "Run") -> "Mark":
        return Mark(len(run.reports), len(run.warnings), frozenset(run.reasons))

    def notes_since(self, run: "Run") -> dict[str, Any]:
        """What the run noted about the block, as plain JSON values."""
        return {
            "reports": [asdict(report) for report in run.reports[self.reports :]],
            "warnings": run.warnings[self.warnings :],
            "reasons": {name: reason for name, reason in run.reasons.items() if name not in self.reasons},
        }


def take_notes(run: "Run", notes: dict[str, Any]) -> None:
    """Note again what `Mark.notes_since` gave."""
    run.reports += [LayerReport(**report) for report in notes["reports"]]
    run.warnings += notes["warnings"]
    run.reasons |= notes["reasons"]


def block_record(block: nn.Module, notes: dict[str, Any]) -> Record:
    """All that a block holds, which of its layers are compressed and how, and what was noted on the way."""
    specs = {name: module.spec.to_dict() for name, module in block.named_modules() if isinstance(module, CompressedLinear)}
    return Record(dict(block.state_dict()), {"specs": specs, "notes": notes})


def restore_block(block: nn.Module, record: Record, values: bool = True) -> None:
    """Make a block what it was when it was recorded, or only its layers without their values."""
    for name, spec in record.facts["specs"].items():
        weight = dense_weight(block.get_submodule(name))
        made = build_layer(LayerSpec.from_dict(name, spec), weight.shape[1], weight.shape[0], weight.device, weight.dtype)
        replace_layer(block, name, made)
    if values:
        block.load_state_dict(record.tensors)


def replace_layer(model: nn.Module, name: str, made: CompressedLinear) -> None:
    """Put a compressed layer in the place of a dense one, in its mode."""
    dense = model.get_submodule(name)
    assert isinstance(dense.weight, Tensor)
    made.replaces_conv1d = isinstance(dense, Conv1D)
    made.requires_grad_(dense.weight.requires_grad)
    swap_module(model, name, made.train(dense.training))


def inputs_record(batches: Iterable[BlockBatch]) -> Record:
    """The inputs of the next block."""
    tensors = {}
    for position, batch in enumerate(batches):
        tensors[f"hidden.{position}"] = batch.hidden
        if batch.shifted is not None:
            tensors[f"shifted.{position}"] = batch.shifted.hidden
    return Record(tensors, {})


def restore_inputs(batches: Iterable[BlockBatch], record: Record) -> None:
    """Bring the batches to where they were recorded."""
    for position, batch in enumerate(batches):
        batch.hidden = record.tensors[f"hidden.{position}"].to(batch.hidden.device)
        if batch.shifted is not None:
            batch.shifted.hidden = record.tensors[f"shifted.{position}"].to(batch.hidden.device)
