"""Back to the rank of the compression after adapters were merged: what a layer has of low rank, truncated as one matrix.

Of all matrices of rank r the truncated singular value decomposition is nearest to the product in the Frobenius norm (Eckart and Young, The
approximation of one matrix by another of lower rank, 1936). The product B A is never formed: with B = Q R and Aᵀ = P T it is Q (R Tᵀ) Pᵀ,
whose middle is as small as the rank. Everything is computed in float64 and rounded once to the layer's dtype.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..runtime.errors import CompressionError, NumericalError
from ..runtime.layers import CompressedLinear
from ..runtime.packing import pack_bits, unpack_bits
from ..runtime.pivoting import pivot, unpivot
from ..runtime.reports import REPORT_FILE
from ..runtime.safetensors_headers import read_json
from ..runtime.saving import CompleteSave, record_layers
from .merging import store

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Truncation:
    """What `recompress` did to a layer.

    Attributes:
        rank_before, rank: of the low-rank part with all merged adapters.
        relative_error: ‖W − Ŵ‖ / ‖W‖ in the Frobenius norm, W being the whole matrix that the layer multiplied by before.
    """

    name: str
    rank_before: int
    rank: int
    relative_error: float


def recompress(model: "PreTrainedModel", rank: int | None = None) -> list[Truncation]:
    """Truncate every compressed layer whose rank has grown to the rank that it had when the model was compressed.

    Sparse values, masks and signs stay as they are; where whole rows or columns are kept, the adapter's part there is added to them.

    Args:
        rank: what no layer may exceed instead.

    Returns:
        One entry per layer that was changed.

    Raises:
        CompressionError: for a rank below 1; if a layer cannot be truncated, or would lose its low-rank part altogether, or the model's
            report does not say its rank; nothing is changed then. NumericalError: if a value is not finite in the dtype of its layer.
    """
    if rank is not None and rank < 1:
        raise CompressionError(f"rank: found {rank}, expected at least 1")
    record_layers(model)
    names = list(model.config.quantization_config.layers)
    layers = {name: layer for name in names if isinstance(layer := model.get_submodule(name), CompressedLinear)}
    ranks = dict.fromkeys(layers, rank) if rank is not None else _ranks_when_compressed(model)
    grown = {name: layer for name, layer in layers.items() if layer.spec.rank > _target(name, ranks)}
    for name, layer in grown.items():
        check_truncation(layer, ranks[name], name)
    found = [truncate_layer(layer, ranks[name], name) for name, layer in grown.items()]
    record_layers(model)
    return found


def truncated_product(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors A' (r, n) and B' (m, r) of the matrix of rank r that is nearest to B A; both take the roots of the singular values.

    Args:
        a, b: A (q, n) and B (m, q), float64.
        rank: r, at most q, m and n.
    """
    left, right = torch.linalg.qr(b), torch.linalg.qr(a.T)
    U, sigma, Vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    roots = sigma[:rank].sqrt()
    return roots[:, None] * (Vh[:rank] @ right.Q.T), (left.Q @ U[:, :rank]) * roots


def _ranks_when_compressed(model: "PreTrainedModel") -> dict[str, int]:
    """The rank of each compressed layer, from the report of the model or of the checkpoint that it came from."""
    save = CompleteSave.attach(model)
    file = save.find(REPORT_FILE)
    report = save.report if save.report is not None else read_json(file) if file else {}
    try:
        return {layer["name"]: int(layer["rank"]) for layer in report.get("layers", [])}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CompressionError(
            f"{file}: is damaged ({type(error).__name__}: {error}); give the rank (--rank)"
        ) from error


def _target(name: str, ranks: Mapping[str, int]) -> int:
    if name not in ranks:
        raise CompressionError(
            f"{name}: {REPORT_FILE} does not say its rank when it was compressed; give the rank (--rank)"
        )
    return ranks[name]


