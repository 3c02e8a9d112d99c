"""Budgets first, then block by block: every layer is decomposed as soon as its statistics are known."""

from functools import partial

from ..allocation import uniform_budgets
from ..budget import Budget, Layer
from ..calibration import BlockBatch, run_block
from ..methods import Statistics
from ..report import LayerReport
from ..runtime.layers import CompressedLinear
from .run import Run


def layer_by_layer(run: Run, batches: list[BlockBatch]) -> None:
    """Compress every layer within its own share of the budget."""
    method = run.method
    budgets = uniform_budgets(method, run.compressed, run.dense, run.budget)
    if method.needs_shifted:
        for batch in batches:
            batch.shift()
    for visit in run.walk("built", batches):
        statistics = run.gather(visit, batches)
        run.build(visit.layers, partial(_compressed, run, statistics, budgets))
        del statistics  # of layers that other processes made
        for batch in batches:
            if method.sequential:
                batch.hidden = run_block(visit.block, visit.index, batch)
            elif batch.shifted is not None:
                batch.shifted.hidden = run_block(visit.block, visit.index, batch.shifted)


def _compressed(
    run: Run, statistics: dict[str, Statistics], budgets: dict[str, Budget], layer: Layer
) -> tuple[CompressedLinear, LayerReport]:
    """Decompose a layer; its matrices in float64 are gone when this returns, and so are its statistics."""
    weight, known = run.weight(layer), statistics.pop(layer.name)
    made = run.compressed_layer(layer, run.method.decompose(weight, known, budgets[layer.name]))
    return made, run.layer_report(layer, made, weight, known)
