"""The inputs of a model's blocks: captured once, then carried from block to block by replaying each block's own arguments."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..methods.base import Statistics
from ..runtime.errors import CompressionError
from .batches import TokenBatch
from .statistics import ShiftedSums, StatisticsCollector


@dataclass
class BlockBatch:
    """A batch on its way through the blocks.

    Attributes:
        hidden: input of the next block, (B, T, d).
        calls: for each block, the other positional and keyword arguments with which the model called it.
        mask: (B, T) of the tokens that count; None for all.
        shifted: input of the next block in the compressed model, for methods that compare the two.
    """

    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    mask: Tensor | None
    shifted: Tensor | None = None


@torch.no_grad()
def capture(model: PreTrainedModel, blocks: dict[str, nn.Module], batches: list[TokenBatch]) -> list[BlockBatch]:
    """Run the dense model once per batch and keep the input of the first block and the arguments of every block.

    Raises:
        CompressionError: if a block was not called exactly once, or not with a tensor of hidden states first.
    """
    return [_capture_batch(model, blocks, batch) for batch in batches]


def _capture_batch(model: PreTrainedModel, blocks: dict[str, nn.Module], batch: TokenBatch) -> BlockBatch:
    called: list[str] = []
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    first_hidden: list[Tensor] = []

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, call = _split(name, args, kwargs)
            called.append(name)
            calls.append(call)
            if not first_hidden:
                first_hidden.append(hidden)

        return hook

    handles = [block.register_forward_pre_hook(remember(name), with_kwargs=True) for name, block in blocks.items()]
    try:
        arguments = {"input_ids": batch.input_ids.to(model.device)}
        if batch.attention_mask is not None:
            arguments["attention_mask"] = batch.attention_mask.to(model.device)
        model.base_model(**arguments, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if called != list(blocks):
        missing = sorted(set(blocks) - set(called)) or called
        raise CompressionError(
            f"{type(model).__name__}: its blocks were not called once each in order ({missing[:3]}); this architecture is not supported"
        )
    return BlockBatch(first_hidden[0], calls, batch.attention_mask)


@torch.no_grad()
def run_block(block: nn.Module, index: int, batch: BlockBatch, hidden: Tensor | None = None) -> Tensor:
    """The block's hidden states for a batch, or for other `hidden` states, called as the model called it."""
    args, kwargs = batch.calls[index]
    output = block(batch.hidden if hidden is None else hidden, *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def block_statistics(
    block: nn.Module, index: int, batches: list[BlockBatch], layers: dict[str, nn.Module], needs_gram: bool
) -> tuple[dict[str, Statistics | None], list[Tensor]]:
    """The statistics of a block's linear layers over all batches, and the block's outputs."""
    collector = StatisticsCollector(layers, needs_gram)
    outputs = []
    with collector.collecting():
        for batch in batches:
            collector.start_batch(batch.mask)
            outputs.append(run_block(block, index, batch))
    return collector.statistics(), outputs


@torch.no_grad()
def shifted_sums(block: nn.Module, index: int, batches: list[BlockBatch], layers: dict[str, nn.Module]) -> ShiftedSums:
    """Sums over the dense inputs and, token by token, those of the compressed model, both through the block as it is."""
    sums = ShiftedSums(layers)
    for batch in batches:
        with sums.inputs() as dense:
            run_block(block, index, batch)
        with sums.inputs() as shifted:
            run_block(block, index, batch, batch.shifted)
        sums.add(dense, shifted, batch.mask)
    return sums


def _split(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[tuple[Any, ...], dict[str, Any]]]:
    if args and isinstance(args[0], Tensor):
        return args[0], (args[1:], kwargs)
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return kwargs["hidden_states"], ((), {key: value for key, value in kwargs.items() if key != "hidden_states"})
    raise CompressionError(f"{name}: was not called with a tensor of hidden states; this architecture is not supported")
