"""Sparsity: which entries of a row are kept, with or without an N:M pattern, and the base class of pruning methods."""

import re
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..budget import Budget, Layer
from ..runtime.configuration import LayerSpec
from ..runtime.errors import CompressionError, quoted
from .base import Method, too_small

PATTERN_HELP = "unstructured, or N:M: at most N of every M consecutive inputs (2:4, 4:8)"

SMALLEST_SCALE = 1e-6
"""Scale that a dead channel gets, relative to the mean of all channels."""


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
        """Return the most values per row that budget and pattern allow.

        Raises:
            CompressionError: if they allow none.
        """
        largest = largest_kept(self.pattern, budget.in_features)
        if largest < 1:
            raise CompressionError(
                f"{self.name}: a layer with {budget.in_features} input(s) has no room for pattern {self.pattern!r}; "
                "leave that layer dense"
            )
        kept = min(budget.kept_per_row(), largest)
        if kept < 1:
            raise too_small(self.name, budget)
        return kept


def largest_per_row(scores: Tensor, kept: int | Tensor, pattern: str = "unstructured") -> Tensor:
    """Return the mask (m, n) of the `kept` largest scores (≥ 0) of every row.

    Under an N:M pattern only the N largest of every M inputs may be kept.

    Args:
        kept: one number for all rows, or one for each row, (m,).
    """
    if pattern != "unstructured":
        # Entries that the pattern rules out come after all others, whose scores are not below zero.
        scores = torch.where(_allowed_by(pattern, scores), scores, -1.0)
    if isinstance(kept, int):
        return _largest_equally_many(scores, kept)
    # As many entries are sorted as the longest row keeps. Every other row takes the first ones of its own.
    chosen = scores.topk(int(kept.max()), dim=1).indices
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(1, chosen, torch.arange(chosen.shape[1], device=chosen.device) < kept[:, None])


def _largest_equally_many(scores: Tensor, kept: int) -> Tensor:
    """Return the mask (m, n) of the `kept` largest scores of every row."""
    if not kept:
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if scores.device.type == "cpu":
        # NumPy finds the smallest of the largest in a fraction of the time in which torch finds all of them.
        place = scores.shape[1] - kept
        ordered = np.partition(scores.numpy(), place, axis=1)
        smallest = torch.from_numpy(ordered[:, place])
    else:
        smallest = scores.topk(kept, dim=1, sorted=False).values.amin(dim=1)
    mask = scores >= smallest[:, None]
    # Where more scores are as small as the smallest one, not all of them are kept.
    tied = mask.sum(dim=1) != kept
    if bool(tied.any()):
        largest = scores[tied].topk(kept, dim=1, sorted=False).indices
        mask[tied] = torch.zeros_like(mask[tied]).scatter_(1, largest, True)
    return mask


def _allowed_by(pattern: str, scores: Tensor) -> Tensor:
    """Return the mask (m, n) of the N largest scores in every group of M inputs.

    Inputs after the last whole group are not in the mask.
    """
    n_of, m_of = parse_pattern(pattern)
    rows, columns = scores.shape
    whole = columns // m_of * m_of
    groups = scores[:, :whole].reshape(rows, -1, m_of)
    largest = groups.topk(n_of, dim=2).indices
    allowed = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, largest, True).flatten(1)
    return pad(allowed, (0, columns - whole))


def largest_kept(pattern: str, in_features: int) -> int:
    """Return the most values per row that a pattern allows. Without a pattern it is one less than all of them."""
    if pattern == "unstructured":
        return in_features - 1  # a bitmask that keeps all would be larger than the dense layer
    n_of, m_of = parse_pattern(pattern)
    return in_features // m_of * n_of


def parse_pattern(pattern: str) -> tuple[int, int]:
    """Return (N, M) of an N:M pattern, (1, 1) for "unstructured".

    Raises:
        CompressionError: if the text is neither "unstructured" nor N:M with 0 < N < M.
    """
    if pattern == "unstructured":
        return 1, 1
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise CompressionError(
            f"pattern is {quoted(pattern)}, expected 'unstructured' or N:M with 0 < N < M, like 2:4"
        )
    return int(match[1]), int(match[2])


def relative_scales(scales: Tensor) -> Tensor:
    """Return the scales (n,), ≥ 0, of the inputs over their mean.

    Zeros, the scales of dead channels, become a tiny positive number, so that a method can divide by them. If all are
    zero, all become ones.
    """
    mean = float(scales.mean())
    if not mean > 0:
        return torch.ones_like(scales)
    return (scales / mean).clamp(min=SMALLEST_SCALE)
