"""Capture the input of a model's first block and the arguments of all blocks, so that each can be run by itself."""

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from ..execution.files import one_line
from ..models.architectures import forward_names, without_head
from ..runtime.errors import CompressionError
from .activations import ActivationCache, CachedTensor
from .batches import TokenBatch
from .blocks import BlockBatch, BlockCall, ExtraOutputs, first_start, hidden_states
from .hooks import replaced_forwards, temporary_hooks

PROBE_TOKENS = 8
"""Number of tokens of the sequence with which it is found out what the arguments of blocks depend on."""


@torch.no_grad()
def capture(
    model: PreTrainedModel,
    blocks: dict[str, nn.Module],
    batches: list[TokenBatch],
    cache: ActivationCache | None = None,
    left_dense: Collection[str] = (),
) -> list[BlockBatch]:
    """Run the model once per batch, and keep the input of the first block and the arguments of every block.

    The blocks themselves are not computed if their arguments do not depend on the results of other blocks. A few
    tokens show whether they do.

    Args:
        model: the model.
        blocks: its blocks by name, in the order of the model.
        batches: the inputs of the model.
        cache: keeps the hidden states.
        left_dense: names of blocks of which no layer is compressed. It does not matter how these are called.

    Raises:
        CompressionError: if another block was called without a tensor of hidden states or returned none, or if no
            block was called.
    """
    cache = cache or ActivationCache()
    needed = blocks.keys() - set(left_dense)
    extra_outputs = _extra_outputs(model, blocks, batches, needed)
    skipping: AbstractContextManager[None] = nullcontext()
    if extra_outputs is not None:
        skipping = skipping_blocks(blocks, extra_outputs)
    # Only the arguments are captured here, the blocks are computed later, one by one (see `run_block`).
    with skipping:
        captured = [_capture_batch(model, blocks, batch, cache, needed) for batch in batches]
    for block_batch in captured:
        block_batch.extra_outputs = extra_outputs
    return captured


def _extra_outputs(
    model: PreTrainedModel, blocks: dict[str, nn.Module], batches: list[TokenBatch], needed: Set[str]
) -> ExtraOutputs | None:
    """Collect the values that blocks return beside their hidden states. Return None if blocks cannot be skipped.

    They can be skipped if every block gets the same arguments with and without the others being computed. The first
    tokens of the first batch show that. Blocks are not skipped if a batch has other inputs than tokens.
    """
    if not batches:
        return None
    for batch in batches:
        if batch.others or not batch.input_ids.numel():
            return None
    probe = probe_batch(batches[0])
    extra_outputs: ExtraOutputs = {}
    handles = [block.register_forward_hook(_extra_hook(extra_outputs, name)) for name, block in blocks.items()]
    with temporary_hooks(handles):
        computed = _capture_batch(model, blocks, probe, ActivationCache(), needed)
    for values in extra_outputs.values():
        # A tensor is computed from hidden states, so that a skipped block cannot return it.
        if any(isinstance(value, Tensor) for value in values or ()):
            return None
    # The second run differs from the first only in what the blocks compute.
    try:
        with skipping_blocks(blocks, extra_outputs):
            skipped = _capture_batch(model, blocks, probe, ActivationCache(), needed)
    except Exception:
        # Models whose blocks change the shape of the hidden states, or return them otherwise, do not run in this way.
        return None
    return extra_outputs if _equal(computed.calls, skipped.calls) else None


def probe_batch(batch: TokenBatch) -> TokenBatch:
    """Return the first tokens of the first sequence of a batch."""
    mask = batch.attention_mask
    if mask is not None:
        mask = mask[:1, :PROBE_TOKENS]
    return TokenBatch(batch.input_ids[:1, :PROBE_TOKENS], mask)


def _extra_hook(extra_outputs: ExtraOutputs, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            extra_outputs[name] = None
        elif isinstance(output, tuple) and isinstance(output[0], Tensor):
            extra_outputs[name] = output[1:]
        else:  # hidden states among other things: their place in it is not known
            extra_outputs[name] = (torch.empty(0),)

    return hook


def skipping_blocks(blocks: dict[str, nn.Module], extra_outputs: ExtraOutputs) -> AbstractContextManager[None]:
    """Make blocks return the hidden states with which they are called, and their usual extra outputs, while active."""
    return replaced_forwards({block: _identity(name, block.forward, extra_outputs) for name, block in blocks.items()})


def _identity(name: str, forward: Any, extra_outputs: ExtraOutputs) -> Any:
    """Return a forward method with the signature of `forward`, which models inspect, that computes nothing."""

    @functools.wraps(forward)
    def identity(*args: Any, **kwargs: Any) -> Any:
        hidden, *_ = _split_arguments(args, kwargs)
        extra = extra_outputs.get(name)
        return hidden if extra is None else (hidden, *extra)

    return identity


def _equal(one: Any, other: Any) -> bool:
    """Return whether two arguments are equal in every value, tensors and nested containers included."""
    if isinstance(one, CachedTensor) and isinstance(other, CachedTensor):
        return _equal(one.tensor, other.tensor)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, Sequence) and not isinstance(one, str):
        return len(one) == len(other) and all(map(_equal, one, other))
    # These are numbers, texts, configs and other plain objects.
    return one is other or bool(one == other)


class _CalledAgain(Exception):
    """Ends a capture in which a block is called again after other blocks have gone on from its output."""


