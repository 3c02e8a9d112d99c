"""Truncating a layer's low-rank part, after adapters were merged, to the rank that it had when it was compressed.

The factors of a layer and the adapters beside them are truncated as one matrix. Of all matrices of rank r, its
truncated singular value decomposition is the nearest to it in the Frobenius norm (Eckart and Young, The approximation
of one matrix by another of lower rank, 1936). The product B A is never formed: with B = Q R and Aᵀ = P T it is Q (R
Tᵀ) Pᵀ, and the matrix in the middle is as small as the rank. Everything is computed in float64 and rounded once to the
layer's dtype.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..runtime.errors import CompressionError, NumericalError
from ..runtime.layers import CompressedLinear
from ..runtime.origin import Origin
from ..runtime.packing import pack_bits, unpack_bits
from ..runtime.pivoting import pivot, unpivot
from ..runtime.reports import REPORT_FILE
from ..runtime.safetensors_headers import read_json
from ..runtime.saved_config import record_layers
from ..runtime.saving import CompleteSave
from .merging import store

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Truncation:
    """A record of what `recompress` did to a layer.

    Attributes:
        name: the layer's name. rank_before: rank of the low-rank part with all merged adapters. rank: its rank now.
        relative_error: ‖W − Ŵ‖ / ‖W‖ in the Frobenius norm, for the whole matrix W that the layer multiplied by
        before.
    """

    name: str
    rank_before: int
    rank: int
    relative_error: float


@torch.inference_mode(False)
def recompress(model: "PreTrainedModel", rank: int | None = None) -> list[Truncation]:
    """Truncate every compressed layer whose rank has grown to the rank that it had when the model was compressed.

    Sparse values, masks and signs stay as they are. Where whole rows or columns are kept, the adapter's part there is
    added to them. Tensors that are made can be trained later, in inference mode, too.

    Args:
        rank: a rank that no layer may exceed, in place of the ranks of the compression.

    Returns:
        One entry per layer that was changed.

    Raises:
        CompressionError: for a rank below 1, or if a layer cannot be truncated, would lose its low-rank part
            altogether, or has no rank in the model's report. Nothing is changed then.
        NumericalError: if a value is not finite in the dtype of its layer.
    """
    if rank is not None and rank < 1:
        raise CompressionError(f"rank: found {rank}, expected at least 1")
    record_layers(model)  # merges may have changed layers since the config was written
    layers = _compressed_layers(model)
    ranks = _ranks_when_compressed(model) if rank is None else dict.fromkeys(layers, rank)
    grown = {}
    for name, layer in layers.items():
        if layer.spec.rank > _target(name, ranks):
            grown[name] = layer
    # Every layer is checked before the first is changed.
    for name, layer in grown.items():
        check_truncation(layer, ranks[name], name)
    truncations = [truncate_layer(layer, ranks[name], name) for name, layer in grown.items()]
    record_layers(model)
    return truncations


def truncated_product(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors A' (r, n) and B' (m, r) of the matrix of rank r that is nearest to B A.

    Each of them is multiplied by the roots of the singular values, so that both are of about one size.

    Args:
        a, b: A (q, n) and B (m, q), float64.
        rank: r, at most q, m and n.
    """
    # B = left.Q left.R and Aᵀ = right.Q right.R. Both Q have orthonormal columns, which change no singular value.
    left, right = torch.linalg.qr(b), torch.linalg.qr(a.T)
    U, sigma, Vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    roots = sigma[:rank].sqrt()
    return roots[:, None] * (Vh[:rank] @ right.Q.T), (left.Q @ U[:, :rank]) * roots


def _compressed_layers(model: "PreTrainedModel") -> dict[str, CompressedLinear]:
    """Return the compressed layers of the model by name, in the order of its config."""
    layers = {}
    for name in model.config.quantization_config.layers:
        layer = model.get_submodule(name)
        if isinstance(layer, CompressedLinear):
            layers[name] = layer
    return layers


def _ranks_when_compressed(model: "PreTrainedModel") -> dict[str, int]:
    """Return the rank of each compressed layer, from the report of the model or of the checkpoint that it came from.

    Raises:
        CompressionError: if the report does not have the form of one.
    """
    save = CompleteSave.attach(model)
    file = Origin.of(model).find(REPORT_FILE)
    report: Any = save.report
    if report is None:
        report = read_json(str(file)) if file else {}
    try:
        return {layer["name"]: int(layer["rank"]) for layer in report.get("layers", [])}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CompressionError(
            f"{file}: is damaged ({type(error).__name__}: {error}); give the rank (--rank)"
        ) from error


def _target(name: str, ranks: Mapping[str, int]) -> int:
    """Return the rank to truncate a layer to, or raise CompressionError if it is not recorded."""
    if name not in ranks:
        raise CompressionError(
            f"{name}: {REPORT_FILE} does not say its rank when it was compressed; give the rank (--rank)"
        )
    return ranks[name]


