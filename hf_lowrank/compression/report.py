"""The report of a compression: what was stored, what that takes, and what it lost."""

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..methods import Statistics
from ..models.linears import row_chunks
from ..runtime.layers import CompressedLinear

SPECTRUM_POINTS = 48
"""Number of singular values that the report shows of a layer."""


@dataclass
class LayerReport:
    """The report on one compressed layer.

    Attributes:
        kind, sparse, kept, rank, binary_rank, pivoted, weight_bits, lowrank_bits: as in `LayerSpec`.
        out_features, in_features: m and n.
        bits_per_weight: stored bits / (m n).
        dense_bits, stored_bits: bits of the whole layer with its bias, dense and compressed.
        relative_error: ‖(W − Ŵ) X‖ / ‖W X‖ on the calibration tokens, with the values as they are stored.
        metric: "gram" if the error is exact, "column_norms" if only the norms ‖X_j‖ were measured.
        tokens: calibration tokens that the layer saw.
        spectrum: the singular values in the calibration metric of the part of the dense weight that becomes low rank,
            before the rank was decided (see `sampled_spectrum`). None if the method needs none.
    """

    name: str
    kind: str
    sparse: str
    kept: int
    rank: int
    binary_rank: int
    pivoted: bool
    weight_bits: int
    lowrank_bits: int
    out_features: int
    in_features: int
    bits_per_weight: float
    dense_bits: int
    stored_bits: int
    relative_error: float
    metric: str
    tokens: int
    spectrum: list[float] | None = None


@dataclass
class BlockRefinement:
    """The refinement of a block.

    Attributes:
        before, after: its error ‖f(ĥ) − f_dense(h)‖² / ‖f_dense(h)‖²; None if it was not refined.
        reason: why it was not refined; None if it was.
    """

    name: str
    before: float | None
    after: float | None
    reason: str | None = None


@dataclass
class Report:
    """The report on a whole compression, as it is saved beside the checkpoint.

    It holds no times, so that the same seed gives the same bytes.

    Attributes:
        ratio_asked: the fraction of the dense bits of all block linears that was to be removed.
        ratio_stored: the fraction that is removed.
        ratio_paper: the same without mask bits, as papers count.
        layers: one entry per compressed layer.
        dense: reason of each layer that stays dense, by name.
        retried: by name, what was wrong with a layer at first, and how it was built again.
        bad: by name, what is wrong with a layer that was no better then, and that the others could not pay for leaving
            dense.
        warnings: what the user must know.
        curve: SoCo's loss, ratio and phase per step.
        refinement: one entry per block, if blocks were refined. The errors of the layers are then those after it.
    """

    method: str
    ratio_asked: float
    ratio_stored: float
    ratio_paper: float
    accounting: str
    layers: list[LayerReport]
    dense: dict[str, str]
    retried: dict[str, str] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    curve: dict[str, list[float]] | None = None
    refinement: list[BlockRefinement] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def scarce_tokens(reports: list[LayerReport], banks: Collection[str]) -> list[str]:
    """Return warnings about layers without calibration tokens, and about experts with fewer of them than inputs."""
    warnings = []
    unseen = [report.name for report in reports if not report.tokens]
    if unseen:
        warnings.append(
            f"{len(unseen)} layers saw no calibration token, such as {unseen[0]}; they are compressed without data"
        )
    experts = [report for report in reports if report.name.rsplit(".", 2)[0] in banks]
    scarce = [report for report in experts if 0 < report.tokens < report.in_features]
    if scarce:
        worst = min(scarce, key=lambda report: report.tokens / report.in_features)
        warnings.append(
            f"{len(scarce)} of {len(experts)} expert layers saw fewer calibration tokens than they have inputs, "
            f"{worst.name} the fewest ({worst.tokens} for {worst.in_features}); more samples tell more about them"
        )
    return warnings


def layer_report(
    name: str,
    layer: CompressedLinear,
    weight: Tensor,
    statistics: Statistics,
    dense_bits: int,
    spectrum: list[float] | None = None,
) -> LayerReport:
    """Measure a compressed layer against the weight (m, n) that it replaces."""
    bits = layer.stored_bits()
    spec = layer.spec
    return LayerReport(
        name=name,
        kind=spec.kind,
        sparse=spec.sparse,
        kept=spec.kept,
        rank=spec.rank,
        binary_rank=spec.binary_rank,
        pivoted=spec.pivoted,
        weight_bits=spec.weight_bits,
        lowrank_bits=spec.lowrank_bits,
        out_features=layer.out_features,
        in_features=layer.in_features,
        bits_per_weight=bits / weight.numel(),
        dense_bits=dense_bits,
        stored_bits=bits,
        relative_error=relative_error(weight, layer.to_dense(weight.dtype), statistics),
        metric="column_norms" if statistics.gram is None else "gram",
        tokens=statistics.tokens,
        spectrum=spectrum,
    )


def sampled_spectrum(sigma: Tensor) -> list[float]:
    """Return singular values in units of the largest, with four digits.

    Args:
        sigma: falling singular values (k,), of which at most `SPECTRUM_POINTS` evenly spaced ones are returned.
    """
    if not len(sigma):
        return []
    count = min(len(sigma), SPECTRUM_POINTS)
    positions = torch.linspace(0, len(sigma) - 1, count).round().long()
    largest = sigma.max().clamp(min=torch.finfo(sigma.dtype).tiny)
    values = (sigma.double() / largest).cpu()[positions]
    return [float(f"{value:.4g}") for value in values.tolist()]


def relative_error(weight: Tensor, approximation: Tensor, statistics: Statistics) -> float:
    """Return ‖(W − Ŵ) X‖ / ‖W X‖ in the metric of the statistics, or 0 if ‖W X‖ is zero."""
    lost = whole = weight.new_zeros(())
    for rows in row_chunks(weight):
        lost = lost + _energy(weight[rows] - approximation[rows], statistics)
        whole = whole + _energy(weight[rows], statistics)
    return _root_of_share(lost, whole)


def compressed_input_error(weight: Tensor, approximation: Tensor, statistics: Statistics) -> float:
    """Return ‖W X − Ŵ X̂‖ / ‖W X‖, where X̂ are the inputs in the compressed model, or 0 if ‖W X‖ is zero."""
    C, M, C_hat = statistics.gram, statistics.cross_gram, statistics.compressed_input_gram
    assert C is not None and M is not None and C_hat is not None, "methods that need compressed inputs have them"
    whole = ((weight @ C) * weight).sum()
    crossed = ((weight @ M) * approximation).sum()
    lost = whole - 2 * crossed + ((approximation @ C_hat) * approximation).sum()
    return _root_of_share(lost, whole)


def _root_of_share(lost: Tensor, whole: Tensor) -> float:
    # Rounding may leave an energy of nearly zero below zero.
    return float((lost / whole).clamp(min=0).sqrt()) if float(whole) > 0 else 0.0


def _energy(matrix: Tensor, statistics: Statistics) -> Tensor:
    """Return ‖matrix X‖², with the norms ‖X_j‖ alone where no Gram matrix was summed."""
    if statistics.gram is None:
        return (matrix * statistics.column_norms).square().sum()
    return ((matrix @ statistics.gram) * matrix).sum()
