"""Batches on their way from block to block, and the measurements of a block while it runs.

A block is run with the arguments with which the model called it (see `block_inputs.py`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any, NamedTuple, Protocol

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..execution.process_group import SINGLE_PROCESS, ProcessGroup
from ..methods import Statistics
from .activations import ActivationCache, CachedTensor
from .attention import CausalAttention
from .batches import TokenBatch
from .hooks import temporary_hooks
from .statistics import CompressedInputSums, Context, Routing, StatisticsCollector


class BlockCall(NamedTuple):
    """How the model called a block in one batch.

    Attributes:
        args: the positional arguments beside the hidden states, without a key-value cache, which a second run of the
            block would fill again.
        kwargs: the keyword arguments, likewise.
        start: the hidden states, (B, T, d), of a block that starts a list of blocks, such as the first block of a
            decoder. None if they are the output of the block before it.
        mask: (B, T) of the hidden states that count. None if all count.
        context: the encoder states that a block of a decoder reads. None for other blocks.
        place: where the hidden states belong among the arguments: a position, or a keyword.
        repeats: the further calls of a block that a model runs several times (ALBERT), in order. One without `start`
            goes on from the output of the call before it.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    start: CachedTensor | None = None
    mask: Tensor | None = None
    context: Context | None = None
    place: int | str = 0
    repeats: tuple["BlockCall", ...] = ()

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Call the block in this way once, on the device of the hidden states, and return its own, (B, T, d)."""
        args, kwargs = send_to_device((self.args, self.kwargs), hidden.device)
        with CausalAttention():
            if isinstance(self.place, str):
                output = block(*args, **kwargs, **{self.place: hidden})
            else:
                output = block(*args[: self.place], hidden, *args[self.place :], **kwargs)
        states = hidden_states(output)
        assert states is not None, "checked when the block was captured"
        return states


class Carrier(Protocol):
    """A batch on its way from block to block, forward or back."""

    def carried(self) -> dict[str, Tensor]:
        """Return what goes from block to block, by name."""

    def carry(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `carried` returned."""


ExtraOutputs = dict[str, tuple[Any, ...] | None]
"""Values that blocks return beside their hidden states, by name. None for a block that returns hidden states alone."""