def check_truncation(layer: CompressedLinear, rank: int, name: str = "layer") -> None:
    """Raise CompressionError if a layer cannot be truncated to that rank."""
    spec = layer.spec
    if any(tensor.is_meta for tensor in layer.state_dict().values()):
        raise CompressionError(
            f"{name}: is offloaded; open the model without offloading (device_map='cpu') to recompress it"
        )
    if rank < 1:
        raise CompressionError(
            f"{name}: rank {rank} would take its low-rank part of rank {spec.rank} out, merged adapters and all; give a rank (--rank)"
        )
    if spec.lowrank_bits:
        raise CompressionError(
            f"{name}: its factors are quantised to {spec.lowrank_bits} bits, and rounding them again would lose more than the truncation; "
            "keep the merged rank, or merge into a checkpoint of plain factors"
        )
    if spec.sparse in ("rows", "columns") and spec.adapter_rank and spec.weight_bits:
        raise CompressionError(
            f"{name}: its kept {spec.sparse} are quantised to {spec.weight_bits} bits and cannot take the adapter; keep the merged rank"
        )


def truncate_layer(layer: CompressedLinear, rank: int, name: str = "layer") -> Truncation:
    """Truncate the factors of a layer, and the adapters beside them, to one product of that rank in the form that its factors have.

    Raises:
        CompressionError, NumericalError: as `recompress`; the layer is then as it was.
    """
    check_truncation(layer, rank, name)
    spec, before = layer.spec, layer.to_dense(torch.float64)
    rows, columns = spec.lowrank_shape(layer.out_features, layer.in_features)
    a, b = _factors(layer)
    changed: dict[str, Tensor] = {}
    if spec.adapter_rank:
        adapter_a, adapter_b = layer.adapter_a.detach().double(), layer.adapter_b.detach().double()
        a = torch.cat([a, adapter_a[:, layer.in_features - columns :]])
        b = torch.cat([b, adapter_b[layer.out_features - rows :]], dim=1)
        if spec.sparse == "rows":
            changed["weight"] = layer.weight.detach().double() + adapter_b[: spec.kept] @ adapter_a
        elif spec.sparse == "columns":
            changed["weight"] = layer.weight.detach().double() + adapter_b @ adapter_a[:, : spec.kept]
    rank = min(rank, rows, columns)
    a, b = truncated_product(a, b, rank)
    pivots: Tensor | None = None
    if spec.pivoted:
        a, b, pivots = pivot(a, b)
    changed |= {"lowrank_a": a, "lowrank_b": b}
    rounded = {key: value.to(layer.dtype) for key, value in changed.items()}
    for key, value in rounded.items():
        if not bool(value.isfinite().all()):
            raise NumericalError(
                f"{name}: {key} would not be finite in {layer.dtype}; open the model in float32 (--dtype float32)"
            )
    for key in ("weight", "lowrank_a", "lowrank_b", "adapter_a", "adapter_b"):
        if key in rounded or key.startswith("adapter"):
            store(layer, key, rounded.get(key))
    if pivots is not None:
        layer.lowrank_pivots = pack_bits(pivots)
    layer.spec = replace(spec, rank=rank, adapter_rank=0)
    lost = (before - layer.to_dense(torch.float64)).norm()
    return Truncation(name, spec.rank, rank, float(lost / before.norm().clamp(min=torch.finfo(torch.float64).tiny)))


def _factors(layer: CompressedLinear) -> tuple[Tensor, Tensor]:
    """A (r, n') and B (m', r) of the layer's own low-rank part, as an ordinary product in float64."""
    rows, columns = layer.spec.lowrank_shape(layer.out_features, layer.in_features)
    if not layer.spec.factor_rank:
        empty = torch.zeros(0, dtype=torch.float64, device=layer.weight.device)
        return empty.reshape(0, columns), empty.reshape(rows, 0)
    a, b = layer.lowrank_a.detach().double(), layer.lowrank_b.detach().double()
    return a, unpivot(b, unpack_bits(layer.lowrank_pivots, rows)) if layer.spec.pivoted else b
