"""Spectra of all layers in the dense model first, then ranks, then the layers."""

from dataclasses import replace
from functools import partial

from ...budget import Layer
from ...calibration import BlockBatch
from ...execution.work_folder import Record
from ...methods import Statistics
from ...methods.allocation import fitted_ranks
from ...methods.soco import SoCo
from ...methods.spectral import Factorization, Measurement, SpectralMethod, prices
from ...runtime.layers import CompressedLinear
from ..fallback import BuildResult, build_with_fallback
from ..report import sampled_spectrum
from ..run import Run
from ..soco_training import learn_spectrum

STAGE = "measured"


def spectral_strategy(run: Run, method: SpectralMethod, batches: list[BlockBatch]) -> None:
    """Compress every layer to the rank that the spectra of all of them give it."""
    measurements: dict[str, Measurement] = {}
    for visit in run.walk(STAGE, batches, surveys=True):
        if visit.found is None:
            statistics = run.gather(visit, batches)
            visit.found = run.survey(visit.layers, partial(_measured, run, method, statistics))
        found = _unpacked(visit.found, visit.layers)
        measurements |= (
            found if run.offloaded is None else {name: _spectrum_alone(each) for name, each in found.items()}
        )
    spectra = {name: sampled_spectrum(measurement.factorization.sigma) for name, measurement in measurements.items()}
    if isinstance(method, SoCo):
        measurements, ranks, curve = learn_spectrum(
            run.model, method, measurements, run.tokens, run.budget, run.available, run.config.seed, run.work,
            lambda done, total: run.step("learning the spectrum", done, total), run.group,
        )  # fmt: skip
        run.curve = curve.__dict__
    else:
        ranks = method.allocate(measurements, run.budget, run.available)
    price, dense_price, fixed = prices(measurements, run.budget)
    limit = {name: rank or 0 for name, rank in ranks.items()}

    def bits(layer: Layer, rank: int | None) -> int:
        return dense_price[layer.name] if rank is None else fixed[layer.name] + rank * price[layer.name]

    def spread(layers: list[Layer], available: int) -> dict[str, int | None]:
        wanted: dict[str, float | None] = {layer.name: ranks[layer.name] for layer in layers}
        return fitted_ranks(wanted, price, dense_price, fixed, limit, available)

    shares = run.shares(ranks, bits, spread)
    for batch in batches:
        batch.rewind()
    for visit in run.walk("built", batches):
        statistics = run.gather(visit, batches)  # those of all blocks together would not fit into memory
        if run.offloaded is not None:
            record = run.work.read(run.record_name(STAGE, visit.index)) if run.work else None
            assert record is not None, "written by the survey"
            measurements |= _unpacked(Record(record.tensors, record.facts["found"]), visit.layers)
        full = [layer for layer in visit.layers if shares[layer.name] is None]
        run.reasons |= {
            layer.name: f"{method.name} gives it a rank that would cost as much as the dense layer" for layer in full
        }
        cut = {layer.name: rank for layer in visit.layers if (rank := shares[layer.name]) is not None}
        make = partial(_truncated, run, method, measurements, statistics, cut, spectra)
        run.build([layer for layer in visit.layers if layer.name in cut], make, shares)
        if run.offloaded is not None:
            for layer in visit.layers:
                del measurements[layer.name]


def _measured(run: Run, method: SpectralMethod, statistics: dict[str, Statistics], layer: Layer) -> Record:
    """A measurement as a record; the bias and the scores, which are learned later, are not part of it."""
    measurement = method.measure(layer, run.weight(layer), statistics[layer.name])
    name, spectrum = layer.name, measurement.factorization
    tensors = {f"{name}.left": spectrum.left, f"{name}.sigma": spectrum.sigma, f"{name}.right": spectrum.right}
    if measurement.weight is not None:
        tensors[f"{name}.weight"] = measurement.weight
    return Record(tensors, {name: {"sparse": measurement.sparse, "kept": measurement.kept}})


def _truncated(
    run: Run,
    method: SpectralMethod,
    measurements: dict[str, Measurement],
    statistics: dict[str, Statistics],
    ranks: dict[str, int],
    spectra: dict[str, list[float]],
    layer: Layer,
) -> BuildResult:
    """A layer at its rank. A spectrum that was learned is fitted to the model's outputs, not the layer's, so its error is no fault."""
    name, weight, known = layer.name, run.weight(layer), statistics[layer.name]

    def make(each: Statistics) -> CompressedLinear:
        measurement = measurements[name] if each is known else method.measure(layer, weight, each)
        return run.compressed_layer(layer, measurement.truncate(ranks[name]))

    learned = measurements[name].scores is not None
    return build_with_fallback(
        known,
        make,
        lambda made: run.layer_report(layer, made, weight, known, spectra[name]),
        (lambda made: 0.0) if learned else None,
    )


def _spectrum_alone(measurement: Measurement) -> Measurement:
    """The measurement without its vectors, which a model that does not fit into memory leaves in their record."""
    spectrum = measurement.factorization
    return replace(
        measurement,
        weight=None,
        factorization=Factorization(spectrum.left[:0, :0], spectrum.sigma, spectrum.right[:0, :0]),
    )


def _unpacked(record: Record, layers: list[Layer]) -> dict[str, Measurement]:
    tensors = record.tensors
    found = {}
    for layer in layers:
        name = layer.name
        spectrum = Factorization(tensors[f"{name}.left"], tensors[f"{name}.sigma"], tensors[f"{name}.right"])
        found[name] = replace(Measurement(layer, spectrum, **record.facts[name]), weight=tensors.get(f"{name}.weight"))
    return found
