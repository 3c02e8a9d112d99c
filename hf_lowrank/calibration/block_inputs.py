"""Capture the input of a model's first block and the arguments of all blocks, so that each can be run by itself."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from ..runtime.errors import CompressionError
from .activations import ActivationCache, CachedTensor
from .batches import TokenBatch
from .blocks import BlockBatch, BlockCall, ExtraOutputs, first_start, hidden_states
from .hooks import temporary_hooks

PROBE_TOKENS = 8
"""Number of tokens of the sequence with which it is found out what the arguments of blocks depend on."""


@torch.no_grad()
def capture(
    model: PreTrainedModel,
    blocks: dict[str, nn.Module],
    batches: list[TokenBatch],
    cache: ActivationCache | None = None,
) -> list[BlockBatch]:
    """Run the model once per batch, and keep the input of the first block and the arguments of every block.

    The blocks themselves are not computed if their arguments do not depend on the results of other blocks. A few
    tokens show whether they do.

    Args:
        model: the model.
        blocks: its blocks by name, in the order of the model.
        batches: the inputs of the model.
        cache: keeps the hidden states.

    Raises:
        CompressionError: if a block was called more than once, or not with a tensor of hidden states first, or if no
            block was called.
    """
    cache = cache or ActivationCache()
    extra_outputs = _extra_outputs(model, blocks, batches)
    skipping: AbstractContextManager[None] = nullcontext()
    if extra_outputs is not None:
        skipping = skipping_blocks(blocks, extra_outputs)
    # Only the arguments are captured here, the blocks are computed later, one by one (see `run_block`).
    with skipping:
        captured = [_capture_batch(model, blocks, batch, cache) for batch in batches]
    for block_batch in captured:
        block_batch.extra_outputs = extra_outputs
    return captured


def _extra_outputs(
    model: PreTrainedModel, blocks: dict[str, nn.Module], batches: list[TokenBatch]
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
        computed = _capture_batch(model, blocks, probe, ActivationCache())
    for values in extra_outputs.values():
        # A tensor is computed from hidden states, so that a skipped block cannot return it.
        if any(isinstance(value, Tensor) for value in values or ()):
            return None
    # The second run differs from the first only in what the blocks compute.
    with skipping_blocks(blocks, extra_outputs):
        skipped = _capture_batch(model, blocks, probe, ActivationCache())
    return extra_outputs if _equal(computed.calls, skipped.calls) else None


def probe_batch(batch: TokenBatch) -> TokenBatch:
    """Return the first tokens of the first sequence of a batch."""
    mask = batch.attention_mask
    if mask is not None:
        mask = mask[:1, :PROBE_TOKENS]
    return TokenBatch(batch.input_ids[:1, :PROBE_TOKENS], mask)


def _extra_hook(extra_outputs: ExtraOutputs, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        extra_outputs[name] = output[1:] if isinstance(output, tuple) else None

    return hook


@contextmanager
def skipping_blocks(blocks: dict[str, nn.Module], extra_outputs: ExtraOutputs) -> Iterator[None]:
    """Make blocks return the hidden states with which they are called, and their usual extra outputs, while active."""
    # A module that accelerate has hooks on has a `forward` of its own, which is put back.
    own_forwards = {name: vars(block).get("forward") for name, block in blocks.items()}
    for name, block in blocks.items():
        vars(block)["forward"] = _identity(name, block.forward, extra_outputs)
    try:
        yield
    finally:
        for name, block in blocks.items():
            if own_forwards[name] is None:
                del vars(block)["forward"]
            else:
                vars(block)["forward"] = own_forwards[name]


def _identity(name: str, forward: Any, extra_outputs: ExtraOutputs) -> Any:
    """Return a forward method with the signature of `forward`, which models inspect, that computes nothing."""

    @functools.wraps(forward)
    def identity(*args: Any, **kwargs: Any) -> Any:
        hidden, _, _ = _split_arguments(name, args, kwargs)
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


def _capture_batch(
    model: PreTrainedModel, blocks: dict[str, nn.Module], batch: TokenBatch, cache: ActivationCache
) -> BlockBatch:
    """Run the model on one batch and record the calls of its blocks."""
    recorder = _CallRecorder(model, blocks, batch, cache)
    with recorder.recording():
        # The model is run without its head, whose logits nobody reads.
        base: Any = model.base_model
        base(**batch.arguments(base))
    calls = [recorder.calls.get(name) for name in blocks]
    if not recorder.calls:
        raise CompressionError(
            f"{type(model).__name__}: none of its blocks was called ({next(iter(blocks))}); "
            "this architecture is not supported"
        )
    return BlockBatch(first_start(calls).tensor, calls, cache, batch)


class _CallRecorder:
    """Records how a model calls its blocks in one batch.

    Attributes:
        calls: the calls by the name of the block. A block that was not called is missing.
    """

    def __init__(
        self, model: PreTrainedModel, blocks: dict[str, nn.Module], batch: TokenBatch, cache: ActivationCache
    ) -> None:
        self.calls: dict[str, BlockCall] = {}
        self._model = model
        self._blocks = blocks
        self._batch = batch
        self._cache = cache
        names = list(blocks)
        self._before = dict(zip(names[1:], names[:-1], strict=True))
        self._last_output: dict[str, Any] = {}  # hidden states of the block that ran last, by its name

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the calls of the blocks while active."""
        handles = []
        for name, block in self._blocks.items():
            handles.append(block.register_forward_pre_hook(self._call_hook(name), with_kwargs=True))
            handles.append(block.register_forward_hook(self._output_hook(name)))
        with temporary_hooks(handles):
            yield

    def _call_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._record(name, module, args, kwargs)

        return hook

    def _record(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name in self.calls:
            raise CompressionError(
                f"{type(self._model).__name__}: its blocks were not called once each in order ({name} twice); "
                "this architecture is not supported"
            )
        hidden, other_args, other_kwargs = _split_arguments(name, args, kwargs)
        # It is the very same tensor: a block goes on from the one before it if nothing is computed between the two.
        continues = name in self._before and hidden is self._last_output.get(self._before[name])
        start = None if continues else self._cache.put(hidden)
        arguments = inspect.signature(module.forward).bind(hidden, *other_args, **other_kwargs).arguments
        states = arguments.get("encoder_hidden_states")
        mask = self._batch.attention_mask
        context = None
        if states is not None:  # a decoder: the attention mask belongs to the encoder's tokens
            context = (states, mask)
            mask = self._batch.others.get("decoder_attention_mask")
        self.calls[name] = BlockCall(other_args, other_kwargs, start, mask, context)

    def _output_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._last_output = {name: hidden_states(output)}

        return hook


def _split_arguments(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Split the arguments of a block into its hidden states and the others, positional and by keyword.

    A key-value cache among the others is replaced by None.

    Raises:
        CompressionError: if there is no tensor of hidden states.
    """
    other_args = tuple(_without_cache(value) for value in args[1:])
    other_kwargs = {key: _without_cache(value) for key, value in kwargs.items()}
    if args and isinstance(args[0], Tensor):
        return args[0], other_args, other_kwargs
    # Some models pass the hidden states by keyword, too.
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return other_kwargs.pop("hidden_states"), (), other_kwargs
    raise CompressionError(
        f"{name}: was not called with a tensor of hidden states; this architecture is not supported"
    )


def _without_cache(value: Any) -> Any:
    return None if isinstance(value, Cache) else value
