"""Statistics of the inputs of a block's linear layers, collected by hooks; linears that see the same tensor share one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..execution.process_group import SINGLE_PROCESS, ProcessGroup
from ..methods.base import Statistics
from ..models.linears import CHUNK
from ..runtime.errors import NumericalError
from ..runtime.experts import Expert

TOKENS_AT_ONCE = 1024
"""Tokens that are summed at a time: in float64, or in float32 if the inputs have 16 bits, whose products it holds exactly."""

TRIANGLE_STEPS, SMALLEST_STEP = 16, 128
"""Into how many parts the rows of a Gram matrix are divided while it is summed, and of how many rows they are at least."""


class Routing:
    """Which tokens a layer that is called now sees: in a bank of experts each expert has its own.

    Attributes:
        tokens: indices (t,) into the tokens of the batch; None outside experts, where a layer sees all.
    """

    def __init__(self) -> None:
        self.tokens: Tensor | None = None

    @contextmanager
    def watching(self, block: nn.Module) -> Iterator[None]:
        """While active, the calls of the block's experts are followed."""

        def enter(expert: nn.Module, arguments: tuple[Any, ...]) -> None:
            self.tokens = arguments[1]

        def leave(expert: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            self.tokens = None

        experts = [module for module in block.modules() if isinstance(module, Expert)]
        handles = [expert.register_forward_pre_hook(enter) for expert in experts]
        handles += [expert.register_forward_hook(leave, always_call=True) for expert in experts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True)
class LayerInput:
    """The input of a layer in one batch, and which tokens these are if the layer is an expert's, as in `Routing`."""

    x: Tensor
    tokens: Tensor | None = None


class StatisticsCollector:
    """CorrectionSums over tokens, in float64, of what `Statistics` holds.

    Args:
        layers: the linear layers of one block by module name.
        needs_gram: whether to sum the Gram matrix too.
        routing: followed by the caller, if the block has experts.
    """

    def __init__(self, layers: dict[str, nn.Module], needs_gram: bool, routing: Routing | None = None) -> None:
        self.layers, self.needs_gram, self.routing = layers, needs_gram, routing or Routing()
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

    def statistics(self, group: ProcessGroup = SINGLE_PROCESS) -> dict[str, Statistics | None]:
        """The statistics by layer, of all the group's tokens; None for a layer that was never called.

        Raises:
            NumericalError: if an input was not finite.
        """
        leaders = group.gather(self._leader)
        tokens = group.gather({leader: sums.tokens for leader, sums in self._sums.items()})
        inputs = {
            name: tuple(each.get(name) for each in leaders) for name in self.layers
        }  # what a layer sees, in every process
        sums: dict[str, Tensor] = {}
        for places in dict.fromkeys(inputs.values()):
            own = places[group.rank]
            if own is not None:
                alone = sum(each[group.rank] == own for each in set(inputs.values())) == 1
                for part, tensor in self._sums[own].tensors().items():
                    sums[f"{places}.{part}"] = tensor if alone else tensor.clone()
        sums = group.all_reduce(sums)
        made: dict[tuple[str | None, ...], Statistics | None] = {}
        for places in dict.fromkeys(inputs.values()):
            name = next((each for each in places if each is not None), None)
            count = sum(each[place] for each, place in zip(tokens, places, strict=True) if place is not None)
            made[places] = (
                None
                if name is None
                else _statistics(name, count, sums[f"{places}.totals"], sums.get(f"{places}.gram"))
            )
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
                self._sums[name].add(select_counted(x, _mask_of(x, self._mask, self._context), self.routing.tokens))

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
            for rows in _row_blocks(self.gram):
                self.gram[rows, : rows.stop] += (
                    x[:, rows].T @ x[:, : rows.stop]
                )  # the lower triangle; `tensors` has the other, too

    def tensors(self) -> dict[str, Tensor]:
        if self.gram is None:
            return {"totals": self.totals}
        for rows in _row_blocks(self.gram):
            self.gram[rows, rows.stop :] = self.gram[rows.stop :, rows].T
        return {"totals": self.totals, "gram": self.gram}


def _row_blocks(gram: Tensor) -> Iterator[slice]:
    """The rows of a Gram matrix (n, n), some at a time: few enough that little is computed above the diagonal."""
    step = max(min(CHUNK // len(gram), len(gram) // TRIANGLE_STEPS), SMALLEST_STEP)
    return (slice(first, min(first + step, len(gram))) for first in range(0, len(gram), step))


def _statistics(name: str, tokens: int, totals: Tensor, gram: Tensor | None) -> Statistics:
    total, total_abs, total_square = totals
    if not bool(total_square.isfinite().all()):
        channel = int((~total_square.isfinite()).nonzero()[0])
        raise NumericalError(
            f"{name}: the calibration input is not finite in channel {channel}; check the weights or use a wider dtype"
        )
    return Statistics(
        tokens=tokens,
        column_norms=total_square.sqrt(),
        mean=total / max(tokens, 1),
        mean_abs=total_abs / max(tokens, 1),
        gram=gram,
    )


class CompressedInputSums:
    """Ĉ = Σ x̂ x̂ᵀ and M = Σ x x̂ᵀ of a block's linear layers: dense inputs x against those of the compressed model, token by token."""

    def __init__(self, layers: dict[str, nn.Module], routing: Routing | None = None) -> None:
        self.layers, self.routing = layers, routing or Routing()
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def inputs(self) -> Iterator[dict[str, LayerInput]]:
        """While active, the last input of every layer is kept, by name."""
        kept: dict[str, LayerInput] = {}

        def keep(name: str) -> Any:
            def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
                kept[name] = LayerInput(inputs[0], self.routing.tokens)

            return hook

        handles = [module.register_forward_pre_hook(keep(name)) for name, module in self.layers.items()]
        try:
            yield kept
        finally:
            for handle in handles:
                handle.remove()

    def add(
        self,
        dense: dict[str, LayerInput],
        shifted: dict[str, LayerInput],
        mask: Tensor | None,
        context: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:
        """Count the tokens of one batch that the mask (B, T) lets through; `context` as for `StatisticsCollector.start_batch`.

        Tokens that an expert sees in one of the models only do not count.
        """
        for name in (name for name in dense if name in shifted):
            here, there = on_common_tokens(dense[name], shifted[name])
            counting = _mask_of(here.x, mask, context)
            x, y = (select_counted(each.x, counting, each.tokens).double() for each in (here, there))
            gram, cross = self._sums.get(name) or x.new_zeros(2, x.shape[-1], x.shape[-1]).unbind()
            self._sums[name] = (gram + y.T @ y, cross + x.T @ y)

    def gather(self, group: ProcessGroup = SINGLE_PROCESS) -> None:
        """Go over to the sums of all the group's tokens."""
        parts = {f"{name}.{part}": tensor for name, both in self._sums.items() for part, tensor in enumerate(both)}
        summed = group.all_reduce(parts)
        self._sums = {
            name: (summed[f"{name}.0"], summed[f"{name}.1"]) for name in self.layers if f"{name}.0" in summed
        }

    def extend(self, name: str, statistics: Statistics) -> Statistics:
        """The statistics of a layer with its two matrices; as if nothing had shifted if no token came to it in both models."""
        gram, cross = self._sums.get(name) or (statistics.gram, statistics.gram)
        return replace(statistics, compressed_input_gram=gram, cross_gram=cross)


def _mask_of(x: Tensor, mask: Tensor | None, context: tuple[Tensor, Tensor | None] | None) -> Tensor | None:
    """The mask of the tokens of an input that count: cross-attention reads keys and values from the context itself."""
    return context[1] if context is not None and x is context[0] else mask


def on_common_tokens(one: LayerInput, other: LayerInput) -> tuple[LayerInput, LayerInput]:
    """Two inputs of a layer, of an expert's those tokens alone that came to it both times."""
    if one.tokens is None or other.tokens is None:
        return one, other
    tokens = one.tokens[torch.isin(one.tokens, other.tokens)].sort().values
    rows = ((each[:, None] == tokens).int().argmax(dim=0) for each in (one.tokens, other.tokens))
    first, second = (LayerInput(each.x[at], tokens) for each, at in zip((one, other), rows, strict=True))
    return first, second


def select_counted(x: Tensor, mask: Tensor | None, tokens: Tensor | None = None) -> Tensor:
    """The tokens of an input (..., n) that count, (tokens, n).

    The mask (B, T) fits inputs (B, T, ..., n), (B, 1, T, n) and (B T, n), and those of experts, (t, n), if it is known which
    tokens these are; of any other all count.
    """
    if tokens is not None:
        return x if mask is None else x[mask.to(tokens.device).bool().flatten()[tokens]]
    if mask is not None and x.shape[: mask.dim()] == mask.shape:
        return x[mask.bool()].flatten(0, -2)
    sides = [side for side in x.shape[:-1] if side > 1]
    if mask is not None and sides in ([side for side in mask.shape if side > 1], [mask.numel()]):
        return x.flatten(0, -2)[mask.bool().flatten()]
    return x.flatten(0, -2)
