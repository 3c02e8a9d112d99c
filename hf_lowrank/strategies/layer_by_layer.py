"""Budgets first, then block by block: every layer is decomposed as soon as its statistics are known."""

from ..allocation import uniform_budgets
from ..calibration import BlockBatch, run_block
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
            weight, known = run.weight(layer), statistics.pop(layer.name)
            run.swap(layer, method.decompose(weight, known, budgets[layer.name]), weight, known)
        for batch in batches:
            if method.sequential:
                batch.hidden = run_block(visit.block, visit.index, batch)
            elif batch.shifted is not None:
                batch.shifted.hidden = run_block(visit.block, visit.index, batch.shifted)
