"""Budgets first, then block by block: every layer is decomposed as soon as its statistics are known."""

from functools import partial

from ...budget import Budget, Layer
from ...calibration import BlockBatch, run_block
from ...methods import Statistics
from ...methods.allocation import uniform_budgets
from ..fallback import BudgetShares, BuildResult, build_with_fallback
from ..report import compressed_input_error
from ..run import Run


def layerwise(run: Run, batches: list[BlockBatch]) -> None:
    """Compress every layer within its own share of the budget."""
    method = run.method

    def spread(layers: list[Layer], available: int) -> dict[str, Budget]:
        return uniform_budgets(method, layers, [], run.budget, available)

    shares = run.shares(spread(run.compressed, run.available), lambda layer, budget: budget.bits, spread)
    if method.needs_compressed_inputs:
        for batch in batches:
            batch.track_compressed()
    for visit in run.walk("built", batches):
        statistics = run.gather(visit, batches)
        run.build(visit.layers, partial(_compressed, run, statistics, shares), shares)
        del statistics  # of layers that other processes made
        for batch in batches:
            if method.sequential:
                batch.hidden = run_block(visit.block, visit.index, batch)
            elif batch.compressed_twin is not None:
                batch.compressed_twin.hidden = run_block(visit.block, visit.index, batch.compressed_twin)


def _compressed(
    run: Run, statistics: dict[str, Statistics], shares: BudgetShares[Budget], layer: Layer
) -> BuildResult:
    """Decompose a layer; its matrices in float64 are gone when this returns, and so are its statistics."""
    weight, known, budget = run.weight(layer), statistics.pop(layer.name), shares[layer.name]
    return build_with_fallback(
        known,
        lambda each: run.compressed_layer(layer, run.method.decompose(weight, each, budget)),
        lambda made: run.layer_report(layer, made, weight, known),
        (lambda made: compressed_input_error(weight, made.to_dense(weight.dtype), known))
        if run.method.needs_compressed_inputs
        else None,
    )