def check_truncation(layer: CompressedLinear, rank: int, name: str = "layer") -> None:
    """Raise CompressionError if a layer cannot be truncated to a rank."""
    spec = layer.spec
    if any(tensor.is_meta for tensor in layer.state_dict().values()):
        raise CompressionError(
            f"{name}: is offloaded; open the model without offloading (device_map='cpu') to recompress it"
        )
    if rank < 1:
        raise CompressionError(
            f"{name}: rank {rank} would take its low-rank part of rank {spec.rank} out, merged adapters and all; "
            "give a rank (--rank)"
        )
    if spec.lowrank_bits:
        raise CompressionError(
            f"{name}: its factors are quantized to {spec.lowrank_bits} bits, and rounding them again would lose more "
            "than the truncation; keep the merged rank, or merge into a checkpoint of plain factors"
        )
    if spec.sparse in ("rows", "columns") and spec.adapter_rank and spec.weight_bits:
        raise CompressionError(
            f"{name}: its kept {spec.sparse} are quantized to {spec.weight_bits} bits and cannot take the adapter; "
            "keep the merged rank"
        )


def truncate_layer(layer: CompressedLinear, rank: int, name: str = "layer") -> Truncation:
    """Truncate the factors of a layer, and the adapters beside them, to one product of a rank.

    The product is stored in the form that the layer's factors have, plain or pivoted.

    Raises:
        CompressionError, NumericalError: as for `recompress`. The layer is then as it was.
    """
    check_truncation(layer, rank, name)
    spec = layer.spec
    before = layer.to_dense(torch.float64)
    a, b, kept_values = _with_adapters(layer)
    rank = min(rank, *spec.lowrank_shape(layer.out_features, layer.in_features))
    a, b = truncated_product(a, b, rank)
    pivots: Tensor | None = None
    if spec.pivoted:
        a, b, pivots = pivot(a, b)
    truncated = {} if kept_values is None else {"weight": kept_values}
    truncated |= {"lowrank_a": a, "lowrank_b": b}
    # All of them are checked before one is stored, so that an error leaves the layer as it was.
    rounded = {key: value.to(layer.dtype) for key, value in truncated.items()}
    for key, value in rounded.items():
        if not bool(value.isfinite().all()):
            raise NumericalError(
                f"{name}: {key} would not be finite in {layer.dtype}; open the model in float32 (--dtype float32)"
            )
    # Every check is passed: from here on the layer changes.
    for key, value in rounded.items():
        store(layer, key, value)
    store(layer, "adapter_a", None)
    store(layer, "adapter_b", None)
    if pivots is not None:
        layer.lowrank_pivots = pack_bits(pivots)
    layer.spec = replace(spec, rank=rank, adapter_rank=0)
    lost = (before - layer.to_dense(torch.float64)).norm()
    norm = before.norm().clamp(min=torch.finfo(torch.float64).tiny)  # a matrix of zeros has no relative error
    return Truncation(name, spec.rank, rank, float(lost / norm))


def _with_adapters(layer: CompressedLinear) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the layer's factors with its adapters appended, and its kept rows or columns with the adapters added.

    The low-rank part of a layer with kept rows or columns covers only the others, which come last. An adapter covers
    all of them: its part on the kept ones is added to their values, the rest is appended to the factors.

    Returns:
        A (q, n') and B (m', q) in float64, and the kept values in float64, or None if they stay as they are.
    """
    spec = layer.spec
    a, b = _factors(layer)
    if not spec.adapter_rank:
        return a, b, None
    rows, columns = spec.lowrank_shape(layer.out_features, layer.in_features)
    adapter_a = layer.adapter_a.detach().double()
    adapter_b = layer.adapter_b.detach().double()
    a = torch.cat([a, adapter_a[:, layer.in_features - columns :]])
    b = torch.cat([b, adapter_b[layer.out_features - rows :]], dim=1)
    kept_values: Tensor | None = None
    if spec.sparse == "rows":
        kept_values = layer.weight.detach().double() + adapter_b[: spec.kept] @ adapter_a
    elif spec.sparse == "columns":
        kept_values = layer.weight.detach().double() + adapter_b @ adapter_a[:, : spec.kept]
    return a, b, kept_values


def _factors(layer: CompressedLinear) -> tuple[Tensor, Tensor]:
    """Return A (r, n') and B (m', r) of the layer's own low-rank part, as an ordinary product in float64."""
    rows, columns = layer.spec.lowrank_shape(layer.out_features, layer.in_features)
    if not layer.spec.factor_rank:
        empty = torch.zeros(0, dtype=torch.float64, device=layer.weight.device)
        return empty.reshape(0, columns), empty.reshape(rows, 0)
    a = layer.lowrank_a.detach().double()
    b = layer.lowrank_b.detach().double()
    if layer.spec.pivoted:
        b = unpivot(b, unpack_bits(layer.lowrank_pivots, rows))
    return a, b
