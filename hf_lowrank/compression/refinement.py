"""Block refinement: a few optimiser steps on the stored values of a compressed block, so that it gives the dense block's outputs again."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import BlockBatch, run_block
from ..calibration.statistics import select_counted
from ..execution.process_group import SINGLE_PROCESS, ProcessGroup
from ..runtime.errors import NumericalError
from ..runtime.layers import CompressedLinear

LEARNING_RATE = 0.05
"""Of Adam, relative to the block's relative error and to the root mean square of each tensor; it falls linearly to zero."""
BETAS = (0.9, 0.95)


def refine_block(
    block: nn.Module,
    index: int,
    batches: list[BlockBatch],
    targets: list[Tensor],
    steps: int,
    group: ProcessGroup = SINGLE_PROCESS,
) -> tuple[float, float]:
    """Train the float tensors of a block's compressed layers, in place: min ‖f(ĥ) − f_dense(h)‖² over the calibration tokens.

    Training is in float32; the result is rounded once to the block's dtype. A block that does not come nearer stays as it was.

    Args:
        batches: this process's, with the inputs ĥ that the block sees in the compressed model.
        targets: the dense block's outputs f_dense(h), (B, T, d), one per batch.
        steps: how many; each takes one batch of the group's, in turn, and all processes step by its gradients.

    Returns:
        The error relative to the targets' own size, before and after.

    Raises:
        NumericalError: if the error is not finite.
    """
    parameters = [
        p for layer in block.modules() if isinstance(layer, CompressedLinear) for p in layer.parameters() if p.numel()
    ]
    shares = group.gather([batch.calls[index] is not None for batch in batches])
    called = [
        (at, rank)
        for at in range(len(shares[0]))
        for rank, share in enumerate(shares)
        if at < len(share) and share[at]
    ]
    own = [at for at, rank in called if rank == group.rank]
    if not parameters or not called or not steps:
        return 0.0, 0.0
    dtypes = [parameter.dtype for parameter in parameters]
    with _in_float32(block, parameters), torch.enable_grad():
        inputs = {at: _as_float32(batches[at], index) for at in own}
        wanted = {at: _counted_outputs(targets[at], batches[at], index) for at in own}
        size = sum(group.gather(sum(float(each.square().sum()) for each in wanted.values())))

        def error(at: int) -> Tensor:
            output = run_block(block, index, inputs[at])
            return (_counted_outputs(output, batches[at], index) - wanted[at]).square().sum() / size

        def total() -> float:
            with torch.no_grad():
                return sum(group.gather(sum(float(error(at)) for at in own)))

        before = total()
        start = [p.detach().clone() for p in parameters]
        groups = [
            {"params": [p], "lr": LEARNING_RATE * before**0.5 * float(p.detach().square().mean().sqrt())}
            for p in parameters
        ]
        optimizer = torch.optim.Adam(groups, betas=BETAS)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        for step in range(steps):
            optimizer.zero_grad()
            at, rank = called[step % len(called)]
            found = {}
            if rank == group.rank:
                loss = error(at)
                loss.backward()
                found = {"loss": loss.detach()} | {
                    str(each): p.grad for each, p in enumerate(parameters) if p.grad is not None
                }
            found = group.all_reduce(found)
            if not bool(found["loss"].isfinite()):
                raise NumericalError(
                    f"block {index}: the error of its refinement is {found['loss'].item()} at step {step}; use a wider dtype"
                )
            for each, parameter in enumerate(parameters):
                parameter.grad = found.get(str(each))
            optimizer.step()
            schedule.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for parameter, dtype in zip(parameters, dtypes, strict=True):
                parameter.copy_(parameter.to(dtype))
        after = total()
        if after >= before:  # so near to the dense block that rounding is what is left
            for parameter, value in zip(parameters, start, strict=True):
                parameter.data = value
        return before, min(after, before)


def _counted_outputs(output: Tensor, batch: BlockBatch, index: int) -> Tensor:
    call = batch.calls[index]
    return select_counted(output.float(), call.mask if call is not None else None)


@contextmanager
def _in_float32(block: nn.Module, trained: list[nn.Parameter]) -> Iterator[None]:
    """While active, the block computes in float32; after it, what was trained is rounded to its dtype and all else is as it was."""
    tensors = [each for each in (*block.parameters(), *block.buffers()) if each.is_floating_point()]
    before = [each.data for each in tensors]
    required = [each.requires_grad for each in block.parameters()]
    chosen = {id(each) for each in trained}
    for each in tensors:
        each.data = each.data.float()
    for parameter in block.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        yield
    finally:
        for each, data in zip(tensors, before, strict=True):
            each.data = each.data.to(data.dtype) if id(each) in chosen else data
        for parameter, was in zip(block.parameters(), required, strict=True):
            parameter.requires_grad_(was)


def _as_float32(batch: BlockBatch, index: int) -> BlockBatch:
    """A batch whose hidden states and arguments of one block are float32."""
    call = batch.calls[index]
    calls = list(batch.calls)
    calls[index] = None if call is None else call._replace(args=_float32(call.args), kwargs=_float32(call.kwargs))
    return BlockBatch(batch.hidden.float(), calls)


def _float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _float32(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_float32(each) for each in value)
    return value
