"""The gradient of the loss on its way back through the blocks, one block at a time.

The head comes first, a few tokens at a time. Each block then takes the gradient at its outputs to its inputs: it is
run once more, with gradients, on the inputs that a forward pass has kept. So one block, and what it computes for one
batch, is in memory. That needs a model that is a chain of its blocks (`chain_head`). Any other takes the gradient
through all of its blocks at once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..execution.process_group import SINGLE_PROCESS, ProcessGroup
from .activations import ActivationCache, CachedTensor
from .batches import TokenBatch, split_into_passes
from .block_inputs import probe_batch, skipping_blocks
from .blocks import BlockBatch, BlockCall, ExtraOutputs, hidden_states, run_block
from .gradients import GradientSums, frozen_parameters
from .hooks import temporary_hooks

LOGITS_AT_ONCE = 2**22
"""Maximum number of logits that are computed at a time, unless so few tokens would be slow."""

FEWEST_TOKENS_AT_ONCE = 64
"""Number of tokens whose logits are computed at a time at least."""


@dataclass
class GradientBatch:
    """A part of a calibration batch on its way back through the blocks.

    Attributes:
        number: the number of the calibration batch that it is a part of.
        block_batch: the same tokens on their way forward.
        targets: the token that is to be predicted at each position, (B T,) int64. None to draw it from the model's own
            distribution.
        uniform: a random number for each position, (B T, 1), by which its token is drawn.
        weights: the weight of each position in the loss, (B T, 1).
        inputs: the hidden states at the input of each block by its index, as far as they were kept.
        cache: keeps the hidden states and the gradient.
        gradient: the gradient of the loss at the output of the next block on the way back. None before the head.
    """

    number: int
    block_batch: BlockBatch
    targets: Tensor | None
    uniform: Tensor | None
    weights: Tensor
    cache: ActivationCache
    inputs: dict[int, CachedTensor] = field(default_factory=dict)
    gradient: CachedTensor | None = None

    @property
    def source(self) -> TokenBatch:
        """The tokens."""
        assert self.block_batch.source is not None
        return self.block_batch.source

    def carried(self) -> dict[str, Tensor]:
        """Return what goes from block to block, by name: nothing before the head."""
        return {} if self.gradient is None else {"gradient": self.gradient.waiting}

    def carry(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `carried` returned."""
        for gradient in tensors.values():
            self.gradient = self.cache.put(gradient.to(self.block_batch.hidden.device))

    def keep_input(self, index: int) -> None:
        """Keep the present hidden states as the input of a block."""
        self.inputs[index] = self.cache.put(self.block_batch.hidden)


