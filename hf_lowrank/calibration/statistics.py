"""Statistics of the inputs of a block's linear layers, collected by hooks; linears that see the same tensor share one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import ALONE, Team
from ..linears import row_chunks
from ..methods.base import Statistics
from ..runtime.errors import NumericalError

TOKENS_AT_ONCE = 1024
"""Tokens that are summed at a time: in float64, or in float32 if the inputs have 16 bits, whose products it holds exactly."""


class StatisticsCollector:
    """Sums over tokens, in float64, of what `Statistics` holds.

    Args:
        layers: the linear layers of one block by module name.
        needs_gram: whether to sum the Gram matrix too.
    """

    def __init__(self, layers: dict[str, nn.Module], needs_gram: bool) -> None:
        self.layers, self.needs_gram = layers, needs_gram
        self._leader: dict[str, str] = {}
        self._sums: dict[str, _Sums] = {}
        self._seen: list[tuple[Tensor, str]] = []
        self._mask: Tensor | None = None
        self._context: tuple[Tensor, Tensor | None] | None = None

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """While active, every forward of the layers is counted."""
        handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in self.layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def start_batch(self, mask: Tensor | None, context: tuple[Tensor, Tensor | None] | None = None) -> None:
        """Tell which tokens of the next batch count: `mask` (B, T), or None for all.

        Args:
            context: the states that the block reads beside its own, (B, T', d), with their own mask.
        """
        self._mask, self._context, self._seen = mask, context, []

    def statistics(self, team: Team = ALONE) -> dict[str, Statistics | None]:
        """The statistics by layer, of all the team's tokens; None for a layer that was never called.

        Raises:
            NumericalError: if an input was not finite.
        """
        leaders = team.gather(self._leader)
        tokens = team.gather({leader: sums.tokens for leader, sums in self._sums.items()})
        inputs = {name: tuple(each.get(name) for each in leaders) for name in self.layers}  # what a layer sees, in every process
        sums: dict[str, Tensor] = {}
        for places in dict.fromkeys(inputs.values()):
            own = places[team.rank]
            if own is not None:
                alone = sum(each[team.rank] == own for each in set(inputs.values())) == 1
                for part, tensor in self._sums[own].tensors().items():
                    sums[f"{places}.{part}"] = tensor if alone else tensor.clone()
        sums = team.summed(sums)
        made: dict[tuple[str | None, ...], Statistics | None] = {}
        for places in dict.fromkeys(inputs.values()):
            name = next((each for each in places if each is not None), None)
            count = sum(each[place] for each, place in zip(tokens, places, strict=True) if place is not None)
            made[places] = None if name is None else _statistics(name, count, sums[f"{places}.totals"], sums.get(f"{places}.gram"))
        return {name: made[places] for name, places in inputs.items()}

    def _hook(self, name: str) -> Any:
        def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0]
            if name not in self._leader:
                same = next((leader for tensor, leader in self._seen if tensor is x), None)
                self._leader[name] = same or name
            if self._leader[name] == name:
                self._seen.append((x, name))
                if name not in self._sums:
                    self._sums[name] = _Sums(x, self.needs_gram)
                self._sums[name].add(counted(x, _mask_of(x, self._mask, self._context)))

        return count


class _Sums:
    """Running sums for one input."""

    def __init__(self, x: Tensor, needs_gram: bool) -> None:
        n = x.shape[-1]
        self.tokens = 0
        self.totals = torch.zeros(3, n, dtype=torch.float64, device=x.device)
        self.total, self.total_abs, self.total_square = self.totals
        self.gram = torch.zeros(n, n, dtype=torch.float64, device=x.device) if needs_gram else None

    def add(self, x: Tensor) -> None:
        precise = torch.float64 if x.dtype.itemsize > 2 else torch.float32
        for part in x.detach().split(TOKENS_AT_ONCE):
            self._add(part.to(precise))

    def _add(self, x: Tensor) -> None:
        self.tokens += x.shape[0]
        self.total += x.sum(dim=0)
        self.total_abs += x.abs().sum(dim=0)
        self.total_square += x.square().sum(dim=0)
        if self.gram is not None:
            for rows in row_chunks(self.gram):
                self.gram[rows] += x[:, rows].T @ x

    def tensors(self) -> dict[str, Tensor]:
        return {"totals": self.totals} if self.gram is None else {"totals": self.totals, "gram": self.gram}


def _statistics(name: str, tokens: int, totals: Tensor, gram: Tensor | None) -> Statistics:
    total, total_abs, total_square = totals
    if not bool(total_square.isfinite().all()):
        channel = int((~total_square.isfinite()).nonzero()[0])
        raise NumericalError(f"{name}: the calibration input is not finite in channel {channel}; check the weights or use a wider dtype")
    return Statistics(
        tokens=tokens,
        column_norms=total_square.sqrt(),
        mean=total / max(tokens, 1),
        mean_abs=total_abs / max(tokens, 1),
        gram=gram,
    )


class ShiftedSums:
    """Ĉ = Σ x̂ x̂ᵀ and M = Σ x x̂ᵀ of a block's linear layers: dense inputs x against those of the compressed model, token by token."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self.layers = layers
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def inputs(self) -> Iterator[dict[str, Tensor]]:
        """While active, the last input of every layer is kept, by name."""
        kept: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
                kept[name] = inputs[0]

            return hook

        handles = [module.register_forward_pre_hook(keep(name)) for name, module in self.layers.items()]
        try:
            yield kept
        finally:
            for handle in handles:
                handle.remove()

    def add(
        self,
        dense: dict[str, Tensor],
        shifted: dict[str, Tensor],
        mask: Tensor | None,
        context: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:
        """Count the tokens of one batch that the mask (B, T) lets through; `context` as for `StatisticsCollector.start_batch`."""
        for name, x in dense.items():
            counting = _mask_of(x, mask, context)
            x, y = (counted(each, counting).double() for each in (x, shifted[name]))
            gram, cross = self._sums.get(name) or x.new_zeros(2, x.shape[-1], x.shape[-1]).unbind()
            self._sums[name] = (gram + y.T @ y, cross + x.T @ y)

    def gather(self, team: Team = ALONE) -> None:
        """Go over to the sums of all the team's tokens."""
        parts = {f"{name}.{part}": tensor for name, both in self._sums.items() for part, tensor in enumerate(both)}
        summed = team.summed(parts)
        self._sums = {name: (summed[f"{name}.0"], summed[f"{name}.1"]) for name in self.layers if f"{name}.0" in summed}

    def extend(self, name: str, statistics: Statistics) -> Statistics:
        """The statistics of a layer with its two matrices."""
        gram, cross = self._sums[name]
        return replace(statistics, shifted_gram=gram, cross_gram=cross)


def _mask_of(x: Tensor, mask: Tensor | None, context: tuple[Tensor, Tensor | None] | None) -> Tensor | None:
    """The mask of the tokens of an input that count: cross-attention reads keys and values from the context itself."""
    return context[1] if context is not None and x is context[0] else mask


def counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens of an input (..., n) that count, (tokens, n).

    The mask (B, T) fits inputs (B, T, ..., n), (B, 1, T, n) and (B T, n); of any other all count.
    """
    if mask is not None and x.shape[: mask.dim()] == mask.shape:
        return x[mask.bool()].flatten(0, -2)
    sides = [side for side in x.shape[:-1] if side > 1]
    if mask is not None and sides in ([side for side in mask.shape if side > 1], [mask.numel()]):
        return x.flatten(0, -2)[mask.bool().flatten()]
    return x.flatten(0, -2)
