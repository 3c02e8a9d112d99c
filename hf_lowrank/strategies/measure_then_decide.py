"""Spectra of all layers in the dense model first, then ranks, then the layers."""

from dataclasses import replace
from functools import partial

from ..budget import Layer
from ..calibration import BlockBatch
from ..methods import Statistics
from ..methods.soco import SoCo
from ..methods.spectral import Factorization, Measurement, SpectralMethod
from ..report import LayerReport, sampled_spectrum
from ..runtime.layers import CompressedLinear
from ..spectrum_training import learn_spectrum
from ..work_folder import Record
from .run import Run

STAGE = "measured"


def measure_then_decide(run: Run, method: SpectralMethod, batches: list[BlockBatch]) -> None:
    """Compress every layer to the rank that the spectra of all of them give it."""
    measurements: dict[str, Measurement] = {}
    for visit in run.walk(STAGE, batches, surveys=True):
        if visit.found is None:
            statistics = run.gather(visit, batches)
            visit.found = run.survey(visit.layers, partial(_measured, run, method, statistics))
        found = _unpacked(visit.found, visit.layers)
        measurements |= found if run.offloaded is None else {name: _spectrum_alone(each) for name, each in found.items()}
    spectra = {name: sampled_spectrum(measurement.factorization.sigma) for name, measurement in measurements.items()}
    if isinstance(method, SoCo):
        measurements, ranks, curve = learn_spectrum(
            run.model, method, measurements, run.tokens, run.budget, run.available, run.config.seed, run.work,
            lambda done, total: run.step("learning the spectrum", done, total), run.team,
        )  # fmt: skip
        run.curve = curve.__dict__
    else:
        ranks = method.allocate(measurements, run.budget, run.available)
    for batch in batches:
        batch.start()
    for visit in run.walk("built", batches):
        statistics = run.gather(visit, batches)  # those of all blocks together would not fit into memory
        if run.offloaded is not None:
            record = run.work.read(run.record_name(STAGE, visit.index)) if run.work else None
            assert record is not None, "written by the survey"
            measurements |= _unpacked(Record(record.tensors, record.facts["found"]), visit.layers)
        full = [layer for layer in visit.layers if ranks[layer.name] is None]
        run.reasons |= {layer.name: f"{method.name} gives it a rank that would cost as much as the dense layer" for layer in full}
        cut = {layer.name: rank for layer in visit.layers if (rank := ranks[layer.name]) is not None}
        make = partial(_truncated, run, measurements, statistics, cut, spectra)
        run.build([layer for layer in visit.layers if layer.name in cut], make)
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
    measurements: dict[str, Measurement],
    statistics: dict[str, Statistics],
    ranks: dict[str, int],
    spectra: dict[str, list[float]],
    layer: Layer,
) -> tuple[CompressedLinear, LayerReport]:
    name = layer.name
    made = run.compressed_layer(layer, measurements[name].finish(ranks[name]))
    return made, run.layer_report(layer, made, run.weight(layer), statistics[name], spectra[name])


def _spectrum_alone(measurement: Measurement) -> Measurement:
    """The measurement without its vectors, which a model that does not fit into memory leaves in their record."""
    spectrum = measurement.factorization
    return replace(measurement, weight=None, factorization=Factorization(spectrum.left[:0, :0], spectrum.sigma, spectrum.right[:0, :0]))


def _unpacked(record: Record, layers: list[Layer]) -> dict[str, Measurement]:
    tensors = record.tensors
    found = {}
    for layer in layers:
        name = layer.name
        spectrum = Factorization(tensors[f"{name}.left"], tensors[f"{name}.sigma"], tensors[f"{name}.right"])
        found[name] = replace(Measurement(layer, spectrum, **record.facts[name]), weight=tensors.get(f"{name}.weight"))
    return found
