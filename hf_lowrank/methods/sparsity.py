"""What the sparse methods share: which entries of a row are kept, with or without an N:M pattern."""

import re
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..budget import Budget, Layer
from ..runtime.configuration import LayerSpec
from ..runtime.errors import CompressionError
from .base import Method, too_small

PATTERN_HELP = "unstructured, or N:M: at most N of every M consecutive inputs (2:4, 4:8)"
SMALLEST_SCALE = 1e-6
"""Of a dead channel, relative to the mean of all."""


@dataclass
class SparseMethod(Method):
    """A method whose layers are a bitmask and its kept values, equally many in every row."""

    pattern: str = field(default="unstructured", metadata={"help": PATTERN_HELP})

    def __post_init__(self) -> None:
        parse_pattern(self.pattern)

    def leaves_dense(self, layer: Layer, ratio: float) -> str | None:
        if largest_kept(self.pattern, layer.in_features) < 1:
            return f"its {layer.in_features} input(s) have no room for the pattern {self.pattern}"
        return None

    def min_spec(self, layer: Layer) -> LayerSpec:
        return LayerSpec(sparse="bitmask", kept=1)

    def next_spec(self, layer: Layer, spec: LayerSpec) -> LayerSpec:
        return replace(spec, kept=spec.kept + 1)

    def max_steps(self, layer: Layer) -> int:
        return max(largest_kept(self.pattern, layer.in_features) - 1, 0)

    def kept_per_row(self, budget: Budget) -> int:
        """The most values per row that budget and pattern allow.

        Raises:
            CompressionError: if that is none.
        """
        if largest_kept(self.pattern, budget.in_features) < 1:
            found = f"a layer with {budget.in_features} input(s)"
            raise CompressionError(
                f"{self.name}: {found} has no room for pattern {self.pattern!r}; leave that layer dense"
            )
        kept = min(budget.kept_per_row(), largest_kept(self.pattern, budget.in_features))
        if kept < 1:
            raise too_small(self.name, budget)
        return kept


def largest_per_row(scores: Tensor, kept: int | Tensor, pattern: str = "unstructured") -> Tensor:
    """Mask (m, n) of the `kept` largest scores (≥ 0) of every row; under N:M only the N largest of every M inputs may be kept.

    Args:
        kept: the same number for all rows, or one for each, (m,).
    """
    if pattern != "unstructured":
        n_of, m_of = parse_pattern(pattern)
        groups = scores[:, : scores.shape[1] // m_of * m_of].reshape(scores.shape[0], -1, m_of)
        allowed = (
            torch.zeros_like(groups, dtype=torch.bool).scatter_(2, groups.topk(n_of, dim=2).indices, True).flatten(1)
        )
        scores = torch.where(torch.nn.functional.pad(allowed, (0, scores.shape[1] - allowed.shape[1])), scores, -1.0)
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if isinstance(kept, int):
        return mask.scatter_(1, scores.topk(kept, dim=1, sorted=False).indices, True)
    chosen = scores.topk(int(kept.max()), dim=1).indices
    return mask.scatter_(1, chosen, torch.arange(chosen.shape[1], device=chosen.device) < kept[:, None])


def largest_kept(pattern: str, in_features: int) -> int:
    """The most values per row that a pattern allows; one less than all of them without a pattern."""
    if pattern == "unstructured":
        return in_features - 1
    n_of, m_of = parse_pattern(pattern)
    return in_features // m_of * n_of


def parse_pattern(pattern: str) -> tuple[int, int]:
    """(N, M) of an N:M pattern; (1, 1) for unstructured.

    Raises:
        CompressionError: if the text is neither "unstructured" nor N:M with 0 < N < M.
    """
    if pattern == "unstructured":
        return 1, 1
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise CompressionError(f"pattern is {pattern!r}, expected 'unstructured' or N:M with 0 < N < M, like 2:4")
    return int(match[1]), int(match[2])


def relative_scales(scales: Tensor) -> Tensor:
    """Scales of the inputs (n,), ≥ 0, over their mean; zeros (dead channels) become a tiny positive number, all zeros become ones."""
    mean = float(scales.mean())
    return (scales / mean).clamp(min=SMALLEST_SCALE) if mean > 0 else torch.ones_like(scales)
