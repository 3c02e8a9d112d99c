"""The fallback for a layer that comes out worse than zeros: it is built again, or stays dense.

It is built again on damped statistics. It stays dense where the layers after it can pay for that.

A budget is shared by all layers. A layer that stays dense against the plan takes bits from the layers of later blocks.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from ..budget import Layer
from ..methods import Statistics
from ..runtime.errors import CompressionError, NumericalError
from ..runtime.layers import CompressedLinear
from .report import LayerReport

MAX_RELATIVE_ERROR = 1.01
"""Largest relative error of a useful layer. Zeros in its place, the least that a layer may store, err by 1."""
DAMPINGS = (0.1, 100.0)
"""Damping of the statistics in the second and the third attempt, in units of their mean.

With 0.1 no direction is nearly free any more. With 100 all inputs count nearly alike.
"""
MAX_DIVERTED_SHARE = 0.1
"""Largest share of their bits that layers give up for failed layers before them.

Where more layers fail, the recipe is at fault, not a layer.
"""
MAX_NAMES = 8
"""Number of layers that a warning names."""

T = TypeVar("T")


@dataclass(frozen=True)
class BuildResult:
    """The outcome of building a layer.

    Attributes:
        layer: the best compressed layer of all attempts, by relative error; None if none gave finite values and a
            finite error.
        report: the report on it; None without a layer.
        fault: what was wrong with the first attempt; None if nothing was.
        remedy: how the layer was built after a fault. None if nothing was wrong, or if no attempt is of use.
    """

    layer: CompressedLinear | None
    report: LayerReport | None
    fault: str | None = None
    remedy: str | None = None


def build_with_fallback(
    statistics: Statistics,
    *,
    build: Callable[[Statistics], CompressedLinear],
    report: Callable[[CompressedLinear], LayerReport],
    fitted_error: Callable[[CompressedLinear], float] | None = None,
) -> BuildResult:
    """Build a layer. If it fails or errs by more than `MAX_RELATIVE_ERROR`, build it again on damped statistics.

    Args:
        build: builds the layer from statistics, as they are or damped.
        report: measures a layer.
        fitted_error: gives the relative error towards what the layer was fitted to, where `report` measures something
            else.
    """
    fault: str | None = None
    best: BuildResult | None = None
    errors: list[float] = []
    for damping in (0.0, *DAMPINGS):
        try:
            layer = build(statistics.damped(damping) if damping else statistics)
        except (NumericalError, torch.linalg.LinAlgError) as error:
            fault = fault or str(error)
            continue
        layer_report = report(layer)
        error_of_layer = layer_report.relative_error
        if fitted_error is not None and error_of_layer > MAX_RELATIVE_ERROR:
            error_of_layer = fitted_error(layer)
        # The error of outputs that overflow compares with no other error, and no report can hold it.
        if not math.isfinite(error_of_layer) or not math.isfinite(layer_report.relative_error):
            fault = fault or f"a relative error of {error_of_layer}"
            continue
        if error_of_layer <= MAX_RELATIVE_ERROR:
            remedy = f"statistics damped by {damping:g} of their mean" if fault else None
            return BuildResult(layer, layer_report, fault, remedy)
        fault = fault or f"a relative error of {error_of_layer:.3g}"
        if best is None or error_of_layer < min(errors):
            best = BuildResult(layer, layer_report, fault)
        # The same error again: this method does not read the statistics, so that no damping can help.
        if error_of_layer in errors:
            break
        errors.append(error_of_layer)
    return best or BuildResult(None, None, fault)


class BudgetShares(Generic[T]):
    """The shares of the layers in one budget. They shrink when an earlier layer stays dense against the plan.

    A share is of the type `T`: a budget, a rank, or the spec of the layer, as the strategy decides.

    Args:
        layers: the layers to compress, in order.
        shares: the share of each layer, by name.
        kept_dense: names of the layers that stayed dense so far. It belongs to the log of the run, and is extended
            here.
        bits: the bits of a layer with this share, without the layer's own bias.
        dense_bits: the bits of a layer that stays dense, likewise.
        spread: spreads so many bits over layers; raises CompressionError if they are too few for anything.
    """

    def __init__(
        self,
        layers: list[Layer],
        shares: dict[str, T],
        kept_dense: list[str],
        *,
        bits: Callable[[Layer, T], int],
        dense_bits: Callable[[Layer], int],
        spread: Callable[[list[Layer], int], dict[str, T]],
    ) -> None:
        self.layers = layers
        self.shares = shares
        self.kept_dense = kept_dense
        self._bits = bits
        self._dense_bits = dense_bits
        self._spread = spread
        self._diverted: dict[str, int] = {}
        """Extra bits of each layer that stays dense, which later layers gave up."""

    def __getitem__(self, name: str) -> T:
        """Return the share of a layer, after all that was diverted before it.

        This lowers the shares, once, where a resumed run has restored names in `kept_dense`.
        """
        # A resumed run restores the names of `kept_dense` from its records, but not yet what they cost.
        for layer in self.layers:
            if layer.name in self.kept_dense and layer.name not in self._diverted:
                self._divert(layer, at_any_price=True)
        return self.shares[name]

    def keep_dense(self, layer: Layer, at_any_price: bool) -> bool:
        """Leave a layer dense at the cost of the layers of later blocks. Return whether they can pay for it.

        Args:
            at_any_price: whether they may give up more than `MAX_DIVERTED_SHARE` of their bits.
        """
        if not self._divert(layer, at_any_price):
            return False
        self.kept_dense.append(layer.name)
        return True

    def _divert(self, layer: Layer, at_any_price: bool) -> bool:
        """Take the extra bits of a dense layer from the layers of later blocks. Return whether they can pay for it."""
        later_layers = [candidate for candidate in self.layers if candidate.block > layer.block]
        bits_of_later = sum(self._bits(later, self.shares[later.name]) for later in later_layers)
        price = self._dense_bits(layer) - self._bits(layer, self.shares[layer.name])
        diverted_before = sum(self._diverted.values())
        limit = MAX_DIVERTED_SHARE * (bits_of_later + diverted_before)
        if not at_any_price and diverted_before + price > limit:
            return False
        remaining = bits_of_later - price
        try:
            smaller_shares = self._spread(later_layers, remaining)
        except CompressionError:
            return False
        if sum(self._bits(later, smaller_shares[later.name]) for later in later_layers) > remaining:
            return False
        self.shares |= smaller_shares
        self._diverted[layer.name] = price
        return True


def fallback_warnings(retried: dict[str, str], failed: dict[str, str], kept_dense: list[str]) -> list[str]:
    """Return warnings about layers that came out bad.

    Args:
        retried, failed, kept_dense: as in `RunLog`.
    """
    warnings = []
    if retried:
        name, reason = next(iter(retried.items()))
        warnings.append(
            f"{len(retried)} layers came out bad and were made again: {_first_names(retried)}; {name}: {reason}"
        )
    if failed:
        name, reason = next(iter(failed.items()))
        warnings.append(
            f"{len(failed)} layers lose more than zeros in their place would: {_first_names(failed)}; "
            f"{name}: {reason}; leave them dense (--skip, modules_to_not_convert), or lower the ratio"
        )
    if kept_dense:
        warnings.append(
            f"{len(kept_dense)} layers came out bad and stay dense, which layers after them pay for: "
            f"{_first_names(kept_dense)}"
        )
    return warnings


def _first_names(names: Collection[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join([*names][:MAX_NAMES]) + more
