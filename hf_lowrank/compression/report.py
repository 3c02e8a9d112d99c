"""What was stored, what it cost, what it lost."""

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..methods.base import Statistics
from ..models.linears import row_chunks
from ..runtime.layers import CompressedLinear

SPECTRUM_POINTS = 48


@dataclass
class LayerReport:
    """One compressed layer.

    Attributes:
        kind, sparse, kept, rank, binary_rank, pivoted, weight_bits, lowrank_bits: as in `LayerSpec`.
        out_features, in_features: m and n.
        bits_per_weight: stored bits / (m n); dense_bits, stored_bits: of the whole layer with its bias.
        relative_error: ‖(W − Ŵ) X‖ / ‖W X‖ on the calibration tokens, with the values as they are stored.
        metric: "gram" if that is exact, "column_norms" if only the norms ‖X_j‖ were measured.
        tokens: calibration tokens that the layer saw.
        spectrum: what the method knew of the singular values before it decided on the rank (see `sampled_spectrum`): of the part
            of the dense weight that becomes low rank, in the calibration metric; None if it needs none.
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
    """A block's error ‖f(ĥ) − f_dense(h)‖² / ‖f_dense(h)‖² on the calibration tokens, before and after its refinement."""

    name: str
    before: float
    after: float


@dataclass
class Report:
    """A whole compression, as it is saved beside the checkpoint; without times, so that the same seed gives the same bytes.

    Attributes:
        ratio_asked, ratio_stored: fractions of the dense bits of all block linears that were to be, and are, removed.
        ratio_paper: the same with mask bits left out, as papers count.
        layers: one entry per compressed layer. dense: reason of each layer left dense, by name.
        retried: by name, what was wrong with a layer at first, and how it was made again.
        bad: by name, what is wrong with a layer that was no better then, and that the others could not pay for leaving dense.
        warnings: what the user must know.
        curve: SoCo's loss, ratio and phase per step.
        refinement: one entry per block, if blocks were refined; the errors of the layers are then those after it.
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
    """What the user must know about layers without calibration tokens, and about experts with fewer of them than inputs."""
    warnings = []
    unseen = [report.name for report in reports if not report.tokens]
    if unseen:
        warnings.append(
            f"{len(unseen)} layers saw no calibration token, such as {unseen[0]}; they are compressed without data"
        )
    experts = [report for report in reports if report.name.rsplit(".", 2)[0] in banks]
    few = [report for report in experts if 0 < report.tokens < report.in_features]
    if few:
        worst = min(few, key=lambda report: report.tokens / report.in_features)
        warnings.append(
            f"{len(few)} of {len(experts)} expert layers saw fewer calibration tokens than they have inputs, {worst.name} the fewest "
            f"({worst.tokens} for {worst.in_features}); more samples tell more about them"
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
        name,
        spec.kind,
        spec.sparse,
        spec.kept,
        spec.rank,
        spec.binary_rank,
        spec.pivoted,
        spec.weight_bits,
        spec.lowrank_bits,
        layer.out_features,
        layer.in_features,
        bits / weight.numel(),
        dense_bits,
        bits,
        relative_error(weight, layer.to_dense(weight.dtype), statistics),
        "column_norms" if statistics.gram is None else "gram",
        statistics.tokens,
        spectrum,
    )


def sampled_spectrum(sigma: Tensor) -> list[float]:
    """Singular values (k,), falling, at no more than 48 evenly spaced places from first to last, in units of the largest; four digits."""
    if not len(sigma):
        return []
    positions = torch.linspace(0, len(sigma) - 1, min(len(sigma), SPECTRUM_POINTS)).round().long()
    values = (sigma.double().cpu() / sigma.max().clamp(min=torch.finfo(sigma.dtype).tiny))[positions]
    return [float(f"{value:.4g}") for value in values.tolist()]


def relative_error(weight: Tensor, approximation: Tensor, statistics: Statistics) -> float:
    """‖(W − Ŵ) X‖ / ‖W X‖ in the metric of the statistics; 0 if the layer's output is always zero and stays so."""
    lost = whole = weight.new_zeros(())
    for rows in row_chunks(weight):
        lost = lost + _energy(weight[rows] - approximation[rows], statistics)
        whole = whole + _energy(weight[rows], statistics)
    return float((lost / whole).clamp(min=0).sqrt()) if float(whole) > 0 else 0.0


def compressed_input_error(weight: Tensor, approximation: Tensor, statistics: Statistics) -> float:
    """‖W X − Ŵ X̂‖ / ‖W X‖, X̂ the inputs in the compressed model; 0 if W X is zero."""
    C, M, shifted = statistics.gram, statistics.cross_gram, statistics.compressed_input_gram
    assert C is not None and M is not None and shifted is not None, "methods that need shifted statistics have them"
    whole = ((weight @ C) * weight).sum()
    lost = whole - 2 * ((weight @ M) * approximation).sum() + ((approximation @ shifted) * approximation).sum()
    return float((lost / whole).clamp(min=0).sqrt()) if float(whole) > 0 else 0.0


def _energy(matrix: Tensor, statistics: Statistics) -> Tensor:
    if statistics.gram is None:
        return (matrix * statistics.column_norms).square().sum()
    return ((matrix @ statistics.gram) * matrix).sum()
