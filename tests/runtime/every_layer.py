"""Builds one small layer of every kind that the format has: each layout, with and without every other part."""

from collections.abc import Callable
from itertools import product

from hf_lowrank import CompressedLinear, LayerSpec
from hf_lowrank.runtime.layers import build_layer
from hf_lowrank.runtime.quantization import BITS

from .layer_cases import LAYOUTS, make_spec, random_layer
from .test_quantized_layers import COMBINATIONS, M, N, layer_of


def _parts(sparse: str, binary_rank: int, rank: int, bias: bool = True) -> Callable[[], CompressedLinear]:
    # Merged adapters come with a low-rank part, so that every kind of part is there.
    spec = make_spec(sparse, 5, rank, binary_rank, bias, adapter_rank=2 if rank else 0)
    return lambda: random_layer(spec, M, N)


def _quantized(combination: str, bits: int) -> Callable[[], CompressedLinear]:
    return lambda: layer_of(combination, bits)[0].float()


def _pivoted(sparse: str, kept: int) -> Callable[[], CompressedLinear]:
    spec = LayerSpec(kind="sparse_lowrank", sparse=sparse, kept=kept, rank=3, pivoted=True)
    return lambda: build_layer(spec, N, M)


EVERY_LAYER: dict[str, Callable[[], CompressedLinear]] = {
    **{f"{s}-{b}-{r}": _parts(s, b, r) for s, b, r in product(LAYOUTS, (0, 2), (0, 3)) if (s, b, r) != ("none", 0, 0)},
    **{
        f"{name}, {BITS[i % len(BITS)]} bits": _quantized(name, BITS[i % len(BITS)])
        for i, name in enumerate(COMBINATIONS)
    },
    "slab": _parts("bitmask", 1, 0, bias=False),
    "pivoted": _pivoted("none", 0),
    "rows-pivoted": _pivoted("rows", 4),
}
"""Functions that build a layer (15, 20) in float32, by what it stores."""
SOME_LAYERS = ("none-0-3", "rows-2-3", "columns-0-3", "bitmask-0-0", "slab", "rows+pivoted, 4 bits", "pivoted")
"""Layers that together have every operation, for tests that take long."""
