"""The compressed layers: CompressedLinear → SparseLowRankLinear → SparseLowRankBinaryLinear.

A layer is its storage and its forward. `weight` holds the packed values of the sparse part; its shape differs from the
dense one on purpose, so that a load without this plugin fails instead of filling the layer with noise.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from .configuration import LayerSpec
from .errors import CompressionError
from .ops import autocast, binary_linear, bitmask_binary_linear, bitmask_linear, lowrank_linear, pivoted_linear
from .packing import pack_bits, pack_values, signs_to_values, unpack_bits, unpack_values
from .pivoting import row_sources, unpivot
from .quantization import Quantized, pack_codes, unpack_codes
from .quantized_ops import quantized_linear

VALUES = ("weight", "lowrank_a", "lowrank_b")
"""What may be quantised: then a buffer of packed codes, beside the parameter `<name>_scale`."""
FLOATS = ("adapter_a", "adapter_b", "scale_in", "scale_out", "bias")
BITMAPS = ("weight_mask", "lowrank_pivots", "sign_bits")
EXTRA_FIELDS = (
    "rank",
    "pivoted",
    "binary_rank",
    "weight_bits",
    "weight_group",
    "lowrank_bits",
    "lowrank_group",
    "adapter_rank",
)


class CompressedLinear(nn.Linear):
    """Stands in for an `nn.Linear` of the same shape; what it stores is said by its `LayerSpec`.

    Only float tensors are parameters; masks, signs and quantised values are buffers, so training cannot lose the sparsity.

    Args:
        in_features, out_features: n and m of the dense layer.
        spec: what the layer stores.
        device, dtype: as for `nn.Linear`.

    Raises:
        CheckpointError: if the spec does not fit the shape.
    """

    replaces_conv1d = False
    """Whether the dense layer is a transformers `Conv1D`, which `dequantize` then puts back."""

    lowrank_a: Tensor
    lowrank_b: Tensor
    adapter_a: Tensor
    adapter_b: Tensor
    scale_in: Tensor
    scale_out: Tensor
    weight_mask: Tensor
    lowrank_pivots: Tensor
    sign_bits: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: LayerSpec,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        spec.validate(type(self).__name__, out_features, in_features)
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        stored = spec.tensors(out_features, in_features)
        for name in (*VALUES, *(f"{name}_scale" for name in VALUES), *FLOATS, *BITMAPS):
            shape, kind = stored.get(name, (None, "uint8" if name in BITMAPS else "float"))
            if kind == "float" and shape == (
                0,
            ):  # no sparse part: nothing to train, and a parameter without a gradient stops DDP
                self.register_buffer(name, torch.empty(shape, device=device, dtype=dtype))
            elif kind == "float":
                self.register_parameter(
                    name, None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                )
            else:
                self.register_buffer(
                    name, None if shape is None else torch.empty(shape, device=device, dtype=torch.uint8)
                )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A valid, random layer: `nn.Linear`'s scale, the first k columns kept, the first r rows pivots, all signs −1, all codes 0."""
        bound = 1 / math.sqrt(max(self.in_features, 1))
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)
        for name, bits in (
            ("weight", self.spec.weight_bits),
            ("lowrank_a", self.spec.lowrank_bits),
            ("lowrank_b", self.spec.lowrank_bits),
        ):
            if bits and getattr(self, name) is not None:
                getattr(self, name).zero_()
                getattr(self, f"{name}_scale").data /= 2 ** (bits - 1)
        rows, _ = self.spec.lowrank_shape(self.out_features, self.in_features)
        pivots = (self.lowrank_pivots, self.spec.factor_rank, rows)
        for bitmap, count, length in ((self.weight_mask, self.spec.kept, self.in_features), pivots):
            if bitmap is not None and bitmap.device.type != "meta":
                bitmap.copy_(pack_bits(torch.arange(length, device=bitmap.device) < count))
        if self.sign_bits is not None:
            self.sign_bits.zero_()

    @property
    def dtype(self) -> torch.dtype:
        """That of the float tensors; `weight` itself may hold packed codes."""
        return next(self.parameters(recurse=False), self.weight).dtype

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The (m, n) matrix that the layer multiplies by, summed in float64 and rounded once to `dtype` (the layer's own)."""
        dense = self._sparse_lowrank_dense()
        if self.spec.adapter_rank:
            dense = dense + self.adapter_b.detach().double() @ self.adapter_a.detach().double()
        if self.spec.binary_rank:
            signs = signs_to_values(self.sign_bits, self.in_features, torch.float64)
            dense += signs.mul_(self.scale_out.detach().double() @ self.scale_in.detach().double())
        return dense.to(dtype or self.dtype)

    def _sparse_lowrank_dense(self) -> Tensor:
        m, n, spec = self.out_features, self.in_features, self.spec
        dense = torch.zeros(m, n, dtype=torch.float64, device=self.weight.device)
        if spec.sparse == "bitmask":
            dense = unpack_values(self._values("weight", spec.kept), unpack_bits(self.weight_mask, n))
        elif spec.sparse == "full":
            dense = self._values("weight", n)
        elif spec.sparse == "rows":
            dense[: spec.kept] = self._values("weight", n)
        elif spec.sparse == "columns":
            dense[:, : spec.kept] = self._values("weight", spec.kept)
        if spec.factor_rank:
            rows, columns = spec.lowrank_shape(m, n)
            a, b = self._values("lowrank_a", columns), self._values("lowrank_b", spec.factor_rank)
            if spec.pivoted:
                b = unpivot(b, unpack_bits(self.lowrank_pivots, rows))
            dense[m - rows :, n - columns :].addmm_(b, a)
        return dense

    def _values(self, name: str, columns: int) -> Tensor:
        """A matrix of values, dequantised if it is quantised, in float64."""
        values: Tensor = getattr(self, name)
        bits, group = self._form(name)
        if not bits:
            return values.detach().double()
        scale = getattr(self, f"{name}_scale").detach().double()
        return Quantized(unpack_codes(values, bits, columns), scale, bits, group).dequantize()

    def _form(self, name: str) -> tuple[int, int]:
        """Bits and group of a matrix of values."""
        spec = self.spec
        return (spec.weight_bits, spec.weight_group) if name == "weight" else (spec.lowrank_bits, spec.lowrank_group)

    def _stored(self, *names: str) -> list[Tensor]:
        """The tensors of these names without the search of `nn.Module`, which takes 4 µs a name where the caches have forgotten it."""
        parameters: dict[str, Any] = self._parameters
        buffers: dict[str, Any] = self._buffers
        return [
            parameters[name] if name in parameters else buffers[name] if name in buffers else getattr(self, name)
            for name in names
        ]

    def stored_bits(self, accounting: str = "bits") -> int:
        """Bits that the layer takes in a checkpoint of its dtype."""
        return self.spec.stored_bits(self.out_features, self.in_features, self.dtype.itemsize * 8, accounting)

    def extra_repr(self) -> str:
        spec = self.spec
        parts = [f"in_features={self.in_features}", f"out_features={self.out_features}"]
        if spec.sparse == "full":
            parts.append("sparse=full")
        elif spec.sparse != "none":
            of = {
                "rows": f"{self.out_features} rows",
                "columns": f"{self.in_features} columns",
                "bitmask": f"{self.in_features} per row",
            }
            parts.append(f"sparse={spec.sparse}({spec.kept} of {of[spec.sparse]})")
        parts += [f"{name}={getattr(spec, name)}" for name in EXTRA_FIELDS if getattr(spec, name)]
        bits = self.stored_bits() / max(self.in_features * self.out_features, 1)
        return ", ".join([*parts, f"bias={spec.bias}", f"bits_per_weight={bits:.2f}"])


class SparseLowRankLinear(CompressedLinear):
    """y = S x + B (A x) + bias, the sparse part S stored as rows, columns, a bitmask with its kept values, or (quantised) in full.

    With `rows` (`columns`) the low-rank part covers only the other rows (columns); the factors of merged adapters, a second product of
    `adapter_rank`, always cover all. `form` takes the other fields of `LayerSpec`:
    `pivoted`, `weight_bits`, `weight_group`, `lowrank_bits`, `lowrank_group`, `adapter_rank`.
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
        **form: Any,
    ) -> None:
        spec = LayerSpec(kind="sparse_lowrank", sparse=sparse, kept=kept, rank=rank, bias=bias, **form)
        super().__init__(in_features, out_features, spec, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x (..., n); the result is (..., m)."""
        spec = self.spec
        y = self._sparse_lowrank(x)
        if spec.adapter_rank:
            y = y + lowrank_linear(x, *self._stored("adapter_a", "adapter_b"))
        return y + self.bias.to(y.dtype) if spec.bias else y

    def _sparse_lowrank(self, x: Tensor) -> Tensor:
        spec = self.spec
        if spec.sparse == "none":
            return self._lowrank(x)
        if spec.sparse == "rows":
            return torch.cat([self._sparse(x), self._lowrank(x)], dim=-1)
        if spec.sparse == "columns":
            kept = self._sparse(x[..., : spec.kept])
            return kept + self._lowrank(x[..., spec.kept :]) if spec.factor_rank else kept
        kept = self._sparse(x)
        return kept + self._lowrank(x) if spec.factor_rank else kept

    def _sparse(self, x: Tensor) -> Tensor:
        if self.spec.weight_bits:
            return self._quantized("weight", x, self.weight_mask)
        if self.spec.sparse == "bitmask":
            return bitmask_linear(x, *self._stored("weight", "weight_mask"))
        return nn.functional.linear(x, self.weight.to(x.dtype))

    def _lowrank(self, x: Tensor) -> Tensor:
        spec = self.spec
        if spec.rank > spec.adapter_rank and not spec.lowrank_bits and not spec.pivoted:
            return lowrank_linear(x, *self._stored("lowrank_a", "lowrank_b"))
        rows, _ = spec.lowrank_shape(self.out_features, self.in_features)
        if not spec.factor_rank:
            return autocast(x).new_zeros(*x.shape[:-1], rows)
        if spec.lowrank_bits:
            z = self._quantized("lowrank_a", x)
            y = self._quantized("lowrank_b", z)
            if not spec.pivoted:
                return y
            return torch.cat([z, y], dim=-1).index_select(-1, row_sources(self.lowrank_pivots, rows, spec.factor_rank))
        return pivoted_linear(x, *self._stored("lowrank_a", "lowrank_b", "lowrank_pivots"), rows)

    def _quantized(self, name: str, x: Tensor, mask: Tensor | None = None) -> Tensor:
        kept = x.shape[-1] if mask is None else self.spec.kept
        return quantized_linear(x, getattr(self, name), getattr(self, f"{name}_scale"), mask, *self._form(name), kept)

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None) -> "SparseLowRankLinear":
        """The exact layer of an already sparse matrix (m, n): a bitmask with as many values per row as the fullest row has.

        Raises:
            CompressionError: if a row has no zero at all, so that a dense layer is the smaller one.
        """
        nonzero = weight != 0
        kept = int(nonzero.sum(dim=1).max())
        if kept >= weight.shape[1]:
            raise CompressionError(
                f"a row of the {tuple(weight.shape)} matrix has no zero entry; keep it as a dense nn.Linear"
            )
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
        """Make a layer from its parts, rounding them once to `dtype` (that of the parts).

        Args:
            sparse: layout. `weight` is (p, n) for rows, (m, p) for columns, (m, n) for full, and for a bitmask the dense (m, n) matrix
                from which `mask` (m, n, boolean, equally many per row) picks the kept values, or these themselves, quantised, (m, k).
            lowrank_a, lowrank_b: A (r, n') and B (m', r); both quantised alike, or neither.
            pivots: (m',) boolean, r of them True, for a B (m' − r, r) without its identity block; see `pivot`.
            signs: (m, n) boolean, True = +1; with `scale_in` (b, n) and `scale_out` (m, b) they make a binary part.
            bias: (m,).
        """
        values = weight
        if sparse == "bitmask":
            assert weight is not None and mask is not None, "a bitmask needs `weight` and `mask`"
            if isinstance(weight, Quantized):
                expected = pack_values(mask, mask).shape
                if weight.shape != expected:
                    raise CompressionError(
                        f"{tuple(weight.shape)} quantised values for a mask that keeps {tuple(expected)}"
                    )
            else:
                values = pack_values(weight, mask)
        parts = {"weight": values, "lowrank_a": lowrank_a, "lowrank_b": lowrank_b}
        parts |= {"scale_in": scale_in, "scale_out": scale_out, "bias": bias}
        kept = 0 if values is None or sparse == "full" else values.shape[0 if sparse == "rows" else 1]
        rank = 0 if lowrank_a is None else lowrank_a.shape[0]
        weight_bits, weight_group = _form_of(values)
        lowrank_bits, lowrank_group = _form_of(lowrank_a)
        if _form_of(lowrank_b) != (lowrank_bits, lowrank_group):
            raise CompressionError(
                "both factors of a low-rank part must be quantised alike, with the same bits and the same group"
            )
        reference = next(part for part in parts.values() if part is not None)
        form: dict[str, Any] = {
            "pivoted": pivots is not None,
            "weight_bits": weight_bits,
            "weight_group": weight_group,
            "lowrank_bits": lowrank_bits,
            "lowrank_group": lowrank_group,
            "device": reference.device,
            "dtype": dtype or reference.dtype,
        }
        layer: SparseLowRankLinear
        if scale_in is None:
            layer = SparseLowRankLinear(in_features, out_features, sparse, kept, rank, bias is not None, **form)
        else:
            layer = SparseLowRankBinaryLinear(
                in_features, out_features, sparse, kept, rank, scale_in.shape[0], bias is not None, **form
            )
        with torch.no_grad():
            for name, part in parts.items():
                if isinstance(part, Quantized):
                    getattr(layer, name).copy_(pack_codes(part.codes, part.bits))
                    getattr(layer, f"{name}_scale").copy_(part.scale)
                elif part is not None:
                    getattr(layer, name).copy_(part)
            if mask is not None and sparse == "bitmask":
                layer.weight_mask.copy_(pack_bits(mask))
            if pivots is not None:
                layer.lowrank_pivots.copy_(pack_bits(pivots))
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
        **form: Any,
    ) -> None:
        spec = LayerSpec(
            kind="sparse_lowrank_binary",
            sparse=sparse,
            kept=kept,
            rank=rank,
            binary_rank=binary_rank,
            bias=bias,
            **form,
        )
        CompressedLinear.__init__(self, in_features, out_features, spec, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x (..., n); the result is (..., m)."""
        held = self.__dict__
        spec = held["spec"]
        if spec.sparse != "bitmask" or spec.rank or spec.bias or spec.weight_bits:
            return super().forward(x)
        # SLaB's own layer is one operation, and is left to it in as few steps as can be (see `ops.operation`).
        floats, bitmaps = held["_parameters"], held["_buffers"]
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
        spec = self.spec
        if spec.sparse == "bitmask" and not spec.weight_bits:
            y = bitmask_binary_linear(x, *self._stored("weight", "weight_mask", "sign_bits", "scale_in", "scale_out"))
            return y + self._lowrank(x) if spec.factor_rank else y
        y = binary_linear(x, *self._stored("sign_bits", "scale_in", "scale_out"))
        return y if spec.sparse == "none" and not spec.factor_rank else y + super()._sparse_lowrank(x)


def build_layer(
    spec: LayerSpec, in_features: int, out_features: int, device: Any = None, dtype: torch.dtype | None = None
) -> CompressedLinear:
    """The empty layer that a spec describes."""
    arguments = {
        field.name: getattr(spec, field.name)
        for field in dataclasses.fields(spec)
        if field.name not in ("kind", "binary_rank")
    }
    if spec.kind == "sparse_lowrank_binary":
        return SparseLowRankBinaryLinear(
            in_features, out_features, binary_rank=spec.binary_rank, device=device, dtype=dtype, **arguments
        )
    return SparseLowRankLinear(in_features, out_features, device=device, dtype=dtype, **arguments)


def _form_of(part: Tensor | Quantized | None) -> tuple[int, int]:
    return (part.bits, part.group) if isinstance(part, Quantized) else (0, 0)
