"""The training of one compressed block: some optimizer steps on its values towards the outputs of the dense block."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import ActivationCache, BlockBatch, BlockCall, run_block
from ..calibration.statistics import select_counted
from ..execution.process_group import SINGLE_PROCESS, ProcessGroup
from ..runtime.compressed_linear import has_compressed_layers
from ..runtime.errors import NumericalError
from ..runtime.layers import CompressedLinear

LEARNING_RATE = 0.05
"""Adam's learning rate, in units of the root of the block's error times the root mean square of the tensor.

It falls linearly to zero.
"""
BETAS = (0.9, 0.95)
"""Adam's decay rates. The second moment forgets quickly, as there are few steps."""


def reason_not_to_train(
    block: nn.Module,
    index: int,
    batches: list[BlockBatch],
    targets: list[Tensor],
    group: ProcessGroup = SINGLE_PROCESS,
) -> str | None:
    """Return why a block cannot be trained towards these outputs, or None if it can.

    Args:
        block, index, batches, targets, group: as for `train_block`.
    """
    if not has_compressed_layers(block):
        return "none of its layers is compressed"
    if not _trained_parameters(block):
        return "its compressed layers store no values"
    if not _batch_schedule(index, batches, group):
        return "no calibration batch comes through it"
    own_sizes = []
    for batch, target in zip(batches, targets, strict=True):
        if batch.calls[index] is not None:
            own_sizes.append(float(_counted_outputs(target, batch, index).square().sum()))
    if not sum(group.gather(sum(own_sizes))):
        return "the outputs of the dense block are zeros"
    return None


def train_block(
    block: nn.Module,
    index: int,
    batches: list[BlockBatch],
    targets: list[Tensor],
    steps: int,
    group: ProcessGroup = SINGLE_PROCESS,
) -> tuple[float, float]:
    """Train the float tensors of a block's compressed layers, in place.

    The objective is min ‖f(ĥ) − f_dense(h)‖² over the calibration tokens.

    Training is in float32. The result is rounded once to the block's dtype. A block that does not come nearer stays as
    it was.

    Args:
        block: a block that can be trained, see `reason_not_to_train`.
        batches: this process's batches, with the inputs ĥ that the block sees in the compressed model.
        targets: the dense block's outputs f_dense(h), (B, T, d), one per batch.
        steps: number of steps. Each takes one batch of the group's, in turn, and all processes step by its gradients.

    Returns:
        The error relative to the targets' own size, before and after.

    Raises:
        NumericalError: if the error is not finite.
    """
    parameters = _trained_parameters(block)
    schedule = _batch_schedule(index, batches, group)
    dtypes = [parameter.dtype for parameter in parameters]
    with _in_float32(block, parameters), torch.enable_grad():
        objective = _Objective(block, index, batches, targets, schedule, group)
        before = objective.total()
        start = [parameter.detach().clone() for parameter in parameters]
        _descend(objective, parameters, steps, before)
        with torch.no_grad():
            for parameter, dtype in zip(parameters, dtypes, strict=True):
                parameter.copy_(parameter.to(dtype))
        after = objective.total()
        # Training did not help: the block was as near to the dense one as its rounding allows.
        if after >= before:
            for parameter, value in zip(parameters, start, strict=True):
                parameter.data = value
        return before, min(after, before)


class _Objective:
    """The error ‖f(ĥ) − f_dense(h)‖² / ‖f_dense(h)‖² of a block, over the calibration tokens of all processes.

    Attributes:
        schedule: the batches that come through the block, in turn: position at its process, and rank of the process.
    """

    def __init__(
        self,
        block: nn.Module,
        index: int,
        batches: list[BlockBatch],
        targets: list[Tensor],
        schedule: list[tuple[int, int]],
        group: ProcessGroup,
    ) -> None:
        self.block = block
        self.index = index
        self.batches = batches
        self.schedule = schedule
        self.group = group
        self._own = [position for position, rank in schedule if rank == group.rank]
        self._inputs = {position: _as_float32(batches[position], index) for position in self._own}
        self._targets = {}
        for position in self._own:
            self._targets[position] = _counted_outputs(targets[position], batches[position], index)
        own_size = sum(float(target.square().sum()) for target in self._targets.values())
        self._size = sum(group.gather(own_size))

    def error(self, position: int) -> Tensor:
        """Return the error on one batch of this process."""
        output = run_block(self.block, self.index, self._inputs[position])
        difference = _counted_outputs(output, self.batches[position], self.index) - self._targets[position]
        return difference.square().sum() / self._size

    def total(self) -> float:
        """Return the error on all batches of all processes."""
        with torch.no_grad():
            return sum(self.group.gather(sum(float(self.error(position)) for position in self._own)))


