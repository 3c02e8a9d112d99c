"""What `inspect` counts in the files is what the model computes with."""

import pytest

from hf_lowrank import inspect
from hf_lowrank.runtime.layers import CompressedLinear
from hf_lowrank.runtime.packing import unpack_bits

from ..support.compressed import RECIPES, compressed_model


@pytest.mark.parametrize("name", RECIPES)
def test_density_counts_values_however_they_are_packed(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    compressed = compressed_model(name, tmp_path_factory)
    found = {layer.name: layer.density for layer in inspect(compressed.folder).layers}
    layers = {key: module for key, module in compressed.saved.named_modules() if isinstance(module, CompressedLinear)}
    assert layers
    for key, layer in layers.items():
        m, n, spec = layer.out_features, layer.in_features, layer.spec
        if spec.sparse == "bitmask":
            values = int(unpack_bits(layer.weight_mask, n).sum())
        elif spec.sparse == "full":
            values = m * n
        else:
            values = layer.weight.numel()
        assert found[key] == values / (m * n)
        assert 0 <= found[key] <= 1
