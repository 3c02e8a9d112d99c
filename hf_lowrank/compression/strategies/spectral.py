"""The spectral strategy measures the spectra of all layers, decides on all ranks, and then truncates the layers."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import cast

import torch

from ...budget import Layer
from ...calibration import BlockBatch
from ...execution.work_folder import Record
from ...methods import Method, Statistics
from ...methods.allocation import fitted_ranks
from ...methods.soco import SoCo
from ...methods.spectral import Factorization, Measurement, SpectralMethod, prices
from ...runtime.layers import CompressedLinear
from ..collecting import collect_statistics
from ..fallback import BudgetShares, BuildResult, build_with_fallback
from ..loss import measure_loss
from ..report import LayerReport, sampled_spectrum
from ..resume import FINAL_STAGE, recorded_findings
from ..session import BlockVisit, Session
from ..soco_training import learn_spectrum
from ..solving import report_on, solve_layers, survey_layers
from ..walk import Stage, walk
from .base import Passes, Strategy


class Spectral(Strategy):
    """Compress every layer to the rank that the spectra of all layers give it."""

    methods = SpectralMethod
    trained = SoCo

    @staticmethod
    def compress(session: Session, batches: list[BlockBatch]) -> None:
        method = cast(SpectralMethod, session.method)  # which declares this strategy
        measure_loss(session, batches)
        measure = _Measure(session, method, batches)
        walk(session, measure, batches)
        measurements = measure.measurements
        spectra = {}
        for name, measurement in measurements.items():
            spectra[name] = sampled_spectrum(measurement.factorization.sigma)
        measurements, ranks = decide_ranks(session, method, measurements)
        for batch in batches:
            batch.rewind()
        walk(session, _Truncate(session, method, batches, measurements, ranks, spectra), batches)

    @staticmethod
    def passes(method: Method) -> Passes:
        """One pass captures the inputs, one measures the spectra, and one collects the statistics for the reports."""
        return Passes(forward=3, sums=2)

    @staticmethod
    def survey_bytes(layers: list[Layer]) -> int:
        """The factors of every layer stay in the work folder until the ranks of all are known."""
        values = 0
        for layer in layers:
            m, n = layer.out_features, layer.in_features
            values += (m + n) * min(m, n)
        return values * torch.float64.itemsize


def decide_ranks(
    session: Session, method: SpectralMethod, measurements: dict[str, Measurement]
) -> tuple[dict[str, Measurement], dict[str, int | None]]:
    """Return the measurements, with learned scores if the method trains, and the rank of each layer (None: dense)."""
    plan = session.plan
    if not method.trains:
        return measurements, method.allocate(measurements, plan.budget, plan.available_bits)
    measurements, ranks, curve = learn_spectrum(
        session.model,
        cast(SoCo, method),  # the one spectral method that trains, see `Strategy.check`
        measurements,
        session.tokens,
        plan.budget,
        plan.available_bits,
        plan.config.seed,
        work=session.work,
        on_step=lambda done, total: session.show("learning the spectrum", done, total),
        group=session.group,
    )
    session.log.curve = curve.__dict__
    return measurements, ranks


class _Measure(Stage[dict[str, Statistics]]):
    """Factorize every layer of the dense model."""

    name = "measured"
    surveys = True

    def __init__(self, session: Session, method: SpectralMethod, batches: list[BlockBatch]) -> None:
        self.session = session
        self.method = method
        self.batches = batches
        self.measurements: dict[str, Measurement] = {}

    def collect(self, visit: BlockVisit) -> dict[str, Statistics]:
        return collect_statistics(self.session, visit, self.batches)

    def solve(self, visit: BlockVisit, statistics: dict[str, Statistics]) -> Iterable[tuple[Layer, BuildResult]]:
        visit.findings = survey_layers(self.session, visit.layers, examine=partial(self._measure, statistics))
        return ()

    def accept(self, visit: BlockVisit) -> None:
        assert visit.findings is not None
        for name, measurement in measurements_from(visit.findings, visit.layers).items():
            # The singular vectors of a model that does not fit into memory stay in the work folder.
            self.measurements[name] = measurement if self.session.offloaded is None else spectrum_alone(measurement)

    def _measure(self, statistics: dict[str, Statistics], layer: Layer) -> Record:
        """Return a measurement as a record. Its bias and its scores are learned later, and not part of it."""
        measurement = self.method.measure(layer, self.session.dense_weight(layer), statistics[layer.name])
        name, factors = layer.name, measurement.factorization
        tensors = {f"{name}.left": factors.left, f"{name}.sigma": factors.sigma, f"{name}.right": factors.right}
        if measurement.weight is not None:
            tensors[f"{name}.weight"] = measurement.weight
        # The factors of all layers wait where the model is.
        home = self.session.model.device
        tensors = {key: tensor.to(home) for key, tensor in tensors.items()}
        return Record(tensors, {name: {"sparse": measurement.sparse, "kept": measurement.kept}})


class _Truncate(Stage[dict[str, Statistics]]):
    """Truncate every layer to its rank.

    Statistics are collected anew, as those of all blocks together would not fit into memory.

    Args:
        spectra: the spectrum of each layer as its report shows it.
    """

    name = FINAL_STAGE

    def __init__(
        self,
        session: Session,
        method: SpectralMethod,
        batches: list[BlockBatch],
        measurements: dict[str, Measurement],
        ranks: dict[str, int | None],
        spectra: dict[str, list[float]],
    ) -> None:
        self.session = session
        self.method = method
        self.batches = batches
        self.measurements = measurements
        self.ranks = ranks
        self.spectra = spectra
        # `BudgetShares` lowers `ranks` in place where a layer stays dense. No layer gets more than it has now.
        self._largest_ranks = {name: rank or 0 for name, rank in ranks.items()}
        plan = session.plan
        self._price, self._dense_price, self._fixed = prices(measurements, plan.budget)
        self.shares = BudgetShares(
            plan.compressed,
            ranks,
            session.log.kept_dense,
            bits=self._bits,
            dense_bits=plan.dense_bits,
            spread=self._spread,
        )

    def collect(self, visit: BlockVisit) -> dict[str, Statistics]:
        return collect_statistics(self.session, visit, self.batches)

    def solve(self, visit: BlockVisit, statistics: dict[str, Statistics]) -> Iterator[tuple[Layer, BuildResult]]:
        session = self.session
        if session.offloaded is not None:
            findings = recorded_findings(session, _Measure.name, visit)
            self.measurements |= measurements_from(findings, visit.layers)
        ranks: dict[str, int] = {}
        for layer in visit.layers:
            rank = self.shares[layer.name]
            if rank is None:
                session.log.reasons[layer.name] = (
                    f"{self.method.name} gives it a rank that would cost as much as the dense layer"
                )
            else:
                ranks[layer.name] = rank
        truncated = [layer for layer in visit.layers if layer.name in ranks]
        yield from solve_layers(session, truncated, build=partial(self._build, statistics, ranks))
        if session.offloaded is not None:
            for layer in visit.layers:
                del self.measurements[layer.name]

    def _bits(self, layer: Layer, rank: int | None) -> int:
        name = layer.name
        return self._dense_price[name] if rank is None else self._fixed[name] + rank * self._price[name]

    def _spread(self, layers: list[Layer], available_bits: int) -> dict[str, int | None]:
        wanted: dict[str, float | None] = {layer.name: self.ranks[layer.name] for layer in layers}
        return fitted_ranks(wanted, self._price, self._dense_price, self._fixed, self._largest_ranks, available_bits)

    def _build(self, all_statistics: dict[str, Statistics], ranks: dict[str, int], layer: Layer) -> BuildResult:
        """Truncate a layer to its rank."""
        session, name = self.session, layer.name
        weight, statistics = session.dense_weight(layer), all_statistics[name]

        def build(damped: Statistics) -> CompressedLinear:
            # The measurement was made on the statistics as they are.
            is_measured = damped is statistics
            measurement = self.measurements[name] if is_measured else self.method.measure(layer, weight, damped)
            return session.compressed_layer(layer, measurement.truncate(ranks[name]))

        def report(compressed: CompressedLinear) -> LayerReport:
            return report_on(session, layer, compressed, weight, statistics, self.spectra[name])

        # A learned spectrum is fitted to the outputs of the model, not of the layer: the error of the layer is no
        # fault.
        was_learned = self.measurements[name].scores is not None
        return build_with_fallback(
            statistics,
            build=build,
            report=report,
            fitted_error=(lambda compressed: 0.0) if was_learned else None,
        )


def spectrum_alone(measurement: Measurement) -> Measurement:
    """Return the measurement without its vectors and its weight."""
    factors = measurement.factorization
    empty = Factorization(factors.left[:0, :0], factors.sigma, factors.right[:0, :0])
    return replace(measurement, weight=None, factorization=empty)


def measurements_from(record: Record, layers: list[Layer]) -> dict[str, Measurement]:
    """Return the measurements of these layers that a record holds, by name."""
    tensors = record.tensors
    measurements = {}
    for layer in layers:
        name = layer.name
        factors = Factorization(tensors[f"{name}.left"], tensors[f"{name}.sigma"], tensors[f"{name}.right"])
        measurement = Measurement(layer, factors, **record.facts[name])
        measurements[name] = replace(measurement, weight=tensors.get(f"{name}.weight"))
    return measurements
