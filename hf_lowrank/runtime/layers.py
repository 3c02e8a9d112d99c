"""The compressed layers: CompressedLinear → SparseLowRankLinear → SparseLowRankBinaryLinear.

A layer is its storage and its forward. `weight` holds the packed values of the sparse part; its shape differs from the
dense one on purpose, so that a load without this plugin fails instead of filling the layer with noise.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .configuration import LayerSpec
from .errors import CompressionError
from .ops import binary_linear, bitmask_binary_linear, bitmask_linear, lowrank_linear
from .packing import pack_bits, pack_values, signs_to_values, unpack_bits, unpack_values


class CompressedLinear(nn.Linear):
    """Stands in for an `nn.Linear` of the same shape; what it stores is said by its `LayerSpec`.

    Only float tensors are parameters; masks and signs are buffers, so training cannot lose the sparsity.

    Args:
        in_features, out_features: n and m of the dense layer.
        spec: what the layer stores.
        device, dtype: as for `nn.Linear`.

    Raises:
        CheckpointError: if the spec does not fit the shape.
    """

    replaces_conv1d = False
    """Whether the dense layer is a transformers `Conv1D`, which `dequantize` then puts back."""

    def __init__(self, in_features: int, out_features: int, spec: LayerSpec, device: Any = None, dtype: torch.dtype | None = None) -> None:
        nn.Module.__init__(self)
        spec.validate(type(self).__name__, out_features, in_features)
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        stored = spec.tensors(out_features, in_features)
        for name in ("weight", "lowrank_a", "lowrank_b", "scale_in", "scale_out", "bias"):
            shape = stored[name][0] if name in stored else None
            self.register_parameter(name, None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        for name in ("weight_mask", "sign_bits"):
            shape = stored[name][0] if name in stored else None
            self.register_buffer(name, None if shape is None else torch.empty(shape, device=device, dtype=torch.uint8))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A valid, random layer: `nn.Linear`'s scale, the first k columns kept, all signs −1."""
        bound = 1 / math.sqrt(max(self.in_features, 1))
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)
        if self.weight_mask is not None and self.weight_mask.device.type != "meta":
            kept = torch.arange(self.in_features, device=self.weight_mask.device) < self.spec.kept
            self.weight_mask.copy_(pack_bits(kept.expand(self.out_features, -1)))
        if self.sign_bits is not None:
            self.sign_bits.zero_()

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The (m, n) matrix that the layer multiplies by, summed in float64 and rounded once to `dtype` (the layer's own)."""
        dense = self._sparse_lowrank_dense()
        if self.spec.binary_rank:
            signs = signs_to_values(self.sign_bits, self.in_features, torch.float64)
            dense = dense + signs * (self.scale_out.double() @ self.scale_in.double())
        return dense.to(dtype or self.weight.dtype)

    def _sparse_lowrank_dense(self) -> Tensor:
        m, n, spec = self.out_features, self.in_features, self.spec
        dense = torch.zeros(m, n, dtype=torch.float64, device=self.weight.device)
        weight = self.weight.detach().double()
        if spec.sparse == "bitmask":
            dense = unpack_values(weight, unpack_bits(self.weight_mask, n))
        elif spec.sparse == "rows":
            dense[: spec.kept] = weight
        elif spec.sparse == "columns":
            dense[:, : spec.kept] = weight
        if spec.rank:
            first_row = spec.kept if spec.sparse == "rows" else 0
            first_column = spec.kept if spec.sparse == "columns" else 0
            dense[first_row:, first_column:] += self.lowrank_b.detach().double() @ self.lowrank_a.detach().double()
        return dense

    def stored_bits(self, accounting: str = "bits") -> int:
        """Bits that the layer takes in a checkpoint of its dtype."""
        return self.spec.stored_bits(self.out_features, self.in_features, self.weight.dtype.itemsize * 8, accounting)

    def extra_repr(self) -> str:
        spec = self.spec
        parts = [f"in_features={self.in_features}", f"out_features={self.out_features}"]
        if spec.sparse != "none":
            of = {"rows": f"{self.out_features} rows", "columns": f"{self.in_features} columns", "bitmask": f"{self.in_features} per row"}
            parts.append(f"sparse={spec.sparse}({spec.kept} of {of[spec.sparse]})")
        parts += [f"{name}={getattr(spec, name)}" for name in ("rank", "binary_rank") if getattr(spec, name)]
        bits = self.stored_bits() / max(self.in_features * self.out_features, 1)
        return ", ".join([*parts, f"bias={spec.bias}", f"bits_per_weight={bits:.2f}"])


class SparseLowRankLinear(CompressedLinear):
    """y = S x + B (A x) + bias, the sparse part S stored as rows, columns or a bitmask with its kept values.

    With `rows` (`columns`) the low-rank part covers only the other rows (columns).
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
    ) -> None:
        spec = LayerSpec(kind="sparse_lowrank", sparse=sparse, kept=kept, rank=rank, bias=bias)
        super().__init__(in_features, out_features, spec, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x (..., n); the result is (..., m)."""
        x = _autocast(x)
        y = self._sparse_lowrank(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _sparse_lowrank(self, x: Tensor) -> Tensor:
        spec = self.spec
        if spec.sparse == "rows":
            kept = nn.functional.linear(x, self.weight.to(x.dtype))
            return torch.cat([kept, self._lowrank(x, self.out_features - spec.kept)], dim=-1)
        if spec.sparse == "columns":
            kept = nn.functional.linear(x[..., : spec.kept], self.weight.to(x.dtype))
            return kept + self._lowrank(x[..., spec.kept :], self.out_features) if spec.rank else kept
        if spec.sparse == "bitmask":
            kept = bitmask_linear(x, self.weight, self.weight_mask)
            return kept + self._lowrank(x, self.out_features) if spec.rank else kept
        return self._lowrank(x, self.out_features)

    def _lowrank(self, x: Tensor, out_features: int) -> Tensor:
        if self.lowrank_a is None:
            return x.new_zeros(*x.shape[:-1], out_features)
        return lowrank_linear(x, self.lowrank_a, self.lowrank_b)

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None) -> "SparseLowRankLinear":
        """The exact layer of an already sparse matrix (m, n): a bitmask with as many values per row as the fullest row has.

        Raises:
            CompressionError: if a row has no zero at all, so that a dense layer is the smaller one.
        """
        nonzero = weight != 0
        kept = int(nonzero.sum(dim=1).max())
        if kept >= weight.shape[1]:
            raise CompressionError(f"a row of the {tuple(weight.shape)} matrix has no zero entry; keep it as a dense nn.Linear")
        order = nonzero.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        mask = torch.zeros_like(nonzero).scatter_(1, order[:, :kept], True)
        return cls.from_parts(weight.shape[1], weight.shape[0], sparse="bitmask", weight=weight, mask=mask, bias=bias)

    @classmethod
    def from_parts(
        cls,
        in_features: int,
        out_features: int,
        sparse: str = "none",
        weight: Tensor | None = None,
        mask: Tensor | None = None,
        lowrank_a: Tensor | None = None,
        lowrank_b: Tensor | None = None,
        signs: Tensor | None = None,
        scale_in: Tensor | None = None,
        scale_out: Tensor | None = None,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> "SparseLowRankLinear":
        """Make a layer from its parts, rounding them once to `dtype` (that of the parts).

        Args:
            sparse: layout. `weight` is (p, n) for rows, (m, p) for columns, and for a bitmask the dense (m, n) matrix
                from which `mask` (m, n, boolean, equally many per row) picks the kept values.
            lowrank_a, lowrank_b: A (r, n') and B (m', r).
            signs: (m, n) boolean, True = +1; with `scale_in` (b, n) and `scale_out` (m, b) they make a binary part.
            bias: (m,).
        """
        parts = {"lowrank_a": lowrank_a, "lowrank_b": lowrank_b, "scale_in": scale_in, "scale_out": scale_out, "bias": bias}
        values = weight
        if sparse == "bitmask":
            assert weight is not None and mask is not None, "a bitmask needs `weight` and `mask`"
            values = pack_values(weight, mask)
        kept = 0 if values is None else values.shape[0 if sparse == "rows" else 1]
        rank = 0 if lowrank_a is None else lowrank_a.shape[0]
        reference = next(part for part in (values, *parts.values()) if part is not None)
        factory: dict[str, Any] = {"device": reference.device, "dtype": dtype or reference.dtype}
        layer: SparseLowRankLinear
        if scale_in is None:
            layer = SparseLowRankLinear(in_features, out_features, sparse, kept, rank, bias is not None, **factory)
        else:
            layer = SparseLowRankBinaryLinear(in_features, out_features, sparse, kept, rank, scale_in.shape[0], bias is not None, **factory)
        with torch.no_grad():
            for name, part in {"weight": values, **parts}.items():
                if part is not None:
                    getattr(layer, name).copy_(part)
            if mask is not None and sparse == "bitmask":
                layer.weight_mask.copy_(pack_bits(mask))
            if signs is not None:
                layer.sign_bits.copy_(pack_bits(signs))
        return layer


class SparseLowRankBinaryLinear(SparseLowRankLinear):
    """y = S x + B (A x) + Σ_b scale_out_b ⊙ (±1 · (scale_in_b ⊙ x)) + bias: SLaB's layer (papers: SLaB §3.1)."""

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
    ) -> None:
        spec = LayerSpec(kind="sparse_lowrank_binary", sparse=sparse, kept=kept, rank=rank, binary_rank=binary_rank, bias=bias)
        CompressedLinear.__init__(self, in_features, out_features, spec, device, dtype)

    def _sparse_lowrank(self, x: Tensor) -> Tensor:
        binary = (self.sign_bits, self.scale_in, self.scale_out)
        if self.spec.sparse == "bitmask":
            y = bitmask_binary_linear(x, self.weight, self.weight_mask, *binary)
            return y + self._lowrank(x, self.out_features) if self.spec.rank else y
        y = binary_linear(x, *binary)
        return y if self.spec.sparse == "none" and not self.spec.rank else y + super()._sparse_lowrank(x)


def build_layer(
    spec: LayerSpec, in_features: int, out_features: int, device: Any = None, dtype: torch.dtype | None = None
) -> CompressedLinear:
    """The empty layer that a spec describes."""
    arguments = {name: getattr(spec, name) for name in ("sparse", "kept", "rank", "bias")}
    if spec.kind == "sparse_lowrank_binary":
        return SparseLowRankBinaryLinear(in_features, out_features, binary_rank=spec.binary_rank, device=device, dtype=dtype, **arguments)
    return SparseLowRankLinear(in_features, out_features, device=device, dtype=dtype, **arguments)


def _autocast(x: Tensor) -> Tensor:
    """What autocast does to the input of `nn.Linear` (float64 excepted), which it cannot do for operations it does not know."""
    if torch.is_autocast_enabled(x.device.type) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x
