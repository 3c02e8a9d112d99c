"""A low-rank matrix added to a compressed layer without touching what the layer stores, and taken out again.

A product B A of rank q joins the layer's own factors, which then have rank r + q, where these are plain, cover the whole layer and have
room. Elsewhere (kept rows or columns, pivoted or quantised factors, full rank) it is stored beside them, as `adapter_a` and `adapter_b`.
Either way every stored value, mask and sign stays as it is, bit for bit, and the only rounding is that of A and B to the layer's dtype.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..runtime.errors import CompressionError, NumericalError
from ..runtime.layers import CompressedLinear


@dataclass(frozen=True)
class Addition:
    """What `add_lowrank` did to a layer.

    Attributes:
        names: of the two factors that grew; by `rank`.
        bias: the layer's bias before, where it had one and that changed; `own_bias`: whether it had none.
    """

    names: tuple[str, str]
    rank: int
    bias: Tensor | None
    own_bias: bool


def add_lowrank(
    layer: CompressedLinear, a: Tensor, b: Tensor, bias: Tensor | None = None, name: str = "layer"
) -> Addition:
    """Let the layer compute y + B (A x) + bias from now on; its rank grows by exactly q.

    Args:
        a, b: A (q, n) and B (m, q), of any floating point dtype; rounded once to the layer's.
        bias: (m,), added to the layer's bias or, where it has none, its bias from now on.
        name: of the layer, for errors.

    Raises:
        NumericalError: if a value is not finite in the layer's dtype; CompressionError: if the rank grows beyond what the format takes, or
            the layer or the adapter is offloaded. The layer is then as it was.
    """
    if any(tensor.is_meta for tensor in (a, b, *layer.parameters(recurse=False), *layer.buffers(recurse=False))):
        raise CompressionError(
            f"{name}: is offloaded; open model and adapter without offloading (device_map='cpu') to merge them"
        )
    rank, own_bias = a.shape[0], bias is not None and layer.bias is None
    joins = _has_room(layer, rank)
    spec = replace(layer.spec, rank=layer.spec.rank + rank, bias=layer.spec.bias or own_bias)
    if not joins:
        spec = replace(spec, adapter_rank=spec.adapter_rank + rank)
    if spec.adapter_rank > layer.in_features + layer.out_features:
        raise CompressionError(
            f"{name}: merged adapters of rank {spec.adapter_rank} in a {layer.out_features} × {layer.in_features} layer, expected at most "
            f"{layer.in_features + layer.out_features}; merge fewer adapters, or leave this one unmerged"
        )
    names = ("lowrank_a", "lowrank_b") if joins else ("adapter_a", "adapter_b")
    changed = dict(zip(names, balanced(a.detach().double(), b.detach().double()), strict=True))
    if bias is not None:
        changed["bias"] = (
            bias.detach().double() if layer.bias is None else layer.bias.detach().double() + bias.detach().double()
        )
    rounded = {key: value.to(layer.weight.device, layer.dtype) for key, value in changed.items()}
    for key, value in rounded.items():
        if not bool(value.isfinite().all()):
            raise NumericalError(
                f"{name}: the adapter's {key} is not finite in {layer.dtype}; train it with a lower learning rate"
            )
    addition = Addition(names, rank, None if own_bias or bias is None else layer.bias.detach(), own_bias)
    for key, dimension in zip(names, (0, 1), strict=True):
        before: Tensor | None = getattr(layer, key)
        store(
            layer, key, rounded[key] if before is None else torch.cat([before.detach(), rounded[key]], dim=dimension)
        )
    if bias is not None:
        store(layer, "bias", rounded["bias"])
    layer.spec = spec
    return addition


def remove_lowrank(layer: CompressedLinear, addition: Addition) -> None:
    """Take the last addition out again: what the layer stores is then what it stored before, bit for bit."""
    spec, rank = layer.spec, addition.rank
    a, b = (getattr(layer, key).detach() for key in addition.names)
    kept = a.shape[0] - rank
    store(layer, addition.names[0], a[:kept].clone() if kept else None)
    store(layer, addition.names[1], b[:, :kept].clone(memory_format=torch.contiguous_format) if kept else None)
    if addition.own_bias or addition.bias is not None:
        store(layer, "bias", addition.bias)
    beside = rank if addition.names[0] == "adapter_a" else 0
    layer.spec = replace(
        spec, rank=spec.rank - rank, adapter_rank=spec.adapter_rank - beside, bias=spec.bias and not addition.own_bias
    )


def balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same product of A (q, n) and B (m, q), each term's two vectors scaled to about the same size.

    By powers of two, which changes no digit; it keeps the small values of a young adapter out of float16's subnormal numbers.
    """
    sizes = a.abs().amax(dim=1), b.abs().amax(dim=0)
    exponent = torch.where((sizes[0] > 0) & (sizes[1] > 0), (sizes[1] / sizes[0]).log2() / 2, 0.0).round()
    return torch.ldexp(a, exponent[:, None]), torch.ldexp(b, -exponent)


def _has_room(layer: CompressedLinear, rank: int) -> bool:
    """Whether the layer's own factors can take a product of that rank over the whole layer."""
    spec, shape = layer.spec, (layer.out_features, layer.in_features)
    return (
        spec.lowrank_shape(*shape) == shape
        and not spec.pivoted
        and not spec.lowrank_bits
        and spec.factor_rank + rank <= min(shape)
    )


def store(layer: CompressedLinear, name: str, value: Tensor | None) -> None:
    """Put a value in the place of one of the layer's parameters; None takes it out. It trains if the layer does."""
    trains = any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
    setattr(layer, name, None if value is None else nn.Parameter(value, requires_grad=trains))
