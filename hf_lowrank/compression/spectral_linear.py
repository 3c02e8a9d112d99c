"""Linear layers whose singular spectrum is trained. They replace the dense ones while SoCo trains."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..calibration.hooks import replaced_forwards
from ..methods.spectral import Measurement
from ..models.architectures import find_blocks
from ..runtime.quantizer import swap_module


class SpectralLinear(nn.Module):
    """A linear layer as y = U ((σ ⊙ s̃) ⊙ (Vᵀ S⁻¹ x)) + d, or as the dense layer, whichever is asked for.

    Args:
        dense: the layer to learn, which is frozen.
        measurement: its factorization.
        deviation: whether to learn d.
    """

    def __init__(self, dense: nn.Module, measurement: Measurement, deviation: bool) -> None:
        super().__init__()
        self.dense = dense
        weight = dense.weight
        assert isinstance(weight, Tensor)
        factors = measurement.factorization
        compute_dtype = torch.promote_types(weight.dtype, torch.float32)
        # Contiguous, as they come from a record: a resumed run then rounds as one that was never killed.
        self.left = factors.left.to(compute_dtype).contiguous()
        self.right = factors.right.to(compute_dtype).contiguous()
        self.sigma = factors.sigma.to(compute_dtype)
        self.a = nn.Parameter(torch.zeros_like(self.sigma))
        self.d = nn.Parameter(self.left.new_zeros(self.left.shape[0])) if deviation else None
        self.effective: Tensor | None = None
        """s̃ of the current step. None asks for the dense layer."""

    def forward(self, x: Tensor) -> Tensor:
        if self.effective is None:
            return self.dense(x)
        components = F.linear(x.to(self.left.dtype), self.right)
        y = F.linear(components * (self.sigma * self.effective), self.left)
        if self.d is not None:
            y = y + self.d
        bias = self.dense.bias
        if isinstance(bias, Tensor):
            y = y + bias
        return y.to(x.dtype)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return a, and d if it is learned, by name."""
        return {"a": self.a} if self.d is None else {"a": self.a, "d": self.d}


@contextmanager
def spectral_layers(
    model: PreTrainedModel, measurements: dict[str, Measurement], deviation: bool
) -> Iterator[dict[str, SpectralLinear]]:
    """Replace the layers of a model for training, and freeze all else. At the end the model is as it was.

    Args:
        measurements: factorizations of the layers to replace, by module name.
        deviation: whether to learn d.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    dense = {name: model.get_submodule(name) for name in measurements}
    for parameter in trainable:
        parameter.requires_grad_(False)
    layers = {}
    for name, module in dense.items():
        layers[name] = SpectralLinear(module, measurements[name], deviation)
    for name, layer in layers.items():
        swap_module(model, name, layer)
    # On a GPU memory is short, and checkpointing gives the same values.
    checkpointing: AbstractContextManager[None] = nullcontext()
    if model.device.type == "cuda":
        checkpointing = checkpointed(find_blocks(model).values())
    try:
        with checkpointing, torch.enable_grad():
            yield layers
    finally:
        for name, module in dense.items():
            swap_module(model, name, module)
        for parameter in trainable:
            parameter.requires_grad_(True)


def checkpointed(blocks: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Let blocks be computed once more in the backward pass, in place of keeping their activations, while active.

    Transformers' own checkpointing takes effect only in training mode, with dropout, and is the caller's to set.
    """
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for block in blocks:
        recomputed = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        forwards[block] = wraps(block.forward)(recomputed)
    return replaced_forwards(forwards)


@contextmanager
def as_dense(layers: dict[str, SpectralLinear]) -> Iterator[None]:
    """Let the model be the dense one for a while."""
    effective = {name: layer.effective for name, layer in layers.items()}
    for layer in layers.values():
        layer.effective = None
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.effective = effective[name]
