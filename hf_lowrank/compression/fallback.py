"""A layer that comes out worse than zeros would be is made again with more care, and left dense where later layers can pay for that."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from ..budget import Layer
from ..methods import Statistics
from ..runtime.errors import CompressionError, NumericalError
from ..runtime.layers import CompressedLinear
from .report import LayerReport

WORST = 1.01
"""Relative error of a layer that is of use. Zeros in its place, the least that any layer may store, err by 1; the rest is rounding."""
DAMPINGS = (0.1, 100.0)
"""Of the statistics in the second and third attempt: no direction is nearly free; all inputs count nearly alike."""
LARGEST_SHARE = 0.1
"""Of their bits, that layers pay for those before them that are of no use. Where more are, the method is at its end, not a layer."""
NAMED = 8
"""Layers that a warning names."""

T = TypeVar("T")


@dataclass(frozen=True)
class BuildResult:
    """What became of a layer.

    Attributes:
        layer, report: the best that any attempt gave, by relative error; None if none gave finite values.
        fault: what was wrong with the first attempt; None if nothing was.
        remedy: how the layer was made then; None if no attempt is of use.
    """

    layer: CompressedLinear | None
    report: LayerReport | None
    fault: str | None = None
    remedy: str | None = None


def build_with_fallback(
    statistics: Statistics,
    make: Callable[[Statistics], CompressedLinear],
    measured: Callable[[CompressedLinear], LayerReport],
    fitted_error: Callable[[CompressedLinear], float] | None = None,
) -> BuildResult:
    """Make a layer; if it cannot be, or errs by more than `WORST`, again on statistics that are damped more and more.

    Args:
        make: the layer from statistics, which are given as they are or damped.
        measured: the report on a layer.
        fitted_error: the relative error towards what the layer was fitted to, where that is not what the report measures.
    """
    fault: str | None = None
    best: BuildResult | None = None
    errors: list[float] = []
    for damping in (0.0, *DAMPINGS):
        try:
            made = make(statistics.damped(damping) if damping else statistics)
        except (NumericalError, torch.linalg.LinAlgError) as error:
            fault = fault or str(error)
            continue
        report = measured(made)
        lost = report.relative_error
        if fitted_error is not None and not lost <= WORST:
            lost = fitted_error(made)
        if lost <= WORST:
            return BuildResult(
                made, report, fault, f"statistics damped by {damping:g} of their mean" if fault else None
            )
        fault = fault or f"a relative error of {lost:.3g}"
        if best is None or lost < min(errors):
            best = BuildResult(made, report, fault)
        if lost in errors:  # the statistics play no part
            break
        errors.append(lost)
    return best or BuildResult(None, None, fault)


class BudgetShares(Generic[T]):
    """What each layer may become; those in later blocks get less where one stays dense that was to be compressed.

    Args:
        layers: the layers to compress, in order.
        now: what each may become, by name.
        bits: what that takes, without the layer's own bias.
        dense_bits: what the dense layer takes, likewise.
        spread: what layers may become with so many bits together; CompressionError if nothing.
        kept_dense: names of the layers that stayed dense so far, kept with the run's records.
    """

    def __init__(
        self,
        layers: list[Layer],
        now: dict[str, T],
        bits: Callable[[Layer, T], int],
        dense_bits: Callable[[Layer], int],
        spread: Callable[[list[Layer], int], dict[str, T]],
        kept_dense: list[str],
    ) -> None:
        self.layers, self.now, self.bits, self.dense_bits, self.spread, self.kept_dense = (
            layers,
            now,
            bits,
            dense_bits,
            spread,
            kept_dense,
        )
        self._paid: dict[str, int] = {}

    def __getitem__(self, name: str) -> T:
        """What a layer may become, after all that was paid before it."""
        for layer in self.layers:
            if layer.name in self.kept_dense and layer.name not in self._paid:  # in a run that was killed since
                self._pay(layer)
        return self.now[name]

    def keep_dense(self, layer: Layer, at_any_price: bool) -> bool:
        """Let the layers of later blocks pay for a layer that stays dense, if they can; `LARGEST_SHARE` at most, or whatever it takes."""
        if not self._pay(layer, at_any_price):
            return False
        self.kept_dense.append(layer.name)
        return True

    def _pay(self, layer: Layer, at_any_price: bool = True) -> bool:
        later = [each for each in self.layers if each.block > layer.block]
        have = sum(self.bits(each, self.now[each.name]) for each in later)
        price = self.dense_bits(layer) - self.bits(layer, self.now[layer.name])
        paid = sum(self._paid.values())
        if not at_any_price and paid + price > LARGEST_SHARE * (have + paid):
            return False
        try:
            less = self.spread(later, have - price)
        except CompressionError:
            return False
        if sum(self.bits(each, less[each.name]) for each in later) > have - price:
            return False
        self.now |= less
        self._paid[layer.name] = price
        return True


def build_warnings(retried: dict[str, str], bad: dict[str, str], kept_dense: list[str]) -> list[str]:
    """What the user must know about layers that came out bad; `retried` and `bad` as in `Report`."""
    warnings = []
    if retried:
        name, reason = next(iter(retried.items()))
        warnings.append(f"{len(retried)} layers came out bad and were made again: {_named(retried)}; {name}: {reason}")
    if bad:
        name, reason = next(iter(bad.items()))
        warnings.append(
            f"{len(bad)} layers lose more than zeros in their place would: {_named(bad)}; {name}: {reason}; "
            "leave them dense (--skip, modules_to_not_convert), or lower the ratio"
        )
    if kept_dense:
        warnings.append(
            f"{len(kept_dense)} layers came out bad and stay dense, which layers after them pay for: {_named(kept_dense)}"
        )
    return warnings


def _named(names: Collection[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join([*names][:NAMED]) + more
