"""Adding a low-rank matrix to a compressed layer without changing what the layer stores, and taking it out again.

A product B A of rank q joins the layer's own factors where these are plain, cover the whole layer and have room. They
then have rank r + q. In all other layers (kept rows or columns, pivoted or quantized factors, full rank) the product
is stored beside the factors, as `adapter_a` and `adapter_b`. Either way every stored value, mask and sign stays as it
is, bit for bit, and the only rounding is that of A and B to the layer's dtype.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..runtime.configuration import LayerSpec
from ..runtime.errors import CompressionError, NumericalError
from ..runtime.layers import CompressedLinear


@dataclass(frozen=True)
class Addition:
    """A record of what `add_lowrank` did to a layer.

    Attributes:
        names: names of the two factors that grew.
        rank: how many rows and columns they grew by.
        bias: the layer's former bias, if it had one and that changed.
        own_bias: whether the layer had no bias before, and has one now.
    """

    names: tuple[str, str]
    rank: int
    bias: Tensor | None
    own_bias: bool


def add_lowrank(
    layer: CompressedLinear, a: Tensor, b: Tensor, bias: Tensor | None = None, name: str = "layer"
) -> Addition:
    """Make the layer compute y + B (A x) + bias from now on. Its rank grows by exactly q.

    Args:
        a, b: A (q, n) and B (m, q), of any floating point dtype. They are rounded once, to the layer's dtype.
        bias: (m,), added to the layer's bias. A layer that has none has this one from now on.
        name: name of the layer, for errors.

    Raises:
        NumericalError: if a value is not finite in the layer's dtype.
        CompressionError: if the rank grows beyond what the format takes, or the layer or the adapter is offloaded.
            After either error the layer is as it was.
    """
    _check_memory(layer, a, b, name)
    rank = a.shape[0]
    own_bias = bias is not None and layer.bias is None
    joins = _has_room(layer, rank)
    spec = _grown_spec(layer, rank, joins=joins, own_bias=own_bias, name=name)
    names = ("lowrank_a", "lowrank_b") if joins else ("adapter_a", "adapter_b")
    # Scaled in float64, so that the only rounding is the one to the layer's dtype.
    balanced_a, balanced_b = balanced(a.detach().double(), b.detach().double())
    added = {names[0]: balanced_a, names[1]: balanced_b}
    if bias is not None:
        added["bias"] = bias.detach().double()
        if layer.bias is not None:
            added["bias"] = layer.bias.detach().double() + added["bias"]
    rounded = _rounded(added, layer, name)
    # A subtraction would not undo the rounding of the sum: the former bias is kept for `remove_lowrank`.
    former_bias = None if own_bias or bias is None else layer.bias.detach()
    # Every check is passed: from here on the layer changes.
    _append(layer, names[0], rounded[names[0]], dimension=0)
    _append(layer, names[1], rounded[names[1]], dimension=1)
    if bias is not None:
        store(layer, "bias", rounded["bias"])
    layer.spec = spec
    return Addition(names, rank, former_bias, own_bias)


def _check_memory(layer: CompressedLinear, a: Tensor, b: Tensor, name: str) -> None:
    """Raise CompressionError if a tensor of the layer or of the adapter has no values in memory."""
    own_tensors = (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
    if any(tensor.is_meta for tensor in (a, b, *own_tensors)):
        raise CompressionError(
            f"{name}: is offloaded; open model and adapter without offloading (device_map='cpu') to merge them"
        )


def _grown_spec(layer: CompressedLinear, rank: int, *, joins: bool, own_bias: bool, name: str) -> LayerSpec:
    """Return the spec of the layer with a product of `rank` more.

    Raises:
        CompressionError: if merged adapters would have a higher rank than the format takes.
    """
    # `rank` counts all low-rank terms of a layer, `adapter_rank` those among them that are stored beside its factors.
    spec = replace(layer.spec, rank=layer.spec.rank + rank, bias=layer.spec.bias or own_bias)
    if not joins:
        spec = replace(spec, adapter_rank=spec.adapter_rank + rank)
    largest = layer.in_features + layer.out_features
    if spec.adapter_rank > largest:
        raise CompressionError(
            f"{name}: merged adapters of rank {spec.adapter_rank} in a "
            f"{layer.out_features} × {layer.in_features} layer, expected at most {largest}; "
            "merge fewer adapters, or leave this one unmerged"
        )
    return spec


def _rounded(added: dict[str, Tensor], layer: CompressedLinear, name: str) -> dict[str, Tensor]:
    """Return tensors in the layer's dtype and on its device, or raise NumericalError if one is not finite there."""
    rounded = {key: value.to(layer.weight.device, layer.dtype) for key, value in added.items()}
    for key, value in rounded.items():
        if not bool(value.isfinite().all()):
            raise NumericalError(
                f"{name}: the adapter's {key} is not finite in {layer.dtype}; train it with a lower learning rate"
            )
    return rounded


def _append(layer: CompressedLinear, name: str, addition: Tensor, dimension: int) -> None:
    """Store `addition` behind what a factor of the layer has, along `dimension`."""
    former: Tensor | None = getattr(layer, name)
    if former is not None:
        addition = torch.cat([former.detach(), addition], dim=dimension)
    store(layer, name, addition)


def remove_lowrank(layer: CompressedLinear, addition: Addition) -> None:
    """Take the last addition out again. The layer then stores what it stored before, bit for bit."""
    spec = layer.spec
    rank = addition.rank
    name_a, name_b = addition.names
    a = getattr(layer, name_a).detach()
    b = getattr(layer, name_b).detach()
    left = a.shape[0] - rank
    if left:
        # Copies, as views would keep the memory of the whole factors.
        store(layer, name_a, a[:left].clone())
        store(layer, name_b, b[:, :left].clone(memory_format=torch.contiguous_format))
    else:
        store(layer, name_a, None)
        store(layer, name_b, None)
    if addition.own_bias or addition.bias is not None:
        store(layer, "bias", addition.bias)
    adapter_rank = spec.adapter_rank
    if name_a == "adapter_a":
        adapter_rank -= rank
    bias = spec.bias and not addition.own_bias
    layer.spec = replace(spec, rank=spec.rank - rank, adapter_rank=adapter_rank, bias=bias)


def balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same product of A (q, n) and B (m, q), with both vectors of each term of about one size.

    They are scaled by powers of two, which changes no digit. This keeps the small values of a young adapter out of
    float16's subnormal numbers.
    """
    size_a = a.abs().amax(dim=1)
    size_b = b.abs().amax(dim=0)
    # A term of zeros has no size to balance, and stays as it is.
    exponent = torch.where((size_a > 0) & (size_b > 0), (size_b / size_a).log2() / 2, 0.0).round()
    return torch.ldexp(a, exponent[:, None]), torch.ldexp(b, -exponent)


def _has_room(layer: CompressedLinear, rank: int) -> bool:
    """Return whether the layer's own factors can take a product of that rank over the whole layer."""
    spec = layer.spec
    shape = (layer.out_features, layer.in_features)
    return (
        spec.lowrank_shape(*shape) == shape
        and not spec.pivoted
        and not spec.lowrank_bits
        and spec.factor_rank + rank <= min(shape)
    )


def store(layer: CompressedLinear, name: str, value: Tensor | None) -> None:
    """Put a value in the place of one of the layer's parameters, or take the parameter out if it is None.

    The new parameter is trainable if a parameter of the layer is.
    """
    if value is None:
        setattr(layer, name, None)
        return
    trains = any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
    setattr(layer, name, nn.Parameter(value, requires_grad=trains))
