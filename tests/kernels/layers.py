"""Random packed layers, and the dense float64 matrix that each of them stands for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowrank.runtime import packing


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

    @property
    def bitmask(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.weight_mask

    @property
    def binary(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.sign_bits, self.scale_in, self.scale_out

    @property
    def lowrank(self) -> tuple[Tensor, Tensor]:
        return self.lowrank_a, self.lowrank_b

    def arguments(self, operation: str) -> tuple[Tensor, ...]:
        """The layer's tensors in the order that an operation takes them."""
        parts = {
            "bitmask_linear": self.bitmask,
            "binary_linear": self.binary,
            "bitmask_binary_linear": (*self.bitmask, *self.binary),
            "lowrank_linear": self.lowrank,
        }
        return parts[operation]

    def dense(self, operation: str) -> tuple[Tensor, Tensor]:
        """The float64 matrix of an operation, and the sum of the magnitudes that add up to its entries."""
        columns = self.scale_in.shape[1]
        sparse = packing.unpack_values(self.weight.double(), packing.unpack_bits(self.weight_mask, columns))
        magnitudes = self.scale_out.double() @ self.scale_in.double()
        binary = magnitudes * packing.signs_to_values(self.sign_bits, columns, torch.float64)
        a, b = self.lowrank_a.double(), self.lowrank_b.double()
        return {
            "bitmask_linear": (sparse, sparse.abs()),
            "binary_linear": (binary, binary.abs()),
            "bitmask_binary_linear": (sparse + binary, sparse.abs() + binary.abs()),
            "lowrank_linear": (b @ a, b.abs() @ a.abs()),
        }[operation]


def random_layer(rows: int, columns: int, kept: int, dtype: torch.dtype, binary_rank: int = 1, rank: int = 3, seed: int = 0) -> PackedLayer:
    """A layer with normal values, uniform scales and a mask drawn row by row."""
    random = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, columns, generator=random)
    order = torch.rand(rows, columns, generator=random).argsort(dim=1)
    mask = torch.zeros(rows, columns, dtype=torch.bool).scatter_(1, order[:, :kept], True)
    signs = torch.rand(rows, columns, generator=random) > 0.5
    return PackedLayer(
        packing.pack_values(dense, mask).to(dtype),
        packing.pack_bits(mask),
        packing.pack_bits(signs),
        torch.rand(binary_rank, columns, generator=random).to(dtype),
        torch.rand(rows, binary_rank, generator=random).to(dtype),
        torch.randn(rank, columns, generator=random).to(dtype),
        torch.randn(rows, rank, generator=random).to(dtype),
    )