class BlockBatch:
    """A batch on its way through the blocks.

    Args:
        hidden: the input of the next block, (B, T, d).
        calls: for each block how the model called it. None if it did not, as a vision tower in a batch of text alone.
        cache: keeps the hidden states.
        source: the inputs of the model.
        extra_outputs: what the blocks return beside their hidden states, if it is the same in every batch and the
            arguments of no block depend on the results of another. Else None.

    Attributes:
        compressed_twin: the same batch as the compressed model carries it. None unless a method compares the models.
    """

    def __init__(
        self,
        hidden: Tensor,
        calls: list[BlockCall | None],
        cache: ActivationCache | None = None,
        source: TokenBatch | None = None,
        extra_outputs: ExtraOutputs | None = None,
    ) -> None:
        self.cache = cache or ActivationCache()
        self.source = source
        self.extra_outputs = extra_outputs
        self.calls = calls
        self.compressed_twin: BlockBatch | None = None
        self._hidden = self.cache.put(hidden)

    @property
    def hidden(self) -> Tensor:
        """The hidden states at the input of the next block, (B, T, d)."""
        return self._hidden.tensor

    @hidden.setter
    def hidden(self, hidden: Tensor) -> None:
        self._hidden = self.cache.put(hidden)

    def track_compressed(self) -> None:
        """Start to carry the batch through the compressed model, too, from the present hidden states on."""
        self.compressed_twin = BlockBatch(self.hidden, self.calls, self.cache)

    def rewind(self) -> None:
        """Go back to the input of the first block that the model called."""
        self.hidden = first_start(self.calls).tensor

    def carried(self) -> dict[str, Tensor]:
        """Return what goes from block to block, where it waits: the hidden states, and the compressed twin's."""
        tensors = {"hidden": self._hidden.waiting}
        if self.compressed_twin is not None:
            tensors["compressed_hidden"] = self.compressed_twin._hidden.waiting
        return tensors

    def carry(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `carried` returned."""
        device = self._hidden.waiting.device
        self.hidden = tensors["hidden"].to(device)
        if self.compressed_twin is not None:
            self.compressed_twin.hidden = tensors["compressed_hidden"].to(device)

    def enter_block_list(self, index: int) -> None:
        """Take the hidden states with which a list of blocks starts, if this block is its first."""
        call = self.calls[index]
        if call is not None and call.start is not None:
            self.hidden = call.start.tensor


def first_start(calls: list[BlockCall | None]) -> CachedTensor:
    """Return the hidden states with which the first block was called."""
    for call in calls:
        if call is not None and call.start is not None:
            return call.start
    raise AssertionError("the first block that a model calls has no block before it")


def starts_new_block_list(batches: list[BlockBatch], index: int) -> bool:
    """Return whether the hidden states of a block do not come from the block before it in the list of all blocks."""
    if index == 0:
        return False
    for batch in batches:
        call = batch.calls[index]
        if call is not None and call.start is not None:
            return True
    return False


@contextmanager
def record_calls(layers: dict[str, nn.Module]) -> Iterator[set[str]]:
    """Yield a set to which the names of the layers that are called are added while active."""
    called: set[str] = set()
    handles = [layer.register_forward_pre_hook(_name_hook(called, name)) for name, layer in layers.items()]
    with temporary_hooks(handles):
        yield called


def _name_hook(called: set[str], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        called.add(name)

    return hook


def run_block(block: nn.Module, index: int, batch: BlockBatch, hidden: Tensor | None = None) -> Tensor:
    """Run a block on a batch as the model called it, as often as it did, and return its hidden states, (B, T, d).

    If the model did not call the block, the hidden states that it would get are returned unchanged.

    Args:
        hidden: the hidden states that the block gets, by default those of the batch.
    """
    call = batch.calls[index]
    if hidden is None:
        hidden = batch.hidden
    if call is None:
        return hidden
    hidden = call.run(block, hidden)
    for repeat in call.repeats:
        if repeat.start is not None:
            hidden = repeat.start.tensor
        hidden = repeat.run(block, hidden)
    return hidden


def hidden_states(output: Any) -> Tensor | None:
    """Return the hidden states of a block's output. None if there are none.

    They are the output itself, or the first tensor in a tuple, list, dictionary or dataclass.
    """
    if isinstance(output, Tensor):
        return output
    parts: list[Any] = []
    if isinstance(output, Mapping):
        parts = [output.get("hidden_states"), output.get("last_hidden_state"), *output.values()]
    elif isinstance(output, (list, tuple)):
        parts = list(output)
    elif is_dataclass(output):
        parts = list(vars(output).values())
    for part in parts:
        states = hidden_states(part)
        if states is not None:
            return states
    return None


def block_statistics(
    block: nn.Module,
    index: int,
    batches: list[BlockBatch],
    layers: dict[str, nn.Module],
    needs_gram: bool,
    move: bool,
    group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, Statistics | None]:
    """Run a block on the batches and return the statistics of its linear layers, over all batches of the group.

    A layer that no batch reached has None.

    Args:
        block: the block.
        index: index of the block in the model.
        batches: the batches of this process at the input of the block.
        layers: the linear layers of the block by module name.
        needs_gram: whether to collect Gram matrices, too.
        move: whether the batches take the outputs of the block as their hidden states.
        group: the processes that share the batches.

    Raises:
        NumericalError: if an input was not finite.
    """
    routing = Routing()
    collector = StatisticsCollector(layers, needs_gram, routing)
    with routing.watching(block), collector.collecting():
        for batch in batches:
            call = batch.calls[index]
            # A block that the model did not call is not run, so that no layer of it is counted.
            if call is not None:
                collector.start_batch(call.mask, call.context)
            output = run_block(block, index, batch)
            if move:
                batch.hidden = output
    return collector.statistics(group)


@torch.no_grad()
def compressed_input_sums(
    block: nn.Module,
    index: int,
    batches: list[BlockBatch],
    layers: dict[str, nn.Module],
    group: ProcessGroup = SINGLE_PROCESS,
) -> CompressedInputSums:
    """Run a dense block on the batches and on their compressed twins, and return sums over the inputs of its layers.

    The batches stay at the input of the block.

    Args:
        block: the block, none of whose layers is compressed so far.
        index: index of the block in the model.
        batches: the batches of this process at the input of the block.
        layers: the linear layers of the block by module name.
        group: the processes that share the batches.
    """
    routing = Routing()
    sums = CompressedInputSums(layers, routing)
    with routing.watching(block):
        for batch in batches:
            call = batch.calls[index]
            if call is None:
                continue
            # The block is still dense: both runs have the same weights and differ in their hidden states.
            with sums.recording_inputs() as dense:
                run_block(block, index, batch)
            with sums.recording_inputs() as compressed:
                # Without a twin the inputs count as the same in both models.
                run_block(block, index, batch.compressed_twin or batch)
            sums.add(dense, compressed, call.mask, call.context)
    sums.all_reduce(group)
    return sums
