"""The inputs of a model's blocks: captured once, then carried from block to block by replaying each block's own arguments."""

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from ..execution.process_group import SINGLE_PROCESS, ProcessGroup
from ..methods.base import Statistics
from ..runtime.errors import CompressionError
from .activations import ActivationCache, CachedTensor
from .batches import TokenBatch
from .statistics import CompressedInputSums, Routing, StatisticsCollector

PROBE_TOKENS = 8
"""Tokens that show what the arguments of a block depend on."""


class Call(NamedTuple):
    """How the model called a block in one batch.

    Attributes:
        args, kwargs: its arguments beside the hidden states; without a cache, which a replay would fill again.
        start: the hidden states, (B, T, d), if they are not the output of the block before, as where a decoder starts.
        mask: (B, T) of the tokens that count in the hidden states; None for all.
        context: the states of an encoder that the block reads too, (B, T', d), and the mask of those that count.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    start: CachedTensor | None = None
    mask: Tensor | None = None
    context: tuple[Tensor, Tensor | None] | None = None


class BlockBatch:
    """A batch on its way through the blocks.

    Args:
        hidden: input of the next block, (B, T, d).
        calls: for each block how the model called it; None if it did not (a vision tower, in a batch of text alone).
        cache: where the hidden states wait.
        source: what the model was given.

    Attributes:
        shifted: the same batch in the compressed model, for methods that compare the two.
    """

    def __init__(
        self,
        hidden: Tensor,
        calls: list[Call | None],
        cache: ActivationCache | None = None,
        source: TokenBatch | None = None,
    ) -> None:
        self.cache = cache or ActivationCache()
        self.source = source
        self.calls = calls
        self.compressed_twin: BlockBatch | None = None
        self._hidden = self.cache.put(hidden)

    @property
    def hidden(self) -> Tensor:
        return self._hidden.tensor

    @hidden.setter
    def hidden(self, hidden: Tensor) -> None:
        self._hidden = self.cache.put(hidden)

    def track_compressed(self) -> None:
        """Start the same batch in the compressed model."""
        self.compressed_twin = BlockBatch(self.hidden, self.calls, self.cache)

    def rewind(self) -> None:
        """Go back to the input of the first block that the model called."""
        self.hidden = next(call.start for call in self.calls if call is not None and call.start is not None).tensor

    def enter_block_list(self, index: int) -> None:
        """Take the hidden states with which a new list of blocks starts, if this block is its first."""
        call = self.calls[index]
        if call is not None and call.start is not None:
            self.hidden = call.start.tensor


@torch.no_grad()
def capture(
    model: PreTrainedModel,
    blocks: dict[str, nn.Module],
    batches: list[TokenBatch],
    cache: ActivationCache | None = None,
) -> list[BlockBatch]:
    """Run the model once per batch and keep the input of the first block, on the cache, and the arguments of every block.

    The blocks themselves are run only for a few tokens, where that shows that no block's arguments depend on what others compute.

    Raises:
        CompressionError: if a block was called more than once, or not with a tensor of hidden states first.
    """
    with ExitStack() as stack:
        if (rest := _rest_of_outputs(model, blocks, batches)) is not None:
            stack.enter_context(_passed_over(blocks, rest))
        return [_capture_batch(model, blocks, batch, cache or ActivationCache()) for batch in batches]


def _rest_of_outputs(
    model: PreTrainedModel, blocks: dict[str, nn.Module], batches: list[TokenBatch]
) -> dict[str, tuple[Any, ...] | None] | None:
    """What each block that is called gives beside its hidden states, None if it gives them alone; None if blocks cannot be passed over."""
    if not batches or any(batch.others or not batch.input_ids.numel() for batch in batches):
        return None
    ids, mask = batches[0].input_ids[:1, :PROBE_TOKENS], batches[0].attention_mask
    few = TokenBatch(ids, None if mask is None else mask[:1, :PROBE_TOKENS])
    rest: dict[str, tuple[Any, ...] | None] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            rest[name] = output[1:] if isinstance(output, tuple) else None

        return hook

    handles = [block.register_forward_hook(note(name)) for name, block in blocks.items()]
    try:
        computed = _capture_batch(model, blocks, few, ActivationCache())
    finally:
        for handle in handles:
            handle.remove()
    if any(isinstance(value, Tensor) for values in rest.values() for value in values or ()):
        return None
    with _passed_over(blocks, rest):
        passed = _capture_batch(model, blocks, few, ActivationCache())
    return rest if _same(computed.calls, passed.calls) else None


@contextmanager
def _passed_over(blocks: dict[str, nn.Module], rest: dict[str, tuple[Any, ...] | None]) -> Iterator[None]:
    """While active, blocks give back the hidden states that they are called with, and beside them what they gave before."""

    def passing(name: str, forward: Any) -> Any:
        @functools.wraps(forward)
        def give_back(*args: Any, **kwargs: Any) -> Any:
            hidden, beside = _split(name, args, kwargs)[0], rest.get(name)
            return hidden if beside is None else (hidden, *beside)

        return give_back

    own = {name: block.__dict__.get("forward") for name, block in blocks.items()}  # that of accelerate's hooks
    for name, block in blocks.items():
        block.__dict__["forward"] = passing(name, block.forward)
    try:
        yield
    finally:
        for name, block in blocks.items():
            if own[name] is None:
                del block.__dict__["forward"]
            else:
                block.__dict__["forward"] = own[name]


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments are the same in every value."""
    if isinstance(one, CachedTensor) and isinstance(other, CachedTensor):
        return _same(one.tensor, other.tensor)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, Sequence) and not isinstance(one, str):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or bool(one == other)


