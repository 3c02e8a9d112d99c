"""The layers of a block, each solved by one of the processes, and several at a time on a CPU."""

from collections.abc import Callable, Iterator

from torch import Tensor

from ..budget import Layer
from ..execution.threads import parallel_slots
from ..execution.work_folder import Record
from ..methods import Statistics
from ..models.offloading import return_memory
from ..runtime.layers import CompressedLinear
from .fallback import BuildResult
from .records import build_result_from, build_result_record, merge_records
from .report import LayerReport, layer_report
from .session import Session


def solve_layers(
    session: Session, layers: list[Layer], build: Callable[[Layer], BuildResult]
) -> Iterator[tuple[Layer, BuildResult]]:
    """Yield every layer, in order, with what `build` made of it."""
    by_name = {layer.name: layer for layer in layers}

    def solve(name: str) -> BuildResult:
        session.show(name, len(session.log.reports), len(session.plan.compressed))
        return build(by_name[name])

    def unpack(name: str, record: Record) -> BuildResult:
        return build_result_from(record, session.model.get_submodule(name))

    results = session.group.map_balanced(
        solving_costs(layers), solve=solve, pack=build_result_record, unpack=unpack, threads=_threads(session, layers)
    )
    for name, result in results:
        yield by_name[name], result
    if session.offloaded is not None:
        return_memory()


def survey_layers(session: Session, layers: list[Layer], examine: Callable[[Layer], Record]) -> Record:
    """Return what `examine` finds out about the layers, as one record."""
    by_name = {layer.name: layer for layer in layers}
    results = session.group.map_balanced(
        solving_costs(layers),
        solve=lambda name: examine(by_name[name]),
        pack=lambda record: record,
        unpack=lambda name, record: record,
        threads=_threads(session, layers),
    )
    return merge_records(record for _, record in results)


def solving_costs(layers: list[Layer]) -> dict[str, float]:
    """Return how much work the layers are, one against the other: that of a decomposition, m n min(m, n)."""
    costs: dict[str, float] = {}
    for layer in layers:
        m, n = layer.out_features, layer.in_features
        costs[layer.name] = m * n * min(m, n)
    return costs


def report_on(
    session: Session,
    layer: Layer,
    compressed: CompressedLinear,
    weight: Tensor,
    statistics: Statistics,
    spectrum: list[float] | None = None,
) -> LayerReport:
    """Return the report on a compressed layer.

    The decomposition of the layer is larger than the layer. This is a function of its own so that the decomposition is
    freed before the report is made.
    """
    dense_bits = session.plan.budget.dense_bits(layer)
    return layer_report(layer.name, compressed, weight, statistics, dense_bits, spectrum)


def _threads(session: Session, layers: list[Layer]) -> int:
    """Return how many of the layers are solved at a time."""
    if session.device.type != "cpu":
        return 1
    return parallel_slots(max((session.method.working_memory(layer) for layer in layers), default=0))
