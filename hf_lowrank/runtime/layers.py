"""The compressed layers: CompressedLinear → SparseLowRankLinear → SparseLowRankBinaryLinear.

A layer is its storage (`compressed_linear`) and its forward pass, which this file holds.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .compressed_linear import CompressedLinear
from .errors import CompressionError
from .layer_spec import LayerSpec
from .ops import (
    autocast,
    binary_linear,
    bitmask_binary_linear,
    bitmask_linear,
    check_floating_point,
    lowrank_linear,
    pivoted_linear,
)
from .packing import pack_bits, pack_values
from .pivoting import row_sources
from .quantization import Quantized, pack_codes
from .quantized_ops import quantized_linear


class SparseLowRankLinear(CompressedLinear):
    """Computes y = S x + B (A x) + bias.

    The sparse part S is stored as rows, as columns, as a bitmask with its kept values, or (quantized) in full. With
    `rows` (`columns`) the low-rank part covers only the other rows (columns). The factors of merged adapters, a second
    product of rank `adapter_rank`, always cover the whole layer.

    Args:
        sparse, kept, rank, bias: fields of `LayerSpec`.
        other_fields: the other fields of `LayerSpec`: `pivoted`, `weight_bits`, `weight_group`, `lowrank_bits`,
            `lowrank_group`, `adapter_rank`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sparse: str = "none",
        kept: int = 0,
        rank: int = 0,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **other_fields: Any,
    ) -> None:
        spec = LayerSpec(kind="sparse_lowrank", sparse=sparse, kept=kept, rank=rank, bias=bias, **other_fields)
        super().__init__(in_features, out_features, spec, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x (..., n). The result is (..., m).

        Raises:
            CompressionError: if x has another number of columns, or is no floating-point tensor.
        """
        spec = self.spec
        if x.shape[-1:] != (self.in_features,):
            self._refuse_columns(x)
        # A quantized matrix and nothing else is one operation. The way to it is kept short, as that of SLaB's layer.
        if spec.sparse == "full" and not (spec.rank or spec.binary_rank or spec.bias):
            return self._quantized("weight", x)
        y = self._sparse_lowrank(x)
        if spec.adapter_rank:
            y = y + lowrank_linear(x, *self._stored("adapter_a", "adapter_b"))
        return y + self.bias.to(y.dtype) if spec.bias else y

    def _refuse_columns(self, x: Tensor) -> None:
        """Raise an error about an input of another number of columns.

        The operations would not notice it: a bitmap row ends in padding, so that a few columns more fit it, too.
        """
        raise CompressionError(
            f"the input of a compressed layer has the shape {tuple(x.shape)}, expected (..., {self.in_features})"
        )

    def _sparse_lowrank(self, x: Tensor) -> Tensor:
        """Return S x + B (A x), put together according to the layout."""
        spec = self.spec
        if spec.sparse == "none":
            return self._lowrank(x)
        if spec.sparse == "rows":
            # The kept rows are the first entries of the output; the low-rank part gives the others.
            return torch.cat([self._sparse(x), self._lowrank(x)], dim=-1)
        if spec.sparse == "columns":
            # The kept columns read the first entries of the input; the low-rank part reads the others.
            kept = self._sparse(x[..., : spec.kept])
            return kept + self._lowrank(x[..., spec.kept :]) if spec.factor_rank else kept
        kept = self._sparse(x)
        return kept + self._lowrank(x) if spec.factor_rank else kept

    def _sparse(self, x: Tensor) -> Tensor:
        """Return the product with the stored values of the sparse part. For `columns`, x has the kept ones only."""
        if self.spec.weight_bits:
            return self._quantized("weight", x, self.weight_mask)
        if self.spec.sparse == "bitmask":
            return bitmask_linear(x, *self._stored("weight", "weight_mask"))
        check_floating_point(x)
        return nn.functional.linear(x, self.weight.to(x.dtype))

    def _lowrank(self, x: Tensor) -> Tensor:
        """Return B (A x), (..., m'). It is zero if the rank is zero."""
        spec = self.spec
        # The usual case comes first and asks for no more than it needs.
        if spec.rank > spec.adapter_rank and not spec.lowrank_bits and not spec.pivoted:
            return lowrank_linear(x, *self._stored("lowrank_a", "lowrank_b"))
        rows, _ = spec.lowrank_shape(self.out_features, self.in_features)
        if not spec.factor_rank:
            return autocast(x).new_zeros(*x.shape[:-1], rows)
        if spec.lowrank_bits:
            # Pivoted: z has the pivot rows of the output, y the others. `row_sources` brings them into their order.
            z = self._quantized("lowrank_a", x)
            y = self._quantized("lowrank_b", z)
            if not spec.pivoted:
                return y
            return torch.cat([z, y], dim=-1).index_select(-1, row_sources(self.lowrank_pivots, rows, spec.factor_rank))
        return pivoted_linear(x, *self._stored("lowrank_a", "lowrank_b", "lowrank_pivots"), rows)

    def _quantized(self, name: str, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the product with a quantized matrix. A mask says where its values lie if it is sparse."""
        spec = self.spec
        kept = x.shape[-1] if mask is None else spec.kept
        codes, scale = self._stored(name, f"{name}_scale")
        if name == "weight":
            return quantized_linear(x, codes, scale, mask, spec.weight_bits, spec.weight_group, kept)
        return quantized_linear(x, codes, scale, mask, spec.lowrank_bits, spec.lowrank_group, kept)

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None) -> "SparseLowRankLinear":
        """Return a layer that stores an already sparse matrix (m, n) exactly.

        It is a bitmask with as many values per row as the fullest row has.

        Raises:
            CompressionError: if a row has no zero at all, so that a dense layer is the smaller one.
        """
        nonzero = weight != 0
        kept = int(nonzero.sum(dim=1).max())
        if kept >= weight.shape[1]:
            raise CompressionError(
                f"a row of the {tuple(weight.shape)} matrix has no zero entry; keep it as a dense nn.Linear"
            )
        # Rows with fewer values keep some of their first zeros, too, so that all rows keep equally many.
        order = nonzero.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        mask = torch.zeros_like(nonzero).scatter_(1, order[:, :kept], True)
        return cls.from_parts(weight.shape[1], weight.shape[0], sparse="bitmask", weight=weight, mask=mask, bias=bias)

    @classmethod
    def from_parts(
        cls,
        in_features: int,
        out_features: int,
        sparse: str = "none",
        weight: Tensor | Quantized | None = None,
        mask: Tensor | None = None,
        lowrank_a: Tensor | Quantized | None = None,
        lowrank_b: Tensor | Quantized | None = None,
        pivots: Tensor | None = None,
        signs: Tensor | None = None,
        scale_in: Tensor | None = None,
        scale_out: Tensor | None = None,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> "SparseLowRankLinear":
        """Return a layer made from its parts, which are rounded once to `dtype`.

        Args:
            sparse: layout of the sparse part, one of `SPARSE_LAYOUTS`.
            weight: the sparse part. It is (p, n) for rows, (m, p) for columns and (m, n) for full. For a bitmask it is
                the dense matrix (m, n) from which `mask` picks the kept values, or if quantized these values, (m, k).
                Without a sparse part it is None, or (0,) for a layer of zeros, which has no other part.
            mask: the kept values of a bitmask, (m, n) boolean, equally many in every row.
            lowrank_a, lowrank_b: A (r, n') and B (m', r). Both are quantized alike, or neither is.
            pivots: (m',) boolean, r of them True, for a B (m' − r, r) without its identity block, see `pivot`.
            signs: (m, n) boolean, True for +1. With the scales it makes a binary part.
            scale_in, scale_out: (b, n) and (m, b).
            bias: (m,).
            dtype: data type of the float tensors, by default that of the parts.

        Raises:
            CompressionError: if the parts do not fit each other.
        """
        stored_weight = weight
        if sparse == "bitmask":
            assert weight is not None and mask is not None, "a bitmask needs `weight` and `mask`"
            stored_weight = _kept_values(weight, mask)
        if _quantization_of(lowrank_b) != _quantization_of(lowrank_a):
            raise CompressionError(
                "both factors of a low-rank part must be quantized alike, with the same bits and the same group"
            )
        parts = {
            "weight": stored_weight,
            "lowrank_a": lowrank_a,
            "lowrank_b": lowrank_b,
            "scale_in": scale_in,
            "scale_out": scale_out,
            "bias": bias,
        }
        kept = 0
        if stored_weight is not None and sparse in ("rows", "columns", "bitmask"):
            kept = stored_weight.shape[0 if sparse == "rows" else 1]
        weight_bits, weight_group = _quantization_of(stored_weight)
        lowrank_bits, lowrank_group = _quantization_of(lowrank_a)
        spec = LayerSpec(
            kind="sparse_lowrank" if scale_in is None else "sparse_lowrank_binary",
            sparse=sparse,
            kept=kept,
            rank=0 if lowrank_a is None else lowrank_a.shape[0],
            binary_rank=0 if scale_in is None else scale_in.shape[0],
            bias=bias is not None,
            pivoted=pivots is not None,
            weight_bits=weight_bits,
            weight_group=weight_group,
            lowrank_bits=lowrank_bits,
            lowrank_group=lowrank_group,
        )
        # Only the float tensors count here; bitmaps have a dtype of their own.
        first_part = next((part for part in parts.values() if part is not None), None)
        if first_part is None:
            raise CompressionError("a layer has to have a part; a layer of zeros has an empty `weight`")
        layer = build_layer(spec, in_features, out_features, first_part.device, dtype or first_part.dtype)
        layer._store(parts)
        layer._store_bits("weight_mask", mask if sparse == "bitmask" else None)
        layer._store_bits("lowrank_pivots", pivots)
        layer._store_bits("sign_bits", signs)
        return layer

    @torch.no_grad()
    def _store(self, parts: Mapping[str, Tensor | Quantized | None]) -> None:
        """Copy values into the tensors of these names, rounding them to the layer's dtype."""
        for name, part in parts.items():
            if isinstance(part, Quantized):
                getattr(self, name).copy_(pack_codes(part.codes, part.bits))
                getattr(self, f"{name}_scale").copy_(part.scale)
            elif part is not None:
                getattr(self, name).copy_(part)

    def _store_bits(self, name: str, bits: Tensor | None) -> None:
        """Copy booleans into the bitmap of this name, unless they are None."""
        if bits is not None:
            getattr(self, name).copy_(pack_bits(bits))


class SparseLowRankBinaryLinear(SparseLowRankLinear):
    """Computes y = S x + B (A x) + Σ_b scale_out_b ⊙ (±1 · (scale_in_b ⊙ x)) + bias.

    SLaB (arXiv 2604.04493) has such layers, with a bitmask, b = 1 and no low-rank part.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sparse: str = "none",
        kept: int = 0,
        rank: int = 0,
        binary_rank: int = 1,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **other_fields: Any,
    ) -> None:
        spec = LayerSpec(
            kind="sparse_lowrank_binary",
            sparse=sparse,
            kept=kept,
            rank=rank,
            binary_rank=binary_rank,
            bias=bias,
            **other_fields,
        )
        # Not `super().__init__`, which would make a spec without a binary part.
        CompressedLinear.__init__(self, in_features, out_features, spec, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x (..., n). The result is (..., m)."""
        # SLaB's own layer is one operation. The way to it is kept as short as it can be, by measurement: it reads
        # dictionaries instead of attributes and calls no other method (see `ops.operation`).
        attributes = self.__dict__
        spec = attributes["spec"]
        if spec.sparse != "bitmask" or spec.rank or spec.bias or spec.weight_bits:
            return super().forward(x)
        if x.shape[-1:] != (attributes["in_features"],):
            self._refuse_columns(x)
        floats, bitmaps = attributes["_parameters"], attributes["_buffers"]
        try:
            parts = (
                floats["weight"],
                bitmaps["weight_mask"],
                bitmaps["sign_bits"],
                floats["scale_in"],
                floats["scale_out"],
            )
        except KeyError:  # a parametrization or FSDP holds them elsewhere
            return super().forward(x)
        return bitmask_binary_linear(x, *parts)

    def _sparse_lowrank(self, x: Tensor) -> Tensor:
        """Return the sum of the sparse, the low-rank and the binary part."""
        spec = self.spec
        if spec.sparse == "bitmask" and not spec.weight_bits:
            y = bitmask_binary_linear(x, *self._stored("weight", "weight_mask", "sign_bits", "scale_in", "scale_out"))
            return y + self._lowrank(x) if spec.factor_rank else y
        y = binary_linear(x, *self._stored("sign_bits", "scale_in", "scale_out"))
        return y if spec.sparse == "none" and not spec.factor_rank else y + super()._sparse_lowrank(x)


def build_layer(
    spec: LayerSpec, in_features: int, out_features: int, device: Any = None, dtype: torch.dtype | None = None
) -> SparseLowRankLinear:
    """Return the layer that a spec describes, with random contents."""
    arguments = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    is_binary = arguments.pop("kind") == "sparse_lowrank_binary"
    if is_binary:
        return SparseLowRankBinaryLinear(in_features, out_features, device=device, dtype=dtype, **arguments)
    del arguments["binary_rank"]
    return SparseLowRankLinear(in_features, out_features, device=device, dtype=dtype, **arguments)


def _kept_values(weight: Tensor | Quantized, mask: Tensor) -> Tensor | Quantized:
    """Return the values (m, k) that a mask (m, n) keeps of a dense matrix. Quantized values are the kept ones already.

    Raises:
        CompressionError: if the mask does not keep equally many in every row, or not as many as there are.
    """
    if not isinstance(weight, Quantized):
        return pack_values(weight, mask)
    expected = pack_values(mask, mask).shape
    if weight.shape != expected:
        raise CompressionError(f"{tuple(weight.shape)} quantized values for a mask that keeps {tuple(expected)}")
    return weight


def _quantization_of(part: Tensor | Quantized | None) -> tuple[int, int]:
    """Return bits and group of a part, 0 and 0 if it is not quantized."""
    return (part.bits, part.group) if isinstance(part, Quantized) else (0, 0)
