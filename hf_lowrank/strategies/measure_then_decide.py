"""Spectra of all layers in the dense model first, then ranks, then the layers."""

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from ..budget import Layer
from ..calibration import BlockBatch
from ..methods.soco import SoCo
from ..methods.spectral import Factorization, Measurement, SpectralMethod
from ..report import sampled_spectrum
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
            visit.found = _packed(method.measure(layer, run.weight(layer), statistics[layer.name]) for layer in visit.layers)
        found = _unpacked(visit.found, visit.layers)
        measurements |= found if run.offloaded is None else {name: _spectrum_alone(each) for name, each in found.items()}
    spectra = {name: sampled_spectrum(measurement.factorization.sigma) for name, measurement in measurements.items()}
    if isinstance(method, SoCo):
        measurements, ranks, curve = learn_spectrum(
            run.model, method, measurements, run.tokens, run.budget, run.available, run.config.seed, run.work,
            lambda done, total: run.step("learning the spectrum", done, total),
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
        for layer in visit.layers:
            rank = ranks[layer.name]
            if rank is None:
                run.reasons[layer.name] = f"{method.name} gives it a rank that would cost as much as the dense layer"
            else:
                decomposition = measurements[layer.name].finish(rank)
                run.swap(layer, decomposition, run.weight(layer), statistics[layer.name], spectra[layer.name])
            if run.offloaded is not None:
                del measurements[layer.name]


def _packed(measurements: Iterable[Measurement]) -> Record:
    """Measurements as a record; the bias and the scores, which are learned later, are not part of it."""
    tensors: dict[str, Tensor] = {}
    facts = {}
    for measurement in measurements:
        name, spectrum = measurement.layer.name, measurement.factorization
        tensors |= {f"{name}.left": spectrum.left, f"{name}.sigma": spectrum.sigma, f"{name}.right": spectrum.right}
        if measurement.weight is not None:
            tensors[f"{name}.weight"] = measurement.weight
        facts[name] = {"sparse": measurement.sparse, "kept": measurement.kept}
    return Record(tensors, facts)


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
