"""Resuming a killed run: its identity, and the records of its finished blocks in the work folder.

Each stage of a run records every block that it finished, with what the run logged about it, and the inputs of the next
block. A run that is started again reads these records in place of the work: a bug in resuming is here, in
`RunLog.restore`, or in `work_folder.py`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..calibration import ActivationCache, Carrier, fingerprint
from ..execution.process_group import ProcessGroup
from ..execution.work_folder import Record, WorkFolder, tensors_checksum
from ..models.architectures import find_feed_forwards
from ..models.offloading import OffloadedBlocks, every_weight
from ..runtime.privacy import public_name
from ..version import library_versions
from .neurons import apply_neuron_order
from .records import block_record, restore_block
from .session import BlockVisit, LogPosition, Session

FINAL_STAGE = "built"
"""Name of the stage that replaces the layers. Its records are what a model on disk is saved from."""


def run_identity(session: Session) -> dict[str, Any]:
    """Return all that the result of a run depends on. A work folder goes on with a run of the same identity only."""
    config = session.plan.config.to_dict()
    return {
        "weights": weights_fingerprint(session.model, session.offloaded),
        "calibration": fingerprint(session.tokens),
        # The tokens stand for the text, wherever it lies.
        "config": config | {"calibration": public_name(config["calibration"])},
        "versions": library_versions(),
    }


def weights_fingerprint(model: PreTrainedModel, blocks: OffloadedBlocks | None = None) -> str:
    """Return the sha256 over the names, dtypes, shapes and bytes of all parameters and buffers."""
    return tensors_checksum(every_weight(model, blocks))


def record_name(stage: str, index: int) -> str:
    """Return the name of the record of a block in the work folder."""
    return f"{stage}-{index:05}"


def inputs_name(stage: str, index: int) -> str:
    """Return the name of the record that holds the inputs of a block."""
    return f"{stage}-inputs-{index:05}"


class StageRecords:
    """The records of one walk over the blocks. Without a work folder nothing is read or written.

    Args:
        session: the run.
        stage: the name of the stage.
        surveys: whether a record holds the findings of the stage about a block, or else the block itself.
        batches: this process's calibration batches. `read` brings them to the first block that is not finished.
        step: how the walk goes from the index of a block to that of the next: 1 forward, -1 back.
    """

    def __init__(self, session: Session, stage: str, surveys: bool, batches: Sequence[Carrier], step: int = 1) -> None:
        self.session = session
        self.stage = stage
        self.surveys = surveys
        self.batches = batches
        self.step = step
        self._batch_count = sum(session.group.gather(len(batches)))
        self._previous_was_recorded = False

    def read(self, visit: BlockVisit) -> Record | None:
        """Return the record of a block, or None if it is not finished.

        At the first block that is not finished, the batches get the inputs that the last finished block left for it.
        """
        work = self.session.work
        if work is None:
            return None
        record = work.read(record_name(self.stage, visit.index))
        if record is None and self._previous_was_recorded:
            name = inputs_name(self.stage, visit.index)
            restore_inputs(self.batches, self._batch_count, self.session.group, work, name)
        self._previous_was_recorded = record is not None
        return record

    def restore(self, visit: BlockVisit, record: Record) -> None:
        """Bring the block, the log and the findings into the state that was recorded with the block."""
        session = self.session
        session.log.restore(record.facts["log"])
        self._restore_neuron_orders(visit, record.facts["orders"])
        if not self.surveys:
            restore_block(visit.block, record, values=session.offloaded is None)
            return
        visit.findings = Record(record.tensors, record.facts["findings"])

    def write(self, visit: BlockVisit, position: LogPosition) -> None:
        """Record a finished block and the inputs of the next one.

        Args:
            position: where the log was when the run entered the block.
        """
        session, work = self.session, self.session.work
        if work is None:
            return
        orders = {}
        for name, order in session.log.neuron_orders.items():
            if name.startswith(f"{visit.name}."):
                orders[name] = order.tolist()
        facts = {"log": session.log.entries_since(position), "orders": orders}
        if visit.findings is None:
            record = block_record(visit.block, facts)
        else:
            record = Record(visit.findings.tensors, {**facts, "findings": visit.findings.facts})
        # The next inputs come first: where the block's record is there, they are there, too.
        inputs = inputs_record(self.batches, self._batch_count, session.group, session.cache)
        work.write(inputs_name(self.stage, visit.index + self.step), inputs)
        work.write(record_name(self.stage, visit.index), record)
        work.discard(inputs_name(self.stage, visit.index))

    def _restore_neuron_orders(self, visit: BlockVisit, orders: dict[str, list[int]]) -> None:
        session = self.session
        # A block on disk gets its order whenever it is loaded. The values of a block that is built have theirs.
        models: list[nn.Module] = []
        if self.surveys and session.offloaded is None:
            models.append(session.model)
        if session.dense_copy is not None:
            models.append(session.dense_copy)
        networks = {f"{visit.name}.{network.output}": network for network in find_feed_forwards(visit.block)}
        for name, indices in orders.items():
            if name in session.log.neuron_orders:
                continue
            session.log.neuron_orders[name] = torch.tensor(indices)
            apply_neuron_order(models, visit, networks[name], session.log.neuron_orders[name])


def recorded_findings(session: Session, stage: str, visit: BlockVisit) -> Record:
    """Return what a finished stage found out about a block, from the work folder."""
    record = session.work.read(record_name(stage, visit.index)) if session.work is not None else None
    assert record is not None, "written by the survey"
    return Record(record.tensors, record.facts["findings"])


def inputs_record(batches: Iterable[Carrier], count: int, group: ProcessGroup, cache: ActivationCache) -> Record:
    """Return the inputs of the next block for all `count` batches of the group, on the main process only.

    Inputs of other processes are put into the cache, as they do not fit into the memory of one.
    """
    tensors = {}
    own = [Record(batch.carried(), {}) for batch in batches]
    for position, inputs in enumerate(group.gather_to_main(own, count)):
        is_own = position % group.size == 0
        for name, tensor in inputs.tensors.items():
            tensors[f"{name}.{position}"] = tensor if is_own else cache.put(tensor).tensor
    return Record(tensors, {})


def restore_inputs(batches: Iterable[Carrier], count: int, group: ProcessGroup, work: WorkFolder, name: str) -> None:
    """Bring the batches to where they were when `inputs_record` gave the record of this name.

    Raises:
        CompressionError: if the record is not there, as the folder is damaged.
    """

    def read_parts() -> list[Record]:
        record = work.read_here(name)
        if record is None:
            raise work.damaged(name, "missing, or the record of the block is")
        kinds = {key.rpartition(".")[0] for key in record.tensors}
        parts = []
        for position in range(count):
            parts.append(Record({kind: record.tensors[f"{kind}.{position}"] for kind in kinds}, {}))
        return parts

    for batch, part in zip(batches, group.scatter(read_parts), strict=True):
        batch.carry(part.tensors)
