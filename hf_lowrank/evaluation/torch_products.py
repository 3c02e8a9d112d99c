"""Torch's own products with packed int4 and int8 weights, which benchmarks show beside compressed layers.

These operations of `torch.ops.aten` are what torchao computes with on CPUs. They are not in every torch, and they take
shapes that are multiples of 32 only.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..runtime.quantization import spread_scale

GROUP = 32
"""Values per scale of int4, the group of the package's own default."""
MULTIPLE = 32
"""Rows and columns must be multiples of this number."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Int4Linear(nn.Module):
    """A layer of 4 bits per weight in groups of `GROUP`, without a bias.

    Args:
        weight: the dense matrix (m, n), which is rounded to the nearest of 16 levels per group.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rows, columns = weight.shape
        scale = weight.float().view(rows, columns // GROUP, GROUP).abs().amax(dim=2).clamp_(min=1e-8) / 8
        codes = (weight.float() / spread_scale(scale, GROUP, columns)).round_().clamp_(-8, 7).add_(8).to(torch.int32)
        # torch multiplies by (code − 8) · scale + zero, scales and zeros (n / group, m, 2).
        pairs = torch.stack([scale, torch.zeros_like(scale)], dim=2).transpose(0, 1).contiguous()
        self.register_buffer("codes", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        self.register_buffer("scales_and_zeros", pairs.to(weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.reshape(-1, x.shape[-1])
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(inputs, self.codes, GROUP, self.scales_and_zeros)
        return y.view(*x.shape[:-1], -1)


class Int8Linear(nn.Module):
    """A layer of 8 bits per weight with one scale per row, without a bias.

    Args:
        weight: the dense matrix (m, n), which is rounded.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        scale = weight.float().abs().amax(dim=1, keepdim=True).clamp_(min=1e-8) / 127
        self.register_buffer("codes", (weight.float() / scale).round_().to(torch.int8))
        self.register_buffer("scale", scale.flatten().to(weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.reshape(-1, x.shape[-1])
        y: Tensor = torch.ops.aten._weight_int8pack_mm(inputs, self.codes, self.scale)
        return y.view(*x.shape[:-1], -1)


Builder = Callable[[Tensor], nn.Module]
PRODUCTS: Mapping[str, tuple[Builder, tuple[str, ...]]] = {
    f"torch's int4 (groups of {GROUP})": (
        Int4Linear,
        ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu"),
    ),
    "torch's int8 (one scale per row)": (Int8Linear, ("_weight_int8pack_mm",)),
}
"""Layers by the names that tables show, with the operations that they need."""


def available(device: str, dtype: torch.dtype) -> dict[str, Builder]:
    """Return the layers that this torch can compute on a device, by name."""
    if torch.device(device).type != "cpu" or dtype not in DTYPES:
        return {}
    return {
        name: builder
        for name, (builder, operations) in PRODUCTS.items()
        if all(hasattr(torch.ops.aten, operation) for operation in operations)
    }


def fits(rows: int, columns: int) -> bool:
    """Return whether the products take a layer of this shape."""
    return rows % MULTIPLE == 0 and columns % MULTIPLE == 0


def why_missing(device: str, dtype: torch.dtype) -> str:
    """Return one line about the products that are not shown, or nothing if all are."""
    missing = [name for name in PRODUCTS if name not in available(device, dtype)]
    if not missing:
        return ""
    return f"{', '.join(missing)}: not in torch {torch.__version__} for {dtype} on {device}; these rows are left out"
