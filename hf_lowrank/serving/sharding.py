"""Parts of compressed layers, for tensor parallelism: some rows of the outputs, or some columns of the inputs.

A part is an ordinary compressed layer, which computes with the same operations and kernels. What a layout cannot cut
is stored in another form, with the same values: such parts take more bytes than their share of the whole.

- Rows that keep different numbers of values within the columns of a part are filled up to the fullest, with zeros.
- Groups of quantized values that are cut become smaller groups, which repeat their scales.
- Rows of a pivoted factor get back its identity block; quantized factors of such a one become plain, as do the kept
  quantized values of a bitmask by columns, because their groups run over the kept values.
- A part of rows (columns) that are all kept is plain, and so is one that is smaller than the rank.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.errors import CompressionError
from ..runtime.layers import CompressedLinear, SparseLowRankLinear, build_layer
from ..runtime.packing import unpack_bits, unpack_values
from ..runtime.pivoting import unpivot
from ..runtime.quantization import Quantized, spread_scale, unpack_codes

Values = Tensor | Quantized


@torch.no_grad()
def part_of(layer: CompressedLinear, dim: int, start: int, stop: int) -> nn.Linear | SparseLowRankLinear:
    """Return the part of a layer that has its outputs (dim 0) or its inputs (dim 1) from `start` to `stop`.

    Outputs of parts by rows are laid side by side, those of parts by columns are added. The bias goes with its rows;
    by columns, the part that starts at 0 has it.

    Raises:
        CompressionError: if the range is empty or not within the layer.
    """
    size = layer.in_features if dim else layer.out_features
    if not 0 <= start < stop <= size:
        raise CompressionError(f"part {start} to {stop}: expected a range within the {size} of the layer")
    columns = stop - start if dim else layer.in_features
    rows = layer.out_features if dim else stop - start
    parts = _parts_by_columns(layer, start, stop) if dim else _parts_by_rows(layer, start, stop)
    bias: Tensor | None = layer.bias
    if bias is not None:
        bias = bias[start:stop] if dim == 0 else bias if start == 0 else None
    if _is_plain(parts, rows, columns):
        dense = layer.to_dense().narrow(dim, start, stop - start)
        return plain_linear(dense, bias)
    part = SparseLowRankLinear.from_parts(columns, rows, bias=bias, dtype=layer.dtype, **parts)
    if layer.spec.adapter_rank:
        part = _with_adapters(part, layer, dim, start, stop)
    return part.requires_grad_(False)


def plain_linear(dense: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a dense layer of a weight (m, n) and a bias, without copying more of them than the part."""
    rows, columns = dense.shape
    linear = nn.Linear(columns, rows, bias=bias is not None, device="meta", dtype=dense.dtype)
    linear.weight = nn.Parameter(dense.contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear


def _with_adapters(
    part: SparseLowRankLinear, layer: CompressedLinear, dim: int, start: int, stop: int
) -> SparseLowRankLinear:
    """Return a part with its share of the factors of merged adapters."""
    rank = layer.spec.adapter_rank
    spec = replace(part.spec, rank=part.spec.rank + rank, adapter_rank=rank)
    whole = build_layer(spec, part.in_features, part.out_features, part.weight.device, part.dtype)
    a = layer.adapter_a[:, start:stop] if dim else layer.adapter_a
    b = layer.adapter_b if dim else layer.adapter_b[start:stop]
    whole.load_state_dict(part.state_dict() | {"adapter_a": a, "adapter_b": b})
    return whole


def _parts_by_rows(layer: CompressedLinear, start: int, stop: int) -> dict[str, Any]:
    """Return the arguments of `from_parts` for the rows from `start` to `stop`."""
    spec, weight = layer.spec, _stored(layer, "weight")
    parts: dict[str, Any] = {"sparse": spec.sparse}
    first = start  # of the rows of B, which does not cover kept rows
    last = stop
    if spec.sparse == "rows":
        parts |= _side(_rows(weight, start, min(stop, spec.kept)), stop - start, 0)
        first, last = max(start - spec.kept, 0), stop - spec.kept
    elif spec.sparse == "bitmask":
        mask = unpack_bits(layer.weight_mask, layer.in_features)
        whole = weight if isinstance(weight, Quantized) else unpack_values(weight, mask)
        parts |= {"weight": _rows(whole, start, stop), "mask": mask[start:stop]}
    elif spec.sparse != "none":
        parts["weight"] = _rows(weight, start, stop)
    if spec.factor_rank and last > first:
        a, b = _stored(layer, "lowrank_a"), _stored(layer, "lowrank_b")
        if spec.pivoted:
            rows, _ = spec.lowrank_shape(layer.out_features, layer.in_features)
            a, b = _unpacked(a), unpivot(_unpacked(b), unpack_bits(layer.lowrank_pivots, rows))
        parts |= {"lowrank_a": a, "lowrank_b": _rows(b, first, last)}
    if spec.binary_rank:
        signs = unpack_bits(layer.sign_bits, layer.in_features)
        parts |= {"signs": signs[start:stop], "scale_in": layer.scale_in, "scale_out": layer.scale_out[start:stop]}
    return _nonempty(parts, layer)


def _parts_by_columns(layer: CompressedLinear, start: int, stop: int) -> dict[str, Any]:
    """Return the arguments of `from_parts` for the columns from `start` to `stop`."""
    spec, weight = layer.spec, _stored(layer, "weight")
    parts: dict[str, Any] = {"sparse": spec.sparse}
    first = start  # of the columns of A, which does not cover kept columns
    last = stop
    if spec.sparse == "columns":
        parts |= _side(_columns(weight, start, min(stop, spec.kept)), stop - start, 1)
        first, last = max(start - spec.kept, 0), stop - spec.kept
    elif spec.sparse == "bitmask":
        mask = unpack_bits(layer.weight_mask, layer.in_features)
        dense = unpack_values(_unpacked(weight), mask)
        parts |= {"weight": dense[:, start:stop], "mask": _filled_up(mask[:, start:stop])}
    elif spec.sparse != "none":
        parts["weight"] = _columns(weight, start, stop)
    if spec.factor_rank and last > first:
        a, b = _columns(_stored(layer, "lowrank_a"), first, last), _stored(layer, "lowrank_b")
        parts |= {
            "lowrank_a": a,
            "lowrank_b": _regrouped(b, a.group) if isinstance(a, Quantized) and isinstance(b, Quantized) else b,
        }
        if spec.pivoted:
            rows, _ = spec.lowrank_shape(layer.out_features, layer.in_features)
            parts["pivots"] = unpack_bits(layer.lowrank_pivots, rows)
    if spec.binary_rank:
        signs = unpack_bits(layer.sign_bits, layer.in_features)
        parts |= {"signs": signs[:, start:stop], "scale_in": layer.scale_in[:, start:stop]}
        parts["scale_out"] = layer.scale_out
    return _nonempty(parts, layer)


def _side(kept: Values | None, size: int, dim: int) -> dict[str, Any]:
    """Return the kept rows (columns) of a part: none, some, or all of its `size`."""
    if kept is None:
        return {"sparse": "none"}
    return {"weight": kept, "sparse": "full"} if kept.shape[dim] == size else {"weight": kept}


def _is_plain(parts: dict[str, Any], rows: int, columns: int) -> bool:
    """Return whether a dense matrix is what a part is, or the smaller form of it."""
    smaller_side = min(rows, columns)
    ranks = [parts[name].shape[0] for name in ("lowrank_a", "scale_in") if name in parts]
    if "pivots" in parts:
        smaller_side = min(smaller_side, parts["pivots"].shape[0], parts["lowrank_a"].shape[1])
    is_full = parts["sparse"] == "full" and not isinstance(parts["weight"], Quantized)
    is_masked_full = "mask" in parts and bool(parts["mask"].all())
    return is_full or is_masked_full or any(rank > smaller_side for rank in ranks)


def _nonempty(parts: dict[str, Any], layer: CompressedLinear) -> dict[str, Any]:
    """Give a part without any values the empty weight that stands for zeros."""
    return (
        parts if len(parts) > 1 else parts | {"weight": torch.empty(0, dtype=layer.dtype, device=layer.weight.device)}
    )


def _filled_up(mask: Tensor) -> Tensor:
    """Return a mask (m, c) with as many columns set in every row as the fullest has: the first of its others."""
    kept = int(mask.sum(dim=1).max())
    order = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(mask).scatter_(1, order[:, :kept], True)


def _stored(layer: CompressedLinear, name: str) -> Values:
    """Return a matrix of values as the layer stores it. A quantized one is unpacked into its codes."""
    values: Tensor = getattr(layer, name)
    bits, group = layer._quantization(name)
    if not bits:
        return values.detach()
    spec = layer.spec
    _, free_columns = spec.lowrank_shape(layer.out_features, layer.in_features)
    kept = spec.kept if spec.sparse in ("columns", "bitmask") else layer.in_features
    columns = {"weight": kept, "lowrank_a": free_columns, "lowrank_b": spec.factor_rank}[name]
    return Quantized(unpack_codes(values, bits, columns), getattr(layer, f"{name}_scale").detach(), bits, group)


def _unpacked(values: Values) -> Tensor:
    return values.dequantize() if isinstance(values, Quantized) else values


def _rows(values: Values, start: int, stop: int) -> Any:
    """Return the rows from `start` to `stop`; None if there are none."""
    if stop <= start:
        return None
    if not isinstance(values, Quantized):
        return values[start:stop]
    return Quantized(values.codes[start:stop], values.scale[start:stop], values.bits, values.group)


def _columns(values: Values, start: int, stop: int) -> Any:
    """Return the columns from `start` to `stop`, in smaller groups if `start` cuts one; None if there are none."""
    if stop <= start:
        return None
    if not isinstance(values, Quantized):
        return values[:, start:stop]
    is_one_group = values.group >= values.codes.shape[1]
    quantized: Quantized = values
    whole = quantized if is_one_group else _regrouped(quantized, math.gcd(quantized.group, start))
    scale = whole.scale if is_one_group else whole.scale[:, start // whole.group : -(-stop // whole.group)]
    return Quantized(whole.codes[:, start:stop], scale, whole.bits, whole.group)


def _regrouped(values: Quantized, group: int) -> Quantized:
    """Return the same values in groups of a size that divides the present one."""
    if values.group == group:
        return values
    scale = spread_scale(values.scale, values.group, values.codes.shape[1])[:, ::group]
    return Quantized(values.codes, scale, values.bits, group)
