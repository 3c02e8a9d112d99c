"""Parts of compressed layers, as tensor parallelism has them, are together the whole layer, in every layout."""

import itertools

import pytest
import torch
from torch import Tensor

from hf_lowrank import CompressionError, LayerSpec
from hf_lowrank.runtime.layer_spec import SPARSE_LAYOUTS
from hf_lowrank.runtime.layers import SparseLowRankLinear, build_layer
from hf_lowrank.runtime.packing import pack_bits
from hf_lowrank.runtime.quantization import pack_codes
from hf_lowrank.serving.sharding import part_of

ROWS, COLUMNS = 20, 24
SPLITS = {1: (0, COLUMNS), 2: (0, 8, COLUMNS), 3: (0, 7, 13, COLUMNS)}
"""Where the columns are cut, on the boundaries of groups of 8 and not. Rows are cut there, too, and end earlier."""


def _specs() -> dict[str, LayerSpec]:
    """Return a spec of every layout, plain and quantized, with every kind of low-rank part, signs, and adapters."""
    specs = {}
    for sparse, bits, low_rank, extra in itertools.product(SPARSE_LAYOUTS, (0, 3), range(4), (False, True)):
        if (sparse == "full" and not bits) or (sparse == "none" and bits):
            continue
        fields = {"sparse": sparse, "kept": 0 if sparse in ("none", "full") else 9, "bias": extra}
        if bits:
            fields |= {"weight_bits": bits, "weight_group": 8}
        if low_rank:
            fields |= {"rank": 3, "pivoted": low_rank == 2}
        if low_rank == 3:
            fields |= {"lowrank_bits": 4, "lowrank_group": 8, "pivoted": extra}
        if extra:
            fields |= {"rank": fields.get("rank", 0) + 2, "adapter_rank": 2, "binary_rank": 1}
            fields["kind"] = "sparse_lowrank_binary"
        name = f"{sparse}-{bits or 'plain'}-{('', 'factors', 'pivoted', 'quantized')[low_rank]}-{'all' * extra}"
        specs[name] = LayerSpec(**fields)
    return specs


SPECS = _specs()


def _random_layer(spec: LayerSpec) -> SparseLowRankLinear:
    """Return a float64 layer of random values, places and signs."""
    torch.manual_seed(0)
    layer = build_layer(spec, COLUMNS, ROWS, dtype=torch.float64)
    layer.requires_grad_(False)
    for name, columns in (("weight", None), ("lowrank_a", None), ("lowrank_b", None)):
        bits, group = layer._quantization(name)
        if bits and getattr(layer, name) is not None:
            values = getattr(layer, name)
            scales = getattr(layer, f"{name}_scale")
            columns = {"weight": spec.kept or COLUMNS, "lowrank_b": spec.factor_rank}.get(name)
            if columns is None or (name == "weight" and spec.sparse == "rows"):
                columns = spec.lowrank_shape(ROWS, COLUMNS)[1] if name == "lowrank_a" else COLUMNS
            assert scales.shape[1] == -(-columns // group)
            values.copy_(pack_codes(torch.randint(2**bits, (values.shape[0], columns), dtype=torch.uint8), bits))
    if spec.sparse == "bitmask":
        layer.weight_mask.copy_(pack_bits(_shuffled(ROWS, COLUMNS, spec.kept)))
    if spec.pivoted:
        rows = spec.lowrank_shape(ROWS, COLUMNS)[0]
        layer.lowrank_pivots.copy_(pack_bits(_shuffled(1, rows, spec.factor_rank)[0]))
    if spec.binary_rank:
        layer.sign_bits.copy_(pack_bits(torch.rand(ROWS, COLUMNS) < 0.5))
    return layer


def _shuffled(rows: int, columns: int, count: int) -> Tensor:
    """Return booleans (rows, columns) with `count` of them set in every row."""
    return torch.rand(rows, columns).argsort(dim=1) < count


@pytest.mark.parametrize("world", SPLITS)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", SPECS)
def test_parts_are_together_the_layer(name: str, dim: int, world: int) -> None:
    layer = _random_layer(SPECS[name])
    size = COLUMNS if dim else ROWS
    bounds = [min(bound, size) for bound in SPLITS[world]]
    parts = [part_of(layer, dim, start, stop) for start, stop in itertools.pairwise(bounds)]
    x = torch.randn(2, COLUMNS, dtype=torch.float64)
    expected = torch.nn.functional.linear(x, layer.to_dense(), layer.bias)
    if dim == 0:
        result = torch.cat([part(x) for part in parts], dim=-1)
    else:
        pieces = x.split([stop - start for start, stop in itertools.pairwise(bounds)], dim=-1)
        result = sum(part(piece) for part, piece in zip(parts, pieces, strict=True))
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (-1, 4), (4, COLUMNS + 1)])
def test_a_range_outside_of_the_layer_is_refused(start: int, stop: int) -> None:
    layer = _random_layer(LayerSpec(rank=2))
    with pytest.raises(CompressionError, match=f"part {start} to {stop}: expected a range within the {COLUMNS}"):
        part_of(layer, 1, start, stop)