def drawn_token_batches(
    used: Sequence[TokenBatch],
    own: Sequence[BlockBatch],
    cache: ActivationCache,
    seed: int,
    group: ProcessGroup = SINGLE_PROCESS,
) -> list[GradientBatch]:
    """Return this process's batches for the loss of next tokens drawn from the model itself, summed over tokens.

    Args:
        used: the calibration batches that are used, of all processes: the first ones of all.
        own: this process's parts of all calibration batches.
        cache: keeps what the batches carry.
        seed: the seed of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for number, position, part in _own_parts(used, own, group):
        # The numbers of other processes are drawn, too, so that ours are those of a single process.
        uniform = torch.rand(part.input_ids.numel(), 1, generator=generator)
        if position is None:
            continue
        weights = torch.ones_like(uniform) if part.attention_mask is None else part.attention_mask.view(-1, 1).float()
        batches.append(GradientBatch(number, own[position], None, uniform, weights.cpu(), cache))
    return batches


def next_token_batches(
    used: Sequence[TokenBatch],
    own: Sequence[BlockBatch],
    cache: ActivationCache,
    group: ProcessGroup = SINGLE_PROCESS,
) -> list[GradientBatch]:
    """Return this process's batches for the loss of the next token of the text, its mean over each calibration batch.

    A pair of tokens counts if both do.

    Args:
        used: all calibration batches, of all processes.
        own: this process's parts of them.
        cache: keeps what the batches carry.
    """
    pairs = [int(_pairs(batch).sum()) for batch in used]
    batches = []
    for number, position, part in _own_parts(used, own, group):
        if position is None:
            continue
        weights = _pairs(part).float() / max(pairs[number], 1)
        targets = part.input_ids.roll(-1, dims=1).flatten().cpu()  # the last token has none, and no weight
        batches.append(GradientBatch(number, own[position], targets, None, weights.view(-1, 1).cpu(), cache))
    return batches


def _own_parts(
    used: Sequence[TokenBatch], own: Sequence[BlockBatch], group: ProcessGroup
) -> Iterator[tuple[int, int | None, TokenBatch]]:
    """Yield the number of each batch, for each of its parts, with the part's position in `own` and the part itself.

    The position is None for a part of another process.
    """
    position = 0
    for number, batch in enumerate(used):
        for part in split_into_passes([batch]):
            is_own = position % group.size == group.rank  # as `ProcessGroup.split` has it
            yield number, position // group.size if is_own else None, part
            position += 1


def has_next_token(batch: TokenBatch) -> bool:
    """Return whether in any sequence of a batch a token that counts follows another one that does."""
    return bool(_pairs(batch).any())


def _pairs(batch: TokenBatch) -> Tensor:
    """Return at which positions (B, T) the token and the one after it both count."""
    counts = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
    following = counts.roll(-1, dims=1)
    following[:, -1:] = 0
    return (counts * following).bool()


class Head:
    """What a model computes after its last block: the last norm, the logits and whatever scales them.

    Args:
        model: the model.
        blocks: its blocks by name.
        last: the name of the last block that it calls.
        extra_outputs: what the blocks return beside their hidden states.
        vocabulary: the number of logits of a token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: dict[str, nn.Module],
        last: str,
        extra_outputs: ExtraOutputs,
        vocabulary: int,
    ) -> None:
        self.model = model
        self.blocks = blocks
        self.last = last
        self.extra_outputs = extra_outputs
        self.vocabulary = vocabulary

    def logits(self, input_ids: Tensor, hidden: Tensor) -> Tensor:
        """Return the logits (t, V) of tokens (t,) with the hidden states (t, d) after the last block."""

        def give(block: nn.Module, inputs: Any, output: Any) -> Any:
            return (hidden[None], *output[1:]) if isinstance(output, tuple) else hidden[None]

        # The model runs as usual, with blocks that compute nothing: it knows best what comes after them.
        handle = self.blocks[self.last].register_forward_hook(give)
        with skipping_blocks(self.blocks, self.extra_outputs), temporary_hooks([handle]):
            model: Any = self.model
            logits: Tensor = model(**TokenBatch(input_ids[None]).arguments(self.model)).logits[0]
        return logits

    def gradient(self, batch: GradientBatch, hidden: Tensor) -> Tensor:
        """Return the gradient of the loss at the output of the last block, (B, T, d), for its hidden states there."""
        flat, input_ids = hidden.flatten(0, 1), batch.source.input_ids.flatten()
        gradient = torch.empty_like(flat)
        step = min(max(LOGITS_AT_ONCE // self.vocabulary, FEWEST_TOKENS_AT_ONCE), hidden.shape[1])
        for start in range(0, len(flat), step):
            part = slice(start, start + step)
            states = flat[part].detach().clone().requires_grad_()
            with torch.enable_grad():
                logits = self.logits(input_ids[part], states)
            by_logits = logits_gradient(logits.detach(), batch, part)
            (gradient[part],) = torch.autograd.grad(logits, states, by_logits)
        return gradient.view_as(hidden)


def logits_gradient(logits: Tensor, batch: GradientBatch, part: slice) -> Tensor:
    """Return the gradient of the cross-entropy by the logits (t, V) of a part of the positions of a batch."""
    gradient = logits.float().softmax(dim=1)
    if batch.targets is None:
        assert batch.uniform is not None
        targets = _draw(gradient, batch.uniform[part])
    else:
        targets = batch.targets[part].to(logits.device)
    gradient[torch.arange(len(gradient), device=logits.device), targets] -= 1
    gradient *= batch.weights[part].to(logits.device)
    return gradient.to(logits.dtype)


def _draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Draw one token (t,) from each distribution (t, V), by inverse transform sampling of numbers (t, 1)."""
    cumulated = probabilities.cumsum(dim=1)
    tokens = torch.searchsorted(cumulated, uniform.to(cumulated.device) * cumulated[:, -1:], right=True).squeeze(1)
    # A product that rounds up to the last sum would give a token after the last one.
    return tokens.clamp(max=probabilities.shape[1] - 1)


@torch.no_grad()
def chain_head(model: PreTrainedModel, blocks: dict[str, nn.Module], batches: Sequence[BlockBatch]) -> Head | None:
    """Return the head of a model that is a chain of its blocks, or None for any other model.

    In a chain each block reads the hidden states that the block before it gives, and nothing else that depends on the
    tokens before. The head reads what the last block gives, token by token. A few tokens show whether it does.
    """
    first = batches[0]
    called = [name for name, call in zip(blocks, first.calls, strict=True) if call is not None]
    for batch in batches:
        calls: list[BlockCall] = []
        for call in batch.calls:
            if call is not None:
                calls += [call, *call.repeats]
        if batch.extra_outputs is None or sum(call.start is not None for call in calls) != 1:
            return None
    assert first.extra_outputs is not None and first.source is not None
    probe, last, run = TokenBatch(probe_batch(first.source).input_ids), called[-1], cast(Any, model)
    outputs: list[Tensor] = []

    def keep_output(block: nn.Module, inputs: Any, output: Any) -> None:
        states = hidden_states(output)
        assert states is not None, "checked when the block was captured"
        outputs.append(states)

    with temporary_hooks([blocks[last].register_forward_hook(keep_output)]):
        expected = run(**probe.arguments(model)).logits
    head = Head(model, blocks, last, first.extra_outputs, expected.shape[-1])
    if outputs[-1].shape[:2] != probe.input_ids.shape:
        return None
    # A part in the middle also shows that the head does not depend on the position of a token.
    part = slice(probe.input_ids.shape[1] // 2, None)
    found = head.logits(probe.input_ids[0, part].to(model.device), outputs[-1][0, part])
    error = (found.float() - expected[0, part].float()).norm() / expected[0, part].float().norm()
    return head if float(error) < torch.finfo(model.dtype).eps ** 0.5 else None


def backward_through_block(
    block: nn.Module,
    index: int,
    batches: Sequence[GradientBatch],
    numbers: int,
    sums: GradientSums,
    group: ProcessGroup = SINGLE_PROCESS,
) -> None:
    """Take the gradients of all batches through a block, from its outputs to its inputs.

    Args:
        block: the block.
        index: index of the block in the model.
        batches: this process's batches, in order, with the inputs of the block.
        numbers: the number of calibration batches that the batches of all processes are parts of.
        sums: get the gradients at the layers of the block.
        group: the processes that share the batches.
    """
    with sums.collecting(), frozen_parameters(block):
        for own in _by_number(batches, numbers):
            for batch in own:
                _backward(block, index, batch, sums)
            sums.end_batch(group)


def _by_number(batches: Sequence[GradientBatch], numbers: int) -> Iterator[list[GradientBatch]]:
    """Yield this process's parts of each calibration batch in turn, none where others have all of them."""
    for number in range(numbers):
        yield [batch for batch in batches if batch.number == number]


def _backward(block: nn.Module, index: int, batch: GradientBatch, sums: GradientSums) -> None:
    call = batch.block_batch.calls[index]
    if call is None:
        return
    assert batch.gradient is not None
    sums.mask = None if call.mask is None else call.mask.bool()
    hidden = batch.inputs[index].tensor.detach().requires_grad_()
    with torch.enable_grad():
        # The block gets a copy, as it may change its input in place.
        output = run_block(block, index, batch.block_batch, hidden.clone())
    (gradient,) = torch.autograd.grad(output, hidden, batch.gradient.tensor)
    batch.gradient = batch.cache.put(gradient)


def backward_through_model(
    model: PreTrainedModel,
    batches: Sequence[GradientBatch],
    numbers: int,
    sums: GradientSums,
    group: ProcessGroup = SINGLE_PROCESS,
) -> None:
    """Take the gradients of all batches through the whole model at once.

    Args:
        model: the model.
        batches, numbers, sums, group: as for `backward_through_block`; `sums` has the layers of all blocks.
    """
    # No parameter requires a gradient: the embeddings' output does, so that gradients reach all layers.
    handle = model.get_input_embeddings().register_forward_hook(_require_gradient)
    run: Callable[..., Any] = model
    with sums.collecting(), frozen_parameters(model), temporary_hooks([handle]):
        for own in _by_number(batches, numbers):
            for batch in own:
                mask = batch.source.attention_mask
                sums.mask = None if mask is None else mask.to(model.device).bool()
                with torch.enable_grad():
                    logits = run(**batch.source.arguments(model)).logits
                by_logits = logits_gradient(logits.detach().flatten(0, 1), batch, slice(None))
                torch.autograd.backward(logits, by_logits.view_as(logits))
            sums.end_batch(group)


def _require_gradient(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.detach().requires_grad_()
