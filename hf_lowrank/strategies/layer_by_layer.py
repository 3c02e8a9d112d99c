"""Budgets first, then block by block: every layer is decomposed as soon as its statistics are known."""

from ..allocation import uniform_budgets
from ..budget import Budget, Layer
from ..calibration import BlockBatch, run_block
from ..methods import Statistics
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
        for layer in visit.layers:
            _compress_layer(run, layer, statistics.pop(layer.name), budgets[layer.name])
        for batch in batches:
            if method.sequential:
                batch.hidden = run_block(visit.block, visit.index, batch)
            elif batch.shifted is not None:
                batch.shifted.hidden = run_block(visit.block, visit.index, batch.shifted)


def _compress_layer(run: Run, layer: Layer, statistics: Statistics, budget: Budget) -> None:
    """Decompose a layer; its matrices in float64 are gone when this returns."""
    weight = run.weight(layer)
    run.swap(layer, run.method.decompose(weight, statistics, budget), weight, statistics)
