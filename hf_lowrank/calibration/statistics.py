"""Statistics of the inputs of a block's linear layers, collected by hooks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..execution.process_group import SINGLE_PROCESS, ProcessGroup
from ..methods import Statistics
from ..runtime.errors import NumericalError
from ..runtime.experts import Expert
from .grams import add_product, fill_upper_triangle, products_of
from .hooks import temporary_hooks

TOKENS_AT_ONCE = 1024
"""Number of tokens that are summed at a time.

They are summed in float64, or in float32 if the inputs have 16 bits: float32 holds the products of such inputs
exactly.
"""

Context = tuple[Tensor, Tensor | None]
"""The encoder states that the blocks of a decoder read, (B, T', d), and the mask (B, T') of those that count."""

InputKey = tuple[str | None, ...]
"""Names an input that layers share: by rank, the layer that leads them in that process (see `StatisticsCollector`).

It is None in a process that never called the layers.
"""


class Routing:
    """Tells which tokens the layer that is called now sees. In a bank of experts each expert has its own.

    Attributes:
        tokens: indices (t,) into the tokens of the batch. None outside experts, where a layer sees all tokens.
    """

    def __init__(self) -> None:
        self.tokens: Tensor | None = None

    @contextmanager
    def watching(self, block: nn.Module) -> Iterator[None]:
        """Follow the calls of the block's experts while active."""

        def enter(expert: nn.Module, arguments: tuple[Any, ...]) -> None:
            self.tokens = arguments[1]  # see `Expert.forward`

        def leave(expert: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            self.tokens = None

        experts = [module for module in block.modules() if isinstance(module, Expert)]
        handles = [expert.register_forward_pre_hook(enter) for expert in experts]
        # This is done always: a forward pass may end early by an exception, as in `correction.py`.
        handles += [expert.register_forward_hook(leave, always_call=True) for expert in experts]
        with temporary_hooks(handles):
            yield


@dataclass(frozen=True)
class LayerInput:
    """The input of a layer in one batch.

    Attributes:
        x: the input, (..., n).
        tokens: the tokens that these are if the layer is an expert's, as in `Routing`. None otherwise.
    """

    x: Tensor
    tokens: Tensor | None = None


class StatisticsCollector:
    """Sums over tokens, in float64, from which `Statistics` follow.

    Layers that are called with the same tensor share one set of sums. It has the name of their leader, the layer that
    is called first.

    Args:
        layers: the linear layers of one block by module name.
        needs_gram: whether to sum the Gram matrix, too.
        routing: tells an expert's tokens. The caller activates it if the block has experts.
    """

    def __init__(self, layers: dict[str, nn.Module], needs_gram: bool, routing: Routing | None = None) -> None:
        self.layers = layers
        self.needs_gram = needs_gram
        self.routing = routing or Routing()
        self._leader: dict[str, str] = {}  # by layer
        self._sums: dict[str, _InputSums] = {}  # by leader
        self._batch_inputs: list[tuple[Tensor, str]] = []  # of the leaders, with their names
        self._mask: Tensor | None = None
        self._context: Context | None = None

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Count the inputs of every call of the layers while active."""
        handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in self.layers.items()]
        with temporary_hooks(handles):
            yield

    def start_batch(self, mask: Tensor | None, context: Context | None = None) -> None:
        """Set which tokens of the next batch count.

        Args:
            mask: (B, T), nonzero for tokens that count. None if all count.
            context: the encoder states that the block reads beside its hidden states, with their own mask.
        """
        self._mask = mask
        self._context = context
        self._batch_inputs = []

    def _hook(self, name: str) -> Callable[..., None]:
        def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0]
            if name not in self._leader:
                self._leader[name] = self._find_leader(x) or name
            if self._leader[name] != name:  # the leader has counted this tensor
                return
            # The tensor is kept until the next batch: no other one can then have its identity.
            self._batch_inputs.append((x, name))
            if name not in self._sums:
                self._sums[name] = _InputSums(x, self.needs_gram)
            self._sums[name].add(select_counted(x, _mask_of(x, self._mask, self._context), self.routing.tokens))

        return count

    def _find_leader(self, x: Tensor) -> str | None:
        """Return the leader that was called with this tensor in this batch."""
        for tensor, leader in self._batch_inputs:
            if tensor is x:
                return leader
        return None

    def statistics(self, group: ProcessGroup = SINGLE_PROCESS) -> dict[str, Statistics | None]:
        """Return the statistics by layer over the tokens of all processes. None for a layer that was never called.

        Raises:
            NumericalError: if an input was not finite.
        """
        # Processes may disagree: the layers of an expert are called only where tokens reach it.
        leaders_by_rank = group.gather(self._leader)
        tokens_by_rank = group.gather({leader: sums.tokens for leader, sums in self._sums.items()})
        # Layers share their statistics if they shared an input in every process.
        keys: dict[str, InputKey] = {}
        for name in self.layers:
            keys[name] = tuple(leaders.get(name) for leaders in leaders_by_rank)
        distinct_keys = list(dict.fromkeys(keys.values()))
        sums = group.all_reduce(self._tensors(distinct_keys, group.rank))
        by_key: dict[InputKey, Statistics | None] = {}
        for key in distinct_keys:
            called = [(rank, leader) for rank, leader in enumerate(key) if leader is not None]
            if not called:
                by_key[key] = None
                continue
            tokens = sum(tokens_by_rank[rank][leader] for rank, leader in called)
            _, first_leader = called[0]
            by_key[key] = _statistics(first_leader, tokens, sums[f"{key}.totals"], sums.get(f"{key}.gram"))
        return {name: by_key[key] for name, key in keys.items()}

    def _tensors(self, keys: list[InputKey], rank: int) -> dict[str, Tensor]:
        """Return the sums of this process by name. The sums of one input have the same names in all processes."""
        own_leaders = [key[rank] for key in keys]
        tensors: dict[str, Tensor] = {}
        for key, leader in zip(keys, own_leaders, strict=True):
            if leader is None:
                continue
            # Layers may share an input here and not in another process: then each key needs its own copy, as the
            # processes' sums are added in place.
            shared = own_leaders.count(leader) > 1
            for part, tensor in self._sums[leader].tensors().items():
                tensors[f"{key}.{part}"] = tensor.clone() if shared else tensor
        return tensors


class _InputSums:
    """Running sums over the tokens of one input.

    Args:
        x: the input in its first batch, which tells the number of channels n and the device.
        needs_gram: whether to sum the Gram matrix, too.

    Attributes:
        tokens: number of tokens so far.
        totals: rows Σ x, Σ |x| and Σ x², (3, n) float64.
        gram: the lower triangle of Σ x xᵀ, (n, n) float64. None if it is not needed.
    """

    def __init__(self, x: Tensor, needs_gram: bool) -> None:
        n = x.shape[-1]
        self.tokens = 0
        self.totals = torch.zeros(3, n, dtype=torch.float64, device=x.device)
        self.gram = torch.zeros(n, n, dtype=torch.float64, device=x.device) if needs_gram else None

    def add(self, x: Tensor) -> None:
        """Add the tokens of an input (tokens, n)."""
        # Few tokens are taken at a time: the copy in another dtype stays small, and in the caches of a processor.
        precise = torch.float64 if x.dtype.itemsize > 2 else torch.float32
        with products_of(x.dtype):
            for part in x.detach().split(TOKENS_AT_ONCE):
                self._add(part.to(precise))

    def _add(self, x: Tensor) -> None:
        self.tokens += x.shape[0]
        total, total_abs, total_square = self.totals
        total += x.sum(dim=0)
        total_abs += x.abs().sum(dim=0)
        total_square += x.square().sum(dim=0)
        if self.gram is not None:
            add_product(self.gram, x)

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name, with the whole Gram matrix."""
        if self.gram is None:
            return {"totals": self.totals}
        fill_upper_triangle(self.gram)
        return {"totals": self.totals, "gram": self.gram}


def _statistics(name: str, tokens: int, totals: Tensor, gram: Tensor | None) -> Statistics:
    """Return the statistics that follow from sums over tokens, totals (3, n) as in `_InputSums`.

    Raises:
        NumericalError: if a sum is not finite, with the name of a layer that sees the input.
    """
    total, total_abs, total_square = totals
    # NaN and infinity stay in a sum, so that it is enough to look at the sums.
    if not bool(total_square.isfinite().all()):
        channel = int((~total_square.isfinite()).nonzero()[0])
        raise NumericalError(
            f"{name}: the calibration input is not finite in channel {channel}; check the weights or use a wider dtype"
        )
    # An expert may have got nothing but padding: its means are zeros.
    return Statistics(
        tokens=tokens,
        column_norms=total_square.sqrt(),
        mean=total / max(tokens, 1),
        mean_abs=total_abs / max(tokens, 1),
        gram=gram,
    )


class CompressedInputSums:
    """Sums Ĉ = Σ x̂ x̂ᵀ and M = Σ x x̂ᵀ for a block's linear layers, (n, n) float64.

    x is the input of a layer in the dense model, and x̂ its input for the same token in the compressed model.

    Args:
        layers: the linear layers of one block by module name.
        routing: tells an expert's tokens. The caller activates it if the block has experts.
    """

    def __init__(self, layers: dict[str, nn.Module], routing: Routing | None = None) -> None:
        self.layers = layers
        self.routing = routing or Routing()
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}  # Ĉ and M by layer

    @contextmanager
    def recording_inputs(self) -> Iterator[dict[str, list[LayerInput]]]:
        """Yield a dictionary that has the inputs of every layer, call by call, by name, while active."""
        inputs: dict[str, list[LayerInput]] = {}
        handles = []
        for name, module in self.layers.items():
            handles.append(module.register_forward_pre_hook(self._recording_hook(inputs, name)))
        with temporary_hooks(handles):
            yield inputs

    def _recording_hook(self, recorded: dict[str, list[LayerInput]], name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            recorded.setdefault(name, []).append(LayerInput(inputs[0], self.routing.tokens))

        return hook

    def add(
        self,
        dense: dict[str, list[LayerInput]],
        compressed: dict[str, list[LayerInput]],
        mask: Tensor | None,
        context: Context | None = None,
    ) -> None:
        """Add the tokens of one batch that count, from the inputs of the layers in both models.

        Tokens that an expert sees in only one of the models do not count.

        Args:
            dense: inputs in the dense model by layer, call by call.
            compressed: inputs in the compressed model, likewise.
            mask: as for `StatisticsCollector.start_batch`.
            context: as for `StatisticsCollector.start_batch`.
        """
        for name in dense:
            # Routers may send no token to an expert in one of the models.
            for one, other in zip(dense[name], compressed.get(name, []), strict=False):
                dense_input, compressed_input = on_common_tokens(one, other)
                counting = _mask_of(dense_input.x, mask, context)
                x = select_counted(dense_input.x, counting, dense_input.tokens).double()
                x_hat = select_counted(compressed_input.x, counting, compressed_input.tokens).double()
                gram, cross = self._sums.get(name) or x.new_zeros(2, x.shape[-1], x.shape[-1]).unbind()
                self._sums[name] = (gram + x_hat.T @ x_hat, cross + x.T @ x_hat)

    def all_reduce(self, group: ProcessGroup = SINGLE_PROCESS) -> None:
        """Replace the sums of this process by those over the tokens of all processes."""
        # A layer that no token reached in this process is missing, which counts as zeros.
        parts = {}
        for name, (gram, cross) in self._sums.items():
            parts[f"{name}.gram"] = gram
            parts[f"{name}.cross"] = cross
        summed = group.all_reduce(parts)
        self._sums = {}
        for name in self.layers:
            if f"{name}.gram" in summed:
                self._sums[name] = (summed[f"{name}.gram"], summed[f"{name}.cross"])

    def extend(self, name: str, statistics: Statistics) -> Statistics:
        """Return the statistics of a layer with its two matrices.

        If no token reached the layer in both models, its inputs count as the same in both.
        """
        gram, cross = self._sums.get(name) or (statistics.gram, statistics.gram)
        return replace(statistics, compressed_input_gram=gram, cross_gram=cross)


def _mask_of(x: Tensor, mask: Tensor | None, context: Context | None) -> Tensor | None:
    """Return the mask of a layer's input x.

    The keys and values of cross-attention read the context, which has its own mask.
    """
    if context is not None:
        states, context_mask = context
        if x is states:
            return context_mask
    return mask


def on_common_tokens(one: LayerInput, other: LayerInput) -> tuple[LayerInput, LayerInput]:
    """Return two inputs of a layer so that their tokens are the same.

    An expert's inputs keep only the tokens that reached it both times, in ascending order. The inputs of other
    layers are returned as they are.
    """
    if one.tokens is None or other.tokens is None:
        return one, other
    common = one.tokens[torch.isin(one.tokens, other.tokens)].sort().values
    return _at_tokens(one, one.tokens, common), _at_tokens(other, other.tokens, common)


def _at_tokens(layer_input: LayerInput, tokens: Tensor, common: Tensor) -> LayerInput:
    """Pick the tokens `common` out of an input with the tokens `tokens`, which contain them in any order."""
    rows = (tokens[:, None] == common).int().argmax(dim=0)
    return LayerInput(layer_input.x[rows], common)


def select_counted(x: Tensor, mask: Tensor | None, tokens: Tensor | None = None) -> Tensor:
    """Return the tokens of an input (..., n) that count, (tokens, n).

    Args:
        mask: (B, T), nonzero for tokens that count. It fits inputs (B, T, ..., n), (B, 1, T, n) and (B T, n), and the
            inputs (t, n) of experts together with `tokens`. All tokens of any other input count.
        tokens: indices (t,) into the tokens of the batch. None outside experts.
    """
    if tokens is not None:  # (t, n), an expert's
        return x if mask is None else x[mask.to(tokens.device).bool().flatten()[tokens]]
    if mask is None:
        return x.flatten(0, -2)
    if x.shape[: mask.dim()] == mask.shape:  # (B, T, ..., n)
        return x[mask.bool()].flatten(0, -2)
    # This is (B, 1, T, n) or (B T, n). Dimensions of size 1 do not tell how the tokens are laid out.
    token_sides = _sides_above_one(x.shape[:-1])
    if token_sides in (_sides_above_one(mask.shape), [mask.numel()]):
        return x.flatten(0, -2)[mask.bool().flatten()]
    return x.flatten(0, -2)


def _sides_above_one(shape: torch.Size) -> list[int]:
    return [side for side in shape if side > 1]