def starts_new_block_list(batches: list[BlockBatch], index: int) -> bool:
    """Whether the block's hidden states come from elsewhere than from the block before."""
    return index > 0 and any(
        call is not None and call.start is not None for call in (batch.calls[index] for batch in batches)
    )


def _capture_batch(
    model: PreTrainedModel, blocks: dict[str, nn.Module], batch: TokenBatch, cache: ActivationCache
) -> BlockBatch:
    calls: dict[str, Call] = {}
    last: dict[str, Any] = {}  # the output of the block that ran last, by its name
    before = dict(zip(list(blocks)[1:], blocks, strict=False))

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in calls:
                raise CompressionError(
                    f"{type(model).__name__}: its blocks were not called once each in order ({name} twice); "
                    "this architecture is not supported"
                )
            hidden, rest, named = _split(name, args, kwargs)
            continues = name in before and hidden is last.get(before[name])
            context = (
                inspect.signature(module.forward).bind(hidden, *rest, **named).arguments.get("encoder_hidden_states")
            )
            start = None if continues else cache.put(hidden)
            if context is None:
                calls[name] = Call(rest, named, start, batch.attention_mask)
            else:
                mask = batch.others.get("decoder_attention_mask")
                calls[name] = Call(rest, named, start, mask, (context, batch.attention_mask))

        return hook

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            last.clear()
            last[name] = _hidden(output)

        return hook

    handles = [block.register_forward_pre_hook(remember(name), with_kwargs=True) for name, block in blocks.items()]
    handles += [block.register_forward_hook(keep(name)) for name, block in blocks.items()]
    try:
        base: Any = model.base_model
        base(**batch.arguments(base))
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise CompressionError(
            f"{type(model).__name__}: none of its blocks was called ({next(iter(blocks))}); this architecture is not supported"
        )
    ordered = [calls.get(name) for name in blocks]
    first = next(call.start for call in ordered if call is not None and call.start is not None)
    return BlockBatch(first.tensor, ordered, cache, batch)


@contextmanager
def record_calls(layers: dict[str, nn.Module]) -> Iterator[set[str]]:
    """While active, the names of the layers that are called are noted."""
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name, module in layers.items()
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def run_block(block: nn.Module, index: int, batch: BlockBatch) -> Tensor:
    """The block's hidden states for a batch, called as the model called it; those it has already if the model did not."""
    call = batch.calls[index]
    return batch.hidden if call is None else _hidden(block(batch.hidden, *call.args, **call.kwargs))


def block_statistics(
    block: nn.Module,
    index: int,
    batches: list[BlockBatch],
    layers: dict[str, nn.Module],
    needs_gram: bool,
    move: bool,
    group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, Statistics | None]:
    """The statistics of a block's linear layers over all batches of the group; ours move on to the block's outputs if `move`."""
    routing = Routing()
    collector = StatisticsCollector(layers, needs_gram, routing)
    with routing.watching(block), collector.collecting():
        for batch in batches:
            call = batch.calls[index]
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
    """CorrectionSums over the dense inputs and, token by token, those of the compressed model, both through the block as it is."""
    routing = Routing()
    sums = CompressedInputSums(layers, routing)
    with routing.watching(block):
        for batch in batches:
            call = batch.calls[index]
            if call is None:
                continue
            with sums.inputs() as dense:
                run_block(block, index, batch)
            with sums.inputs() as shifted:
                run_block(block, index, batch.compressed_twin or batch)
            sums.add(dense, shifted, call.mask, call.context)
    sums.gather(group)
    return sums


def _hidden(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _split(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden states, and the other arguments without a cache."""
    rest = tuple(None if isinstance(value, Cache) else value for value in args[1:])
    named = {key: None if isinstance(value, Cache) else value for key, value in kwargs.items()}
    if args and isinstance(args[0], Tensor):
        return args[0], rest, named
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return kwargs["hidden_states"], (), {key: value for key, value in named.items() if key != "hidden_states"}
    raise CompressionError(
        f"{name}: was not called with a tensor of hidden states; this architecture is not supported"
    )
