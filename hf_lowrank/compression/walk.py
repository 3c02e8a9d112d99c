"""The loop over the blocks of a model.

Every strategy runs it once or more often, forward or back, each time with a `Stage` that says what happens to a block.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from ..budget import Layer
from ..calibration import BlockBatch, Carrier, capture, starts_new_block_list
from ..execution.work_folder import Record
from ..models.architectures import find_feed_forwards
from ..models.linears import replace_layer
from ..runtime.errors import NumericalError
from .fallback import BudgetShares, BuildResult
from .neurons import apply_neuron_order
from .resume import StageRecords
from .session import BlockVisit, Session

S = TypeVar("S")


class Stage(ABC, Generic[S]):
    """The work of one walk on each block. `S` is the type of the statistics that it collects before it solves.

    A stage either *replaces* layers: it yields them, and they are recorded with their block. Or it *surveys*: it
    leaves its findings in `visit.findings`, which are recorded in the block's place. Exactly one stage of a strategy
    replaces layers. It is the last one, and its name is `FINAL_STAGE`. Between two walks the strategy rewinds the
    batches.

    Attributes:
        name: names the records of finished blocks in the work folder.
        surveys: whether the stage leaves findings and replaces no layer.
        shares: the share of each layer in the budget; only for a stage that replaces layers.
    """

    name: str
    surveys: bool = False
    shares: BudgetShares[Any]

    @abstractmethod
    def collect(self, visit: BlockVisit) -> S:
        """Collect the statistics that the layers of a block are solved from, on the inputs of the block."""

    @abstractmethod
    def solve(self, visit: BlockVisit, statistics: S) -> Iterable[tuple[Layer, BuildResult]]:
        """Yield each layer with its outcome. A layer is installed before the next one is asked for."""

    def propagate(self, visit: BlockVisit) -> None:
        """Carry the batches through the block as it is now, where `collect` has not done so."""

    def accept(self, visit: BlockVisit) -> None:
        """Take over the findings of a surveyed block, which were made now or before the run was killed."""


def walk(session: Session, stage: Stage[S], batches: list[BlockBatch]) -> None:
    """Take every block in turn, from the first to the last.

    A block that the work folder holds already is restored from its record, and the walk continues with the next block.
    """
    records = StageRecords(session, stage.name, stage.surveys, batches)
    for visit in visits(session):
        finished = records.read(visit)
        if starts_new_block_list(batches, visit.index):
            enter_block_list(session, visit, batches)
        _take(session, stage, visit, records, finished)


def walk_back(session: Session, stage: Stage[S], batches: Sequence[Carrier]) -> None:
    """Take every block in turn, from the last to the first, with batches that carry a gradient.

    Blocks that the work folder holds already are restored, as by `walk`.
    """
    records = StageRecords(session, stage.name, stage.surveys, batches, step=-1)
    for visit in visits(session, backward=True):
        _take(session, stage, visit, records, records.read(visit))


def _take(
    session: Session, stage: Stage[S], visit: BlockVisit, records: StageRecords, finished: Record | None
) -> None:
    """Do the work of a stage on one block, or restore what was recorded of it."""
    if finished is not None:
        records.restore(visit, finished)
    else:
        position = session.log.position()
        load(session, visit)
        statistics = stage.collect(visit)
        for layer, result in stage.solve(visit, statistics):
            install(session, stage.shares, layer, result)
        # The statistics go before the block is run once more: its activations need the room.
        del statistics
        stage.propagate(visit)
        records.write(visit, position)
        unload(session, visit)
    if visit.findings is not None:
        stage.accept(visit)


def visits(session: Session, backward: bool = False) -> Iterator[BlockVisit]:
    """Yield a visit for every block, and show how many layers are done."""
    layers_done = 0
    blocks = list(enumerate(session.plan.blocks.items()))
    for index, (name, block) in reversed(blocks) if backward else blocks:
        layers = [layer for layer in session.plan.compressed if layer.block == index]
        session.show(name, layers_done, len(session.plan.compressed))
        layers_done += len(layers)
        yield BlockVisit(index, name, block, layers)


def load(session: Session, visit: BlockVisit) -> None:
    """Bring a block to the device where it is computed.

    A block from disk also gets its neurons in the order that an earlier walk gave them.
    """
    if session.offloaded is None:
        visit.block.to(session.device)
        return
    session.offloaded.load(visit.name)
    for network in find_feed_forwards(visit.block):
        order = session.log.neuron_orders.get(f"{visit.name}.{network.output}")
        if order is not None:
            apply_neuron_order([session.model], visit, network, order)


def unload(session: Session, visit: BlockVisit) -> None:
    """Take a block back to the model, or free its weights if they are on disk: compressed ones are in its record."""
    if session.offloaded is not None:
        session.offloaded.unload(visit.name)
    else:
        visit.block.to(session.model.device)


def install(session: Session, shares: BudgetShares[Any], layer: Layer, result: BuildResult) -> None:
    """Put a compressed layer in the place of the dense one, and log its report. A failed layer stays dense if it can.

    Raises:
        NumericalError: if no attempt gave finite values, and the layers of later blocks cannot pay for a dense layer.
    """
    log, name, method = session.log, layer.name, session.method.name
    is_useless = result.fault is not None and result.remedy is None
    if is_useless and shares.keep_dense(layer, at_any_price=result.layer is None):
        log.reasons[name] = f"{method} fails on it ({result.fault}); layers after it pay for leaving it dense"
        return
    if result.layer is None or result.report is None:
        raise NumericalError(
            f"{name}: {method} fails ({result.fault}); leave the layer dense (modules_to_not_convert)"
        )
    if result.remedy is not None:
        error = result.report.relative_error
        log.retried[name] = f"{result.fault}; now {error:.3g}, on {result.remedy}"
    elif result.fault is not None:
        log.failed[name] = f"{result.fault}, and no better when made again"
    replace_layer(session.model, name, result.layer)
    log.reports.append(result.report)


def enter_block_list(session: Session, visit: BlockVisit, batches: list[BlockBatch]) -> None:
    """Bring the batches to a block that does not continue the one before it, such as the first one of a decoder.

    A decoder also reads the states of the encoder. They are those of the compressed encoder for a sequential method,
    and for the compressed twin of a batch: the partly compressed model is then run once more to capture them.
    """
    model, index = session.model, visit.index
    assert session.offloaded is None, "refused by check_continuous: running the model would need all of it"
    captured = batches
    has_twins = any(batch.compressed_twin is not None for batch in batches)
    if session.method.sequential or has_twins:
        sources = [batch.source for batch in batches if batch.source is not None]
        captured = capture(model, session.plan.blocks, sources, session.cache, session.plan.dense_blocks)
    for position, batch in enumerate(batches):
        if session.method.sequential:
            batches[position] = captured[position]
            batches[position].hidden = batch.hidden
        elif batch.compressed_twin is not None:
            captured[position].hidden = batch.compressed_twin.hidden
            batch.compressed_twin = captured[position]
            batch.compressed_twin.enter_block_list(index)
        batches[position].enter_block_list(index)
