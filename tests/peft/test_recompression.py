"""After merges a layer goes back to the rank of the compression.

The result is the nearest matrix in norm, in the form that the layer had, and its error is reported.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_lowrank import CompressionError, LayerSpec, cli
from hf_lowrank.checkpoints.inspect import inspect
from hf_lowrank.peft import recompress
from hf_lowrank.peft.merging import add_lowrank
from hf_lowrank.peft.recompression import truncate_layer
from hf_lowrank.runtime.content_checks import check_contents
from tests.runtime.layer_cases import random_layer
from tests.support.compressed import Compressed, compressed_model, logits

from .conftest import RANK, adapted, assert_stored, specs, stored
from .test_merging import ALL, QUANTIZED_VALUES, M, N, layer_of, product

PLAIN_FACTORS = [name for name, spec in ALL.items() if spec.factor_rank and not spec.lowrank_bits]


@pytest.mark.parametrize("name", PLAIN_FACTORS)
def test_the_result_is_the_nearest_that_fits_what_the_layer_stored(name: str) -> None:
    """It is the nearest in what the factors cover. Kept rows and columns take their part of the adapter exactly."""
    layer = layer_of(name, torch.float64)
    spec, shapes = layer.spec, {key: tensor.shape for key, tensor in layer.state_dict().items()}
    rest = copy.deepcopy(layer)
    rest.lowrank_a.data.zero_()
    a, b = product(3, torch.float64)
    lowrank = layer.to_dense() - rest.to_dense() + b @ a
    add_lowrank(layer, a, b)
    merged = layer.to_dense()
    found = truncate_layer(layer, spec.rank)
    rows, columns = spec.lowrank_shape(M, N)
    discarded = torch.linalg.svdvals(lowrank[M - rows :, N - columns :])[spec.rank :]
    assert (found.rank_before, found.rank) == (spec.rank + 3, spec.rank)
    assert found.relative_error == pytest.approx(float(discarded.norm() / merged.norm()), abs=1e-9)
    torch.testing.assert_close((layer.to_dense() - merged).norm(), discarded.norm(), rtol=1e-9, atol=1e-9)
    assert layer.spec == spec
    assert {key: tensor.shape for key, tensor in layer.state_dict().items()} == shapes
    check_contents(name, layer.spec, M, N, layer.state_dict())


@pytest.mark.parametrize("recipe", ["sola", "soco", "pivoted"])
def test_a_merged_model_goes_back_to_its_size(
    recipe: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    compressed = compressed_model(recipe, tmp_path_factory)
    merged = adapted(compressed).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    done = CliRunner().invoke(
        cli.app, ["recompress", str(tmp_path / "merged"), "-o", str(tmp_path / "small"), "--json"]
    )
    assert done.exit_code == 0, done.output
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert specs(again) == specs(compressed.saved)
    sizes = [inspect(folder).block_bytes for folder in (compressed.folder, tmp_path / "merged", tmp_path / "small")]
    assert sizes[0] == sizes[2] < sizes[1]
    printed = {layer["name"]: layer for layer in json.loads(done.stdout)}
    assert printed.keys() == specs(again).keys()
    for name, layer in printed.items():
        change = (again.get_submodule(name).to_dense() - merged.get_submodule(name).to_dense()).norm()
        assert layer["relative_error"] == pytest.approx(
            float(change / merged.get_submodule(name).to_dense().norm()), rel=1e-3
        )


def test_an_adapter_within_the_layers_own_span_costs_nothing(sola: Compressed) -> None:
    """The adapter has the layer's own B, so that B A + B C = B (A + C) has the layer's own rank."""
    model = sola.model()
    for name, layer in ((name, model.get_submodule(name)) for name in specs(model)):
        covering = layer.spec.lowrank_shape(layer.out_features, layer.in_features) == (
            layer.out_features,
            layer.in_features,
        )
        b = layer.lowrank_b[:, :2].detach() if covering else torch.zeros(layer.out_features, 2)
        add_lowrank(layer, torch.randn(2, layer.in_features), b, name=name)
    before = logits(model)
    assert max(layer.relative_error for layer in recompress(model)) < 1e-6
    assert specs(model) == specs(sola.saved)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-4)


def test_a_rank_of_the_users_own(slab: Compressed) -> None:
    merged = adapted(slab).merge_and_unload()
    assert {layer.rank for layer in recompress(merged, rank=RANK - 1)} == {RANK - 1}
    assert {spec.rank for spec in specs(merged).values()} == {RANK - 1}
    assert recompress(merged, rank=RANK) == []


@pytest.mark.parametrize(
    ("name", "rank", "message"),
    [
        ("quantized factors", 4, "its factors are quantized to 5 bits"),
        ("rows of quantized values", 4, "its kept rows are quantized to 4 bits"),
        ("bitmask", 0, "rank 0 would take its low-rank part of rank 3 out"),
    ],
)
def test_what_would_lose_the_adapter_is_refused(name: str, rank: int, message: str) -> None:
    quantized_rows = LayerSpec(sparse="rows", kept=6, rank=4, **QUANTIZED_VALUES)
    layer = layer_of(name) if name in ALL else random_layer(quantized_rows, M, N)
    add_lowrank(layer, *product(3))
    with pytest.raises(CompressionError, match=f"^q_proj: {message}") as error:
        truncate_layer(layer, rank, "q_proj")
    assert "\n" not in str(error.value)


def test_a_refusal_leaves_the_model_as_it_is(slab: Compressed) -> None:
    merged = adapted(slab).merge_and_unload()
    before = stored(merged)
    with pytest.raises(CompressionError, match=r"rank 0 would take .* give a rank \(--rank\)"):
        recompress(merged)
    assert_stored(merged, before)


def test_a_model_under_an_adapter_is_refused(sola: Compressed) -> None:
    with pytest.raises(CompressionError, match=r"merge it first \(merge_and_unload\)"):
        recompress(adapted(sola).get_base_model())
