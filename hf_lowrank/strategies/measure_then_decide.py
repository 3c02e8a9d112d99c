"""Spectra of all layers in the dense model first, then ranks, then the layers."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from ..calibration import BlockBatch
from ..locking import locked
from ..methods import Statistics
from ..methods.soco import SoCo
from ..methods.spectral import Measurement, SpectralMethod
from ..report import sampled_spectrum
from ..spectrum_training import learn_spectrum
from .run import Run

SPECTRUM_STATE = "soco_state.safetensors"


def measure_then_decide(run: Run, method: SpectralMethod, batches: list[BlockBatch], work_dir: Path | None) -> None:
    """Compress every layer to the rank that the spectra of all of them give it."""
    measurements: dict[str, Measurement] = {}
    statistics: dict[str, Statistics] = {}
    for index, block, layers in run.walk():
        statistics |= run.gather(index, block, layers, batches)
        measurements |= {layer.name: method.measure(layer, run.weight(layer), statistics[layer.name]) for layer in layers}
    spectra = {name: sampled_spectrum(measurement.factorization.sigma) for name, measurement in measurements.items()}
    if isinstance(method, SoCo):
        measurements, ranks = _learn(run, method, measurements, work_dir)
    else:
        ranks = method.allocate(measurements, run.budget, run.available)
    for layer in run.compressed:
        rank = ranks[layer.name]
        if rank is None:
            run.reasons[layer.name] = f"{method.name} gives it a rank that would cost as much as the dense layer"
        else:
            run.swap(layer, measurements[layer.name].finish(rank), run.weight(layer), statistics[layer.name], spectra[layer.name])


def _learn(
    run: Run, method: SoCo, measurements: dict[str, Measurement], work_dir: Path | None
) -> tuple[dict[str, Measurement], dict[str, int | None]]:
    """SoCo's training; its state lives in the work folder until it is done, and no other process may use that meanwhile."""
    state: Path | None = None
    hold: AbstractContextManager[None] = nullcontext()
    if work_dir is not None:
        work_dir.mkdir(parents=True, exist_ok=True)
        state, hold = work_dir / SPECTRUM_STATE, locked(work_dir)
    with hold:
        learned, ranks, curve = learn_spectrum(
            run.model, method, measurements, run.tokens, run.budget, run.available, run.config.seed, state,
            lambda done, total: run.step("learning the spectrum", done, total),
        )  # fmt: skip
        if state is not None:
            state.unlink(missing_ok=True)
    run.curve = curve.__dict__
    return learned, ranks
