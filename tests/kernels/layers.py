"""Random packed layers, and the dense float64 matrix that each of them stands for.

A form names what is multiplied. It is the name of an operation, and `quantized_linear` has two: without and with a
bitmap.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_lowrank.runtime import packing, pivoting
from hf_lowrank.runtime.quantization import Quantized, pack_codes

FORMS = (
    "bitmask_linear",
    "binary_linear",
    "bitmask_binary_linear",
    "lowrank_linear",
    "pivoted_linear",
    "quantized_linear",
    "quantized_linear, bitmask",
)
FACTORED = ("lowrank_linear", "pivoted_linear")
TRANSPOSED = {
    "bitmask_linear": "bitmask_input_grad",
    "binary_linear": "binary_input_grad",
    "bitmask_binary_linear": "bitmask_binary_input_grad",
    "quantized_linear": "quantized_input_grad",
    "quantized_linear, bitmask": "quantized_input_grad",
}
"""The operation that multiplies with the transposed matrix of a form."""


def operation_of(form: str) -> str:
    return form.partition(",")[0]


@dataclass
class PackedLayer:
    """The tensors of one layer: a bitmask with `kept` values per row, a binary part of rank b, factors of rank r."""

    weight: Tensor
    weight_mask: Tensor
    sign_bits: Tensor
    scale_in: Tensor
    scale_out: Tensor
    lowrank_a: Tensor
    lowrank_b: Tensor
    pivots: Tensor
    codes: Quantized
    kept_codes: Quantized

    @property
    def bitmask(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.weight_mask

    @property
    def binary(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.sign_bits, self.scale_in, self.scale_out

    @property
    def lowrank(self) -> tuple[Tensor, Tensor]:
        return self.lowrank_a, self.lowrank_b

    def arguments(self, form: str) -> tuple[Any, ...]:
        """Return the layer's tensors and numbers in the order in which an operation takes them."""
        codes, kept = self.codes, self.kept_codes
        form_of_kept = (kept.bits, kept.group, kept.shape[1])
        parts: dict[str, tuple[Any, ...]] = {
            "bitmask_linear": self.bitmask,
            "binary_linear": self.binary,
            "bitmask_binary_linear": (*self.bitmask, *self.binary),
            "lowrank_linear": self.lowrank,
            "pivoted_linear": (*self.lowrank, packing.pack_bits(self.pivots), len(self.pivots)),
            "quantized_linear": (
                pack_codes(codes.codes, codes.bits),
                codes.scale,
                None,
                codes.bits,
                codes.group,
                codes.shape[1],
            ),
            "quantized_linear, bitmask": (
                pack_codes(kept.codes, kept.bits),
                kept.scale,
                self.weight_mask,
                *form_of_kept,
            ),
        }
        return parts[form]

    def dense(self, form: str) -> tuple[Tensor, Tensor]:
        """Return the float64 matrix of a form, and the sums of the magnitudes that add up to its entries."""
        columns = self.scale_in.shape[1]
        sparse = packing.unpack_values(self.weight.double(), packing.unpack_bits(self.weight_mask, columns))
        magnitudes = self.scale_out.double() @ self.scale_in.double()
        binary = magnitudes * packing.signs_to_values(self.sign_bits, columns, torch.float64)
        a, b = self.lowrank_a.double(), self.lowrank_b.double()
        unpivoted = pivoting.unpivot(b, self.pivots)
        quantized, kept = (
            Quantized(q.codes, q.scale.double(), q.bits, q.group).dequantize() for q in (self.codes, self.kept_codes)
        )
        kept = packing.unpack_values(kept, packing.unpack_bits(self.weight_mask, columns))
        return {
            "bitmask_linear": (sparse, sparse.abs()),
            "binary_linear": (binary, binary.abs()),
            "bitmask_binary_linear": (sparse + binary, sparse.abs() + binary.abs()),
            "lowrank_linear": (b @ a, b.abs() @ a.abs()),
            "pivoted_linear": (unpivoted @ a, unpivoted.abs() @ a.abs()),
            "quantized_linear": (quantized, quantized.abs()),
            "quantized_linear, bitmask": (kept, kept.abs()),
        }[form]


def random_layer(
    rows: int,
    columns: int,
    kept: int,
    dtype: torch.dtype,
    binary_rank: int = 1,
    rank: int = 3,
    bits: int = 4,
    group: int = 16,
    seed: int = 0,
) -> PackedLayer:
    """Return a layer with normal values, uniform scales and a mask drawn row by row.

    The pivots are `rank` further rows, at random places among the others.
    """
    random = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, columns, generator=random)
    order = torch.rand(rows, columns, generator=random).argsort(dim=1)
    mask = torch.zeros(rows, columns, dtype=torch.bool).scatter_(1, order[:, :kept], True)
    signs = torch.rand(rows, columns, generator=random) > 0.5
    pivots = torch.zeros(rows + rank, dtype=torch.bool)
    pivots[torch.randperm(rows + rank, generator=random)[:rank]] = True

    def quantized(count: int) -> Quantized:
        codes = torch.randint(0, 2**bits, (rows, count), generator=random).to(torch.uint8)
        return Quantized(codes, torch.rand(rows, -(-count // group), generator=random).to(dtype), bits, group)

    return PackedLayer(
        packing.pack_values(dense, mask).to(dtype),
        packing.pack_bits(mask),
        packing.pack_bits(signs),
        torch.rand(binary_rank, columns, generator=random).to(dtype),
        torch.rand(rows, binary_rank, generator=random).to(dtype),
        torch.randn(rank, columns, generator=random).to(dtype),
        torch.randn(rows, rank, generator=random).to(dtype),
        pivots,
        quantized(columns),
        quantized(kept),
    )
