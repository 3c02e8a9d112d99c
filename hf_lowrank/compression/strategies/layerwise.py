"""Budgets first, then block by block: every layer is decomposed as soon as its statistics are known."""

from functools import partial

from ...budget import Budget, Layer
from ...calibration import BlockBatch, run_block
from ...methods import Statistics
from ...methods.allocation import uniform_budgets
from ..fallback import Built, Shares, carefully
from ..report import shifted_error
from ..run import Run


def layer_by_layer(run: Run, batches: list[BlockBatch]) -> None:
    """Compress every layer within its own share of the budget."""
    method = run.method

    def spread(layers: list[Layer], available: int) -> dict[str, Budget]:
        return uniform_budgets(method, layers, [], run.budget, available)

    shares = run.shares(spread(run.compressed, run.available), lambda layer, budget: budget.bits, spread)
    if method.needs_shifted:
        for batch in batches:
            batch.shift()
    for visit in run.walk("built", batches):
        statistics = run.gather(visit, batches)
        run.build(visit.layers, partial(_compressed, run, statistics, shares), shares)
        del statistics  # of layers that other processes made
        for batch in batches:
            if method.sequential:
                batch.hidden = run_block(visit.block, visit.index, batch)
            elif batch.shifted is not None:
                batch.shifted.hidden = run_block(visit.block, visit.index, batch.shifted)


def _compressed(run: Run, statistics: dict[str, Statistics], shares: Shares[Budget], layer: Layer) -> Built:
    """Decompose a layer; its matrices in float64 are gone when this returns, and so are its statistics."""
    weight, known, budget = run.weight(layer), statistics.pop(layer.name), shares[layer.name]
    return carefully(
        known,
        lambda each: run.compressed_layer(layer, run.method.decompose(weight, each, budget)),
        lambda made: run.layer_report(layer, made, weight, known),
        (lambda made: shifted_error(weight, made.to_dense(weight.dtype), known)) if run.method.needs_shifted else None,
    )
