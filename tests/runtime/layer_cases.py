"""Builds random layers of every kind, and writes their meaning out a second time, in float64 and without packing."""

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_lowrank import CompressedLinear, LayerSpec
from hf_lowrank.runtime.layers import build_layer
from hf_lowrank.runtime.packing import pack_bits

LAYOUTS = ("none", "rows", "columns", "bitmask")
FLOAT_NAMES = ("weight", "lowrank_a", "lowrank_b", "adapter_a", "adapter_b", "scale_in", "scale_out", "bias")


def make_spec(sparse: str, kept: int, rank: int, binary_rank: int, bias: bool, adapter_rank: int = 0) -> LayerSpec:
    """Return a valid spec. The rank of merged adapters, `adapter_rank`, comes on top of `rank`."""
    kind = "sparse_lowrank_binary" if binary_rank else "sparse_lowrank"
    ranks = {"rank": rank + adapter_rank, "adapter_rank": adapter_rank, "binary_rank": binary_rank}
    return LayerSpec(kind=kind, sparse=sparse, kept=0 if sparse == "none" else kept, bias=bias, **ranks)


def random_layer(
    spec: LayerSpec, out_features: int, in_features: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> CompressedLinear:
    """Build a layer with random values, random signs, and a random choice of kept columns in every row."""
    generator = torch.Generator().manual_seed(seed)
    layer = build_layer(spec, in_features, out_features, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if layer.weight_mask is not None:
            order = torch.rand(out_features, in_features, generator=generator).argsort(dim=1)
            mask = torch.zeros(out_features, in_features, dtype=torch.bool).scatter_(1, order[:, : spec.kept], True)
            layer.weight_mask.copy_(pack_bits(mask))
        if layer.sign_bits is not None:
            layer.sign_bits.copy_(pack_bits(torch.rand(out_features, in_features, generator=generator) < 0.5))
    return layer


def dense_by_hand(layer: CompressedLinear) -> Tensor:
    """Return the (m, n) matrix of a layer in float64, put together element by element from its stored tensors."""
    spec, m, n = layer.spec, layer.out_features, layer.in_features
    stored = {name: tensor.detach().double().numpy() for name, tensor in layer.named_parameters()}
    dense = np.zeros((m, n))
    if spec.sparse == "bitmask":
        mask = bits_by_hand(layer.weight_mask, n)
        for row in range(m):
            dense[row, np.flatnonzero(mask[row])] = stored["weight"][row]
    elif spec.sparse == "rows":
        dense[: spec.kept] = stored["weight"]
    elif spec.sparse == "columns":
        dense[:, : spec.kept] = stored["weight"]
    if spec.adapter_rank:
        dense += stored["adapter_b"] @ stored["adapter_a"]
    if spec.factor_rank:
        product = stored["lowrank_b"] @ stored["lowrank_a"]
        dense[m - product.shape[0] :, n - product.shape[1] :] += product
    for b in range(spec.binary_rank):
        signs = np.where(bits_by_hand(layer.sign_bits, n), 1.0, -1.0)
        dense += np.outer(stored["scale_out"][:, b], stored["scale_in"][b]) * signs
    return torch.from_numpy(dense)


def bits_by_hand(packed: Tensor, columns: int) -> Tensor:
    """Unpack bits with numpy: (m, ⌈columns / 8⌉) bytes become (m, columns) booleans."""
    bits = np.unpackbits(packed.numpy(), axis=-1, bitorder="little")[:, :columns]
    return torch.from_numpy(bits.astype(bool))


def random_matrix(*shape: int, seed: int = 0) -> Tensor:
    """Return a matrix with normal values in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def shapes_of(layer: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of the stored tensors by their names."""
    return {name: tensor.shape for name, tensor in layer.state_dict().items()}


@st.composite
def layer_cases(draw: st.DrawFn, max_side: int = 24, max_adapter_rank: int = 3) -> tuple[LayerSpec, int, int]:
    """Draw (spec, out_features, in_features) of any layer of the format that is neither quantized nor pivoted."""
    m, n = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    sparse = draw(st.sampled_from(LAYOUTS))
    kept = draw(st.integers(0, (m if sparse == "rows" else n) - 1))
    rank, binary_rank = draw(st.integers(0, min(m, n))), draw(st.integers(0, min(m, n, 3)))
    adapter_rank = draw(st.integers(0, min(m + n, max_adapter_rank)))
    return make_spec(sparse, kept, rank, binary_rank, draw(st.booleans()), adapter_rank), m, n
