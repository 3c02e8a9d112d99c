"""What becomes of a block as a record of the work folder, and the block as it was from its record."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..calibration import ActivationCache, BlockBatch
from ..execution.process_group import ProcessGroup
from ..execution.work_folder import Record, WorkFolder
from ..models.linears import dense_weight
from ..runtime.configuration import LayerSpec
from ..runtime.layers import CompressedLinear, build_layer
from ..runtime.quantizer import swap_module
from .fallback import BuildResult
from .report import LayerReport

if TYPE_CHECKING:
    from .run import Run


@dataclass(frozen=True)
class LogPosition:
    """How far the notes of a run had come when it entered a block."""

    reports: int
    warnings: int
    kept_dense: int
    noted: frozenset[str]

    @staticmethod
    def of(run: "Run") -> "LogPosition":
        return LogPosition(
            len(run.reports), len(run.warnings), len(run.kept_dense), frozenset(run.reasons | run.retried | run.failed)
        )

    def notes_since(self, run: "Run") -> dict[str, Any]:
        """What the run noted about the block, as plain JSON values."""

        def new(notes: dict[str, str]) -> dict[str, str]:
            return {name: note for name, note in notes.items() if name not in self.noted}

        return {
            "reports": [asdict(report) for report in run.reports[self.reports :]],
            "warnings": run.warnings[self.warnings :],
            "kept_dense": run.kept_dense[self.kept_dense :],
            "reasons": new(run.reasons),
            "retried": new(run.retried),
            "bad": new(run.failed),
        }


def restore_log(run: "Run", notes: dict[str, Any]) -> None:
    """Note again what `LogPosition.notes_since` gave."""
    run.reports += [LayerReport(**report) for report in notes["reports"]]
    run.warnings += notes["warnings"]
    run.kept_dense += notes["kept_dense"]
    run.reasons |= notes["reasons"]
    run.retried |= notes["retried"]
    run.failed |= notes["bad"]


def block_record(block: nn.Module, notes: dict[str, Any]) -> Record:
    """All that a block holds, which of its layers are compressed and how, and what was noted on the way."""
    specs = {
        name: module.spec.to_dict() for name, module in block.named_modules() if isinstance(module, CompressedLinear)
    }
    return Record(dict(block.state_dict()), {"specs": specs, "notes": notes})


def restore_block(block: nn.Module, record: Record, values: bool = True) -> None:
    """Make a block what it was when it was recorded, or only its layers without their values."""
    for name, spec in record.facts["specs"].items():
        weight = dense_weight(block.get_submodule(name))
        made = build_layer(
            LayerSpec.from_dict(name, spec), weight.shape[1], weight.shape[0], weight.device, weight.dtype
        )
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


def layer_record(built: BuildResult) -> Record:
    """What became of a layer."""
    facts: dict[str, Any] = {"fault": built.fault, "remedy": built.remedy}
    if built.layer is None or built.report is None:
        return Record({}, facts)
    return Record(
        dict(built.layer.state_dict()), {**facts, "spec": built.layer.spec.to_dict(), "report": asdict(built.report)}
    )


def layer_from(record: Record, dense: nn.Module) -> BuildResult:
    """What became of a layer, as its record holds it; its compressed layer stands for the dense one."""
    facts = record.facts
    if "report" not in facts:
        return BuildResult(None, None, facts["fault"])
    report, weight = LayerReport(**facts["report"]), dense_weight(dense)
    spec = LayerSpec.from_dict(report.name, facts["spec"])
    made = build_layer(spec, weight.shape[1], weight.shape[0], weight.device, weight.dtype)
    made.load_state_dict(record.tensors)
    return BuildResult(made, report, facts["fault"], facts["remedy"])


def merged(records: Iterable[Record]) -> Record:
    """Records of different things as one."""
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for record in records:
        tensors |= record.tensors
        facts |= record.facts
    return Record(tensors, facts)


def inputs_record(batches: Iterable[BlockBatch], count: int, group: ProcessGroup, cache: ActivationCache) -> Record:
    """The inputs of the next block, of all the group's `count` batches; at the first process only. Those of others go to the cache."""
    tensors = {}
    for position, part in enumerate(group.gather_to_main([_inputs(batch) for batch in batches], count)):
        for name, tensor in part.tensors.items():
            tensors[f"{name}.{position}"] = tensor if position % group.size == 0 else cache.put(tensor).tensor
    return Record(tensors, {})


def restore_inputs(
    batches: Iterable[BlockBatch], count: int, group: ProcessGroup, work: WorkFolder, name: str
) -> None:
    """Bring the batches to where `inputs_record` gave them to the record of this name."""

    def parts() -> list[Record]:
        record = work.read_here(name)
        if record is None:
            raise work.damaged(name, "missing, or the record of the block is")
        kinds = {key.rpartition(".")[0] for key in record.tensors}
        return [
            Record({kind: record.tensors[f"{kind}.{position}"] for kind in kinds}, {}) for position in range(count)
        ]

    for batch, part in zip(batches, group.scatter(parts), strict=True):
        batch.hidden = part.tensors["hidden"].to(batch.hidden.device)
        if batch.compressed_twin is not None:
            batch.compressed_twin.hidden = part.tensors["shifted"].to(batch.hidden.device)


def _inputs(batch: BlockBatch) -> Record:
    tensors = {"hidden": batch.hidden}
    if batch.compressed_twin is not None:
        tensors["shifted"] = batch.compressed_twin.hidden
    return Record(tensors, {})
