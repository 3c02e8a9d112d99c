"""The layerwise strategy gives every layer its budget first, and decomposes it as soon as its statistics are known."""

from collections.abc import Iterator
from functools import partial

from ...budget import Budget, Layer
from ...calibration import BlockBatch, run_block
from ...methods import Method, Statistics
from ...methods.allocation import uniform_budgets
from ...runtime.layers import CompressedLinear
from ..collecting import collect_statistics
from ..fallback import BudgetShares, BuildResult, build_with_fallback
from ..loss import measure_loss
from ..report import LayerReport, compressed_input_error
from ..resume import FINAL_STAGE
from ..session import BlockVisit, Session
from ..solving import report_on, solve_layers
from ..walk import Stage, walk
from .base import Passes, Strategy


class Layerwise(Strategy):
    """Compress every layer within its own share of the budget."""

    @staticmethod
    def compress(session: Session, batches: list[BlockBatch]) -> None:
        measure_loss(session, batches)
        if session.method.needs_compressed_inputs:
            for batch in batches:
                batch.track_compressed()
        walk(session, _Decompose(session, batches), batches)

    @staticmethod
    def passes(method: Method) -> Passes:
        """Return how often the calibration tokens go through a block.

        One pass captures the inputs, one collects the statistics, and a sequential method runs the compressed block
        once more. With compressed inputs both the batch and its twin go through the block, and two more sums are
        taken.
        """
        if method.needs_compressed_inputs:
            return Passes(forward=5, sums=3)
        return Passes(forward=3 if method.sequential else 2, sums=1)


class _Decompose(Stage[dict[str, Statistics]]):
    """Decompose the layers of every block."""

    name = FINAL_STAGE

    def __init__(self, session: Session, batches: list[BlockBatch]) -> None:
        self.session = session
        self.batches = batches
        plan = session.plan
        self.shares = BudgetShares(
            plan.compressed,
            self._spread(plan.compressed, plan.available_bits),
            session.log.kept_dense,
            bits=lambda layer, budget: budget.bits,
            dense_bits=plan.dense_bits,
            spread=self._spread,
        )

    def collect(self, visit: BlockVisit) -> dict[str, Statistics]:
        return collect_statistics(self.session, visit, self.batches)

    def solve(self, visit: BlockVisit, statistics: dict[str, Statistics]) -> Iterator[tuple[Layer, BuildResult]]:
        return solve_layers(self.session, visit.layers, build=partial(self._build, statistics))

    def propagate(self, visit: BlockVisit) -> None:
        for batch in self.batches:
            if self.session.method.sequential:
                batch.hidden = run_block(visit.block, visit.index, batch)
            elif batch.compressed_twin is not None:
                batch.compressed_twin.hidden = run_block(visit.block, visit.index, batch.compressed_twin)

    def _spread(self, layers: list[Layer], available_bits: int) -> dict[str, Budget]:
        plan = self.session.plan
        return uniform_budgets(plan.method, layers, [], plan.budget, available_bits)

    def _build(self, all_statistics: dict[str, Statistics], layer: Layer) -> BuildResult:
        """Decompose a layer. Its float64 matrices, and its statistics, are gone when this returns."""
        session, method = self.session, self.session.method
        weight = session.dense_weight(layer)
        statistics = all_statistics.pop(layer.name)
        budget = self.shares[layer.name]

        def build(damped: Statistics) -> CompressedLinear:
            return session.compressed_layer(layer, method.decompose(weight, damped, budget))

        def report(compressed: CompressedLinear) -> LayerReport:
            return report_on(session, layer, compressed, weight, statistics)

        def fitted_error(compressed: CompressedLinear) -> float:
            return compressed_input_error(weight, compressed.to_dense(weight.dtype), statistics)

        return build_with_fallback(
            statistics,
            build=build,
            report=report,
            fitted_error=fitted_error if method.needs_compressed_inputs else None,
        )
