"""The benchmark counts bytes as the checkpoint does and measures every variant. No test here looks at a time."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from hf_lowrank import LayerSpec, cli, kernels
from hf_lowrank.evaluation import speed, speed_report, torch_products
from hf_lowrank.runtime.errors import CompressionError
from hf_lowrank.runtime.layers import build_layer
from tests.support.tiny_models import llama


@pytest.fixture(autouse=True)
def _small_working_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "WORKING_SET_BYTES", 0)


@pytest.mark.parametrize("accounting", ["paper", "bits"])
@pytest.mark.parametrize("method", ["slab", "bitmask", "lowrank"])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_a_layout_stores_no_more_than_its_ratio_leaves(method: str, ratio: float, accounting: str) -> None:
    rows, columns = 256, 640
    spec = speed.layout(method, ratio, accounting)(rows, columns)
    budget = (1 - ratio) * 16 * rows * columns
    stored = spec.stored_bits(rows, columns, 16, accounting)
    largest_step = 16 * (rows + columns)  # one more rank
    assert stored <= budget < stored + largest_step


def test_layers_are_measured_once_for_every_variant_with_their_stored_bytes() -> None:
    rows = speed.benchmark_layers([(48, 64)], tokens=[1, 20], threads=[1], repeats=1)
    assert [(row.layout, row.tokens) for row in rows] == [
        (name, tokens) for tokens in (1, 20) for name in speed.LAYOUTS
    ]
    for row in rows:
        spec = speed.LAYOUTS[row.layout](48, 64)
        assert row.stored_bytes * 8 == spec.stored_bits(48, 64, 16)
        assert row.bytes_limit == 48 * 64 * 2 / row.stored_bytes


def test_random_layers_keep_the_number_of_values_that_they_say() -> None:
    spec = LayerSpec(sparse="bitmask", kept=13)
    layer = speed.random_layer(spec, 300, 40, torch.bfloat16)
    assert bool((layer.to_dense() != 0).sum(dim=1).le(13).all())
    assert layer.weight.shape == build_layer(spec, 40, 300).weight.shape


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speed") / "slab"
    dense = tmp_path_factory.mktemp("dense")
    llama().save_pretrained(dense)
    options = ["--method", "slab", "--samples", "2", "--sequence-length", "8", "-o", str(folder)]
    assert CliRunner().invoke(cli.app, ["compress", str(dense), *options]).exit_code == 0
    return folder


def test_a_checkpoint_is_measured_beside_itself_decompressed(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {"torch's own": (lambda weight: nn.Linear(*weight.T.shape, bias=False), ())}
    monkeypatch.setattr(torch_products, "PRODUCTS", plain)
    monkeypatch.setattr(torch_products, "MULTIPLE", 1)
    layers, models = speed_report.of_model(str(checkpoint), "dense", [1], 1, 1, 4, 2, "auto", "cpu")
    assert {row.layout.partition(" × ")[2].split(" ")[0] for row in layers} == {"bitmask", ""}
    assert [row.name for row in models] == ["dense", str(checkpoint), *plain]
    assert models[1].stored_bytes < models[0].stored_bytes
    for table in (speed_report.layer_table(layers), speed_report.model_table(models)):
        assert all(len(row) == len(table[0]) for row in table[1])


@pytest.mark.parametrize("dtype", torch_products.DTYPES, ids=str)
@pytest.mark.parametrize("name", torch_products.PRODUCTS)
def test_torchs_own_products_are_those_of_the_rounded_matrix(name: str, dtype: torch.dtype) -> None:
    build = torch_products.available("cpu", dtype).get(name)
    if build is None:
        pytest.skip(f"this torch has no such product of {dtype}")
    generator = torch.Generator().manual_seed(0)
    weight, x = (
        torch.randn(64, 96, generator=generator).to(dtype),
        torch.randn(2, 3, 96, generator=generator).to(dtype),
    )
    dense = nn.functional.linear(x, weight)
    error = (build(weight)(x) - dense).float().norm() / dense.float().norm()
    assert 0 < error < (0.15 if "int4" in name else 0.02)


def test_products_that_torch_lacks_are_left_out_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_products, "PRODUCTS", {"int5": (nn.Identity, ("_no_such_operation",))})
    assert torch_products.available("cpu", torch.bfloat16) == {}
    answer = CliRunner().invoke(cli.app, ["benchmark", "--shapes", "32x32", "--tokens", "1", "--repeats", "1"])
    assert answer.exit_code == 0
    assert answer.output.count("int5: not in torch") == 1


def test_a_dense_model_alone_is_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    with pytest.raises(CompressionError, match="has no compressed layer; name a compressed checkpoint"):
        speed_report.of_model(str(tmp_path), "dense", [1], 1, 1, 4, 2, "auto", "cpu")


@pytest.mark.parametrize("shape", ["12", "3x", "0x4", "axb", "1x2x3"])
def test_a_shape_is_two_positive_numbers(shape: str) -> None:
    with pytest.raises(CompressionError, match="expected OUTxIN"):
        speed_report.parse_shape(shape)


def test_env_says_of_every_operation_what_computes_it_and_why() -> None:
    answer = CliRunner().invoke(cli.app, ["env"])
    assert answer.exit_code == 0
    assert all(operation in answer.output for operation in kernels.OPERATIONS)
    assert "HF_LOWRANK_KERNELS is off" in answer.output


def test_the_benchmark_prints_one_row_per_layout_and_number_of_tokens() -> None:
    answer = CliRunner().invoke(cli.app, ["benchmark", "--shapes", "32x32", "--tokens", "1", "--repeats", "1"])
    assert answer.exit_code == 0
    assert all(answer.output.count(name) == 1 for name in speed.LAYOUTS)


def test_dense_bytes_are_those_of_a_linear_layer() -> None:
    row = speed.benchmark_layers([(16, 24)], {"low rank": lambda m, n: LayerSpec(rank=2)}, repeats=1)[0]
    assert row.dense_bytes == nn.Linear(24, 16, bias=False, dtype=torch.bfloat16).weight.nbytes


def test_a_timer_of_the_callers_measures_every_variant_with_all_its_copies() -> None:
    def build_timer(calls: Sequence[speed.Call], x: torch.Tensor) -> speed.Timer:
        def count_calls() -> float:
            return float(len([call(x) for call in calls]))

        return count_calls

    rows = speed.benchmark_layers([(16, 24)], repeats=3, build_timer=build_timer)
    assert {(row.dense.median, row.compressed.median) for row in rows} == {(2.0, 2.0)}


def test_the_packages_dense_product_does_not_read_what_torchs_has_just_left_in_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = []

    def dense_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        weights.append(weight.data_ptr())
        return nn.functional.linear(x, weight)

    def dense_forward(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        weights.append(layer.weight.data_ptr())
        return nn.functional.linear(x, layer.weight)

    monkeypatch.setattr(speed.native, "library", object)
    monkeypatch.setattr(speed.products, "dense_linear", dense_linear)
    monkeypatch.setattr(nn.Linear, "forward", dense_forward)
    speed.benchmark_layers([(16, 24)], {}, repeats=3)
    read = weights[1:]  # the first call finds out whether this machine has the package's dense product
    for torch_weight, package_weight in zip(read[::2], read[1::2], strict=True):
        assert torch_weight != package_weight
    assert len(set(read)) == 2
