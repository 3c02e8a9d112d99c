"""Linear layers whose singular spectrum is trained. They replace the dense ones while SoCo trains."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..methods.spectral import Measurement
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
    was_training = model.training
    dense = {name: model.get_submodule(name) for name in measurements}
    for parameter in trainable:
        parameter.requires_grad_(False)
    layers = {}
    for name, module in dense.items():
        layers[name] = SpectralLinear(module, measurements[name], deviation)
    for name, layer in layers.items():
        swap_module(model, name, layer)
    # On a GPU memory is short, and checkpointing gives the same values. It takes effect only in training mode.
    checkpointing = model.supports_gradient_checkpointing and model.device.type == "cuda"
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    try:
        with torch.enable_grad():
            yield layers
    finally:
        if checkpointing:
            model.gradient_checkpointing_disable()
        model.train(was_training)
        for name, module in dense.items():
            swap_module(model, name, module)
        for parameter in trainable:
            parameter.requires_grad_(True)


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