def _descend(objective: _Objective, parameters: list[nn.Parameter], steps: int, error: float) -> None:
    """Take the steps of Adam.

    Args:
        error: the relative error at the start, by whose root the learning rates are scaled: a near block takes small
            steps.
    """
    group = objective.group
    parameter_groups = []
    for parameter in parameters:
        root_mean_square = float(parameter.detach().square().mean().sqrt())
        parameter_groups.append({"params": [parameter], "lr": LEARNING_RATE * error**0.5 * root_mean_square})
    optimizer = torch.optim.Adam(parameter_groups, betas=BETAS)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for step in range(steps):
        optimizer.zero_grad()
        position, rank = objective.schedule[step % len(objective.schedule)]
        tensors = {}
        if rank == group.rank:
            loss = objective.error(position)
            loss.backward()
            tensors["loss"] = loss.detach()
            for number, parameter in enumerate(parameters):
                if parameter.grad is not None:
                    tensors[str(number)] = parameter.grad
        tensors = group.all_reduce(tensors)
        if not bool(tensors["loss"].isfinite()):
            raise NumericalError(
                f"block {objective.index}: the error of its refinement is {tensors['loss'].item()} at step {step}; "
                "use a wider dtype"
            )
        for number, parameter in enumerate(parameters):
            parameter.grad = tensors.get(str(number))
        optimizer.step()
        scheduler.step()
    optimizer.zero_grad()


def _trained_parameters(block: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the compressed layers of a block that hold any values."""
    parameters = []
    for layer in block.modules():
        if isinstance(layer, CompressedLinear):
            parameters += [parameter for parameter in layer.parameters() if parameter.numel()]
    return parameters


def _batch_schedule(index: int, batches: list[BlockBatch], group: ProcessGroup) -> list[tuple[int, int]]:
    """Return position and rank of all batches that come through the block: the first ones of all processes first."""
    reaches_block = group.gather([batch.calls[index] is not None for batch in batches])
    schedule = []
    for position in range(len(reaches_block[0])):
        for rank, reached in enumerate(reaches_block):
            if position < len(reached) and reached[position]:
                schedule.append((position, rank))
    return schedule


def _counted_outputs(output: Tensor, batch: BlockBatch, index: int) -> Tensor:
    """Return the outputs of tokens that are no padding, float32."""
    call = batch.calls[index]
    mask = call.mask if call is not None else None
    return select_counted(output.float(), mask)


@contextmanager
def _in_float32(block: nn.Module, trained: list[nn.Parameter]) -> Iterator[None]:
    """Let the block compute in float32.

    Afterwards the trained tensors are rounded to their dtype, and all others are as they were.
    """
    tensors = [tensor for tensor in (*block.parameters(), *block.buffers()) if tensor.is_floating_point()]
    original_data = [tensor.data for tensor in tensors]
    required_grad = [parameter.requires_grad for parameter in block.parameters()]
    trained_ids = {id(parameter) for parameter in trained}
    for tensor in tensors:
        tensor.data = tensor.data.float()
    for parameter in block.parameters():
        parameter.requires_grad_(id(parameter) in trained_ids)
    try:
        yield
    finally:
        for tensor, data in zip(tensors, original_data, strict=True):
            tensor.data = tensor.data.to(data.dtype) if id(tensor) in trained_ids else data
        for parameter, required in zip(block.parameters(), required_grad, strict=True):
            parameter.requires_grad_(required)


def _as_float32(batch: BlockBatch, index: int) -> BlockBatch:
    """Return the batch with the hidden states and the arguments of one block in float32."""
    call = batch.calls[index]
    calls = list(batch.calls)
    if call is not None:
        repeats = tuple(map(_repeat_as_float32, call.repeats))
        calls[index] = call._replace(args=_float32(call.args), kwargs=_float32(call.kwargs), repeats=repeats)
    return BlockBatch(batch.hidden.float(), calls)


def _repeat_as_float32(repeat: BlockCall) -> BlockCall:
    start = None if repeat.start is None else ActivationCache().put(repeat.start.tensor.float())
    return repeat._replace(args=_float32(repeat.args), kwargs=_float32(repeat.kwargs), start=start)


def _float32(value: Any) -> Any:
    """Return an argument with its float tensors in float32, however deep they lie in lists and dictionaries."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _float32(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_float32(entry) for entry in value)
    return value
