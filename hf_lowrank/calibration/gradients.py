"""Sums over gradients of the loss at the layers of a model, collected by hooks during backward passes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..execution.process_group import SINGLE_PROCESS, ProcessGroup
from ..models.linears import dense_weight
from ..runtime.errors import NumericalError
from .hooks import temporary_hooks


class GradientSums(ABC):
    """Sums over the gradients of the loss by the outputs of linear layers.

    Args:
        layers: the linear layers by module name.

    Attributes:
        mask: (B, T) bool of the tokens of the current batch that count. None if all count.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = layers
        self.mask: Tensor | None = None

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Add the gradients of every backward pass while active."""
        handles = [layer.register_forward_hook(self._hook(name)) for name, layer in self.layers.items()]
        with temporary_hooks(handles):
            yield

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            # A layer that does not depend on the embeddings has no gradient.
            if output.requires_grad:
                x = inputs[0].detach()
                output.register_hook(lambda gradient: self._add(name, x, gradient))

        return hook

    @abstractmethod
    def _add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """Add the gradient (..., m) of a layer's output for its input x (..., n)."""

    @abstractmethod
    def end_batch(self, group: ProcessGroup = SINGLE_PROCESS) -> None:
        """Note that all parts of a calibration batch have been added, in every process of the group."""

    @abstractmethod
    def totals(self, group: ProcessGroup = SINGLE_PROCESS) -> dict[str, Tensor]:
        """Return the sums over all processes by layer. A layer that no gradient reached may be missing.

        Raises:
            NumericalError: if a gradient was not finite, naming the layer.
        """


class SquaredGradientSums(GradientSums):
    """Σ_i F_ij, (n,) float64, for each layer, with F the mean over the calibration batches of (∂L/∂W_ij)².

    Args:
        layers: the linear layers by module name.
        batches: the number of calibration batches.
    """

    def __init__(self, layers: Mapping[str, nn.Module], batches: int) -> None:
        super().__init__(layers)
        self.batches = batches
        self._gradients: dict[str, Tensor] = {}  # of the current batch by the weights, (m, n) float32
        self._sums: dict[str, Tensor] = {}

    def _add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        by_weight = (gradient.flatten(0, -2).T @ x.flatten(0, -2)).float()
        self._gradients[name] = self._gradients.get(name, 0) + by_weight

    def end_batch(self, group: ProcessGroup = SINGLE_PROCESS) -> None:
        # A gradient is complete before it is squared, so the processes add up their parts of the batch first.
        gradients, self._gradients = group.all_reduce(self._gradients), {}
        for name, gradient in gradients.items():
            per_input = gradient.double().square().sum(dim=0) / self.batches
            self._sums[name] = self._sums.get(name, 0) + per_input

    def totals(self, group: ProcessGroup = SINGLE_PROCESS) -> dict[str, Tensor]:
        totals = {}
        for name, layer in self.layers.items():
            if name in self._sums:
                totals[name] = self._sums[name]
            else:  # an expert that no token of any batch reaches
                totals[name] = dense_weight(layer).new_zeros(dense_weight(layer).shape[1], dtype=torch.float64)
        check_finite_gradients(totals)
        return totals


@contextmanager
def frozen_parameters(module: nn.Module) -> Iterator[None]:
    """Turn off the gradients of all parameters while active, and set `requires_grad` back afterwards."""
    required = {parameter: parameter.requires_grad for parameter in module.parameters()}
    try:
        for parameter in required:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, before in required.items():
            parameter.requires_grad_(before)


def check_finite_gradients(sums: Mapping[str, Tensor]) -> None:
    """Raise NumericalError, naming the layer, if a sum over gradients is not finite."""
    for name, total in sums.items():
        if not bool(total.isfinite().all()):
            raise NumericalError(
                f"{name}: the gradient of the loss is not finite; check the weights or use a wider dtype"
            )