def _capture_batch(
    model: PreTrainedModel, blocks: dict[str, nn.Module], batch: TokenBatch, cache: ActivationCache, needed: Set[str]
) -> BlockBatch:
    """Run the model on one batch and record the calls of its blocks."""
    try:
        calls = _record_calls(_CallRecorder(blocks, batch, cache, needed), model)
    except _CalledAgain:
        calls = _record_calls(_CallRecorder(blocks, batch, cache, needed, looped=True), model)
    if not any(calls):
        raise CompressionError(
            f"{type(model).__name__}: none of its blocks was called ({next(iter(blocks))}); "
            "this architecture is not supported"
        )
    return BlockBatch(first_start(calls).tensor, calls, cache, batch)


def _record_calls(recorder: "_CallRecorder", model: PreTrainedModel) -> list[BlockCall | None]:
    with recorder.recording():
        # The model is run without its head, whose logits nobody reads, unless the head gives inputs other names.
        base = without_head(model)
        reader = base if recorder.batch.inputs.keys() <= set(forward_names(base)) else model
        _run(reader, recorder.batch, type(model).__name__)
    return [recorder.calls_of(name) for name in recorder.blocks]


def _run(model: PreTrainedModel, batch: TokenBatch, name: str) -> None:
    """Run a model, or its base model, on a batch.

    Args:
        name: the model's class, for the message.

    Raises:
        CompressionError: if its code cannot read the batch.
    """
    try:
        model(**batch.arguments(model))
    except (CompressionError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in batch.inputs.items())
        raise CompressionError(
            f"calibration: {name} cannot read a batch of {shapes} ({type(error).__name__}: {one_line(error)})"
        ) from error


class _CallRecorder:
    """Records how a model calls its blocks in one batch.

    Args:
        needed: the blocks of which layers are compressed.
        looped: whether the model goes through several blocks again and again. No block then counts as going on from
            the one before it, and the inputs of all calls are kept.
    """

    def __init__(
        self,
        blocks: dict[str, nn.Module],
        batch: TokenBatch,
        cache: ActivationCache,
        needed: Set[str],
        looped: bool = False,
    ) -> None:
        self.blocks = blocks
        self.batch = batch
        self._needed = needed
        self._cache = cache
        self._looped = looped
        self._calls: dict[str, list[BlockCall]] = {}
        names = list(blocks)
        self._before = dict(zip(names[1:], names[:-1], strict=True))
        self._last_output: dict[str, Tensor] = {}  # hidden states of the block that ran last, by its name

    def calls_of(self, name: str) -> BlockCall | None:
        """Return the call of a block, with its repeats. None if it was not called."""
        if name not in self._calls:
            return None
        first, *repeats = self._calls[name]
        return first._replace(repeats=tuple(repeats))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the calls of the blocks while active."""
        handles = []
        for name, block in self.blocks.items():
            handles.append(block.register_forward_pre_hook(self._call_hook(name), with_kwargs=True))
            handles.append(block.register_forward_hook(self._output_hook(name)))
        with temporary_hooks(handles):
            yield

    def _call_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._record(name, module, args, kwargs)

        return hook

    def _record(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _hidden_place(args, kwargs) is None:
            self._ignore(name, "was not called with a tensor of hidden states")
            return
        hidden, place, other_args, other_kwargs = _split_arguments(args, kwargs)
        earlier_calls = self._calls.setdefault(name, [])
        if earlier_calls and name not in self._last_output and not self._looped:
            raise _CalledAgain
        start = None if self._continues(name, hidden, repeats=bool(earlier_calls)) else self._cache.put(hidden)
        states = inspect.signature(module.forward).bind(*args, **kwargs).arguments.get("encoder_hidden_states")
        mask = self.batch.attention_mask
        context = None
        if states is not None:  # a decoder: the attention mask belongs to the encoder's tokens
            context = (states, mask)
            mask = self.batch.others.get("decoder_attention_mask")
        earlier_calls.append(BlockCall(other_args, other_kwargs, start, mask, context, place))

    def _continues(self, name: str, hidden: Tensor, repeats: bool) -> bool:
        """Return whether a block goes on from the block before it, or from its own call before this one."""
        before = name if repeats else self._before.get(name)
        if before is None or (self._looped and not repeats):
            return False
        # It is the very same tensor if nothing is computed between the two.
        return hidden is self._last_output.get(before)

    def _output_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            states = hidden_states(output)
            if states is None:
                self._ignore(name, f"returned {type(output).__name__} without a tensor")
            elif name in self._calls:
                self._last_output = {name: states}

        return hook

    def _ignore(self, name: str, reason: str) -> None:
        """Count a block as not called, whose calls cannot be repeated.

        Raises:
            CompressionError: if layers of it are to be compressed.
        """
        if name in self._needed:
            raise CompressionError(
                f"{name}: {reason}, which is not supported; leave it dense (modules_to_not_convert={[name]})"
            )
        self._calls.pop(name, None)
        self._last_output = {}


def _split_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, int | str, tuple[Any, ...], dict[str, Any]]:
    """Split the arguments of a block into its hidden states, their place, and the others, positional and by keyword.

    A key-value cache among the others is replaced by None.
    """
    place = _hidden_place(args, kwargs)
    assert place is not None, "checked before"
    other_args = [_without_cache(value) for value in args]
    other_kwargs = {key: _without_cache(value) for key, value in kwargs.items()}
    hidden = other_kwargs.pop(place) if isinstance(place, str) else other_args.pop(place)
    return hidden, place, tuple(other_args), other_kwargs


def _hidden_place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """Return the position or keyword of the hidden states among the arguments of a block, None if there are none.

    They are the first argument, or the one of this name, or else the first that is a tensor of floats.
    """
    if args and isinstance(args[0], Tensor):
        return 0
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return "hidden_states"
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in places:
        if isinstance(value, Tensor) and value.is_floating_point():
            return place
    return None


def _without_cache(value: Any) -> Any:
    return None if isinstance(value, Cache) else value
