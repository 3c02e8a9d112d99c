"""Corrected targets solve their least-squares problem, and a block shows how its layers depend on one another."""

import copy

import pytest
import torch

from hf_lowrank.calibration import (
    BlockBatch,
    DenseReference,
    TokenBatch,
    are_residual_writers,
    capture,
    correction_sums,
    input_stages,
)
from hf_lowrank.calibration.correction import CorrectionSums
from hf_lowrank.models.architectures import find_blocks, find_layers

from ..support import tiny_models


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_target_is_that_of_least_squares() -> None:
    """W' minimizes ‖W X + (H − Ĥ) − W' X̂‖² up to the ridge.

    It is W if inputs and streams are the same in both models.
    """
    x, weight = gaussian(400, 12, seed=0), gaussian(7, 12, seed=1)
    x_hat = x + 0.3 * gaussian(400, 12, seed=2)
    stream_error = 0.1 * gaussian(400, 7, seed=3)
    sums = CorrectionSums(x_hat.T @ x_hat, (x - x_hat).T @ x_hat, stream_error.T @ x_hat, 10**6)
    expected = torch.linalg.lstsq(x_hat, x @ weight.T + stream_error).solution.T
    torch.testing.assert_close(sums.target(weight), expected, rtol=0, atol=1e-3)
    same = CorrectionSums(x.T @ x, torch.zeros(12, 12, dtype=torch.float64), torch.zeros(7, 12, dtype=torch.float64))
    torch.testing.assert_close(same.target(weight), weight, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "plain"), [(tiny_models.llama, True), (tiny_models.opt, True), (tiny_models.gemma2, False)]
)
def test_residual_streams_are_found_by_trying(make: object, plain: bool) -> None:
    model = make().eval()  # type: ignore[operator]
    blocks = find_blocks(model)
    batch = capture(model, blocks, [TokenBatch(tiny_models.token_ids(2, 16), None)])[0]
    name, block = next(iter(blocks.items()))
    writers = {}
    for layer in find_layers(blocks):
        if layer.block == 0 and layer.role in ("output", "ffn_out"):
            writers[layer.name] = block.get_submodule(layer.name.removeprefix(f"{name}."))
    assert len(writers) == 2
    assert are_residual_writers(block, 0, batch, writers) is plain


def test_stages_follow_the_data_and_sums_are_those_of_the_inputs() -> None:
    model = tiny_models.llama()
    blocks = find_blocks(model)
    batch = capture(model, blocks, [TokenBatch(tiny_models.token_ids(2, 16), None)])[0]
    batch.compressed_twin = BlockBatch(batch.hidden + 0.1, batch.calls)
    name, block = next(iter(blocks.items()))
    layers = {}
    for layer in find_layers(blocks):
        if layer.block == 0:
            name_in_block = layer.name.removeprefix(f"{name}.")
            layers[name_in_block] = block.get_submodule(name_in_block)
    order = [{name.rpartition(".")[2] for name in stage} for stage in input_stages(block, 0, batch, layers)]
    assert order == [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
    dense = DenseReference(
        copy.deepcopy(block), 0, [batch], ["self_attn.q_proj", "mlp.down_proj"], output_of="mlp.down_proj"
    )
    sums = correction_sums(dense, block, 0, [batch], ["self_attn.q_proj"], None)
    assert sums is not None
    norm = block.get_submodule("input_layernorm")
    x = norm(batch.hidden).flatten(0, 1).double()
    x_hat = norm(batch.compressed_twin.hidden).flatten(0, 1).double()
    torch.testing.assert_close(sums.gram, x_hat.T @ x_hat, rtol=1e-5, atol=1e-4)  # float32 products
    torch.testing.assert_close(sums.difference, (x - x_hat).T @ x_hat, rtol=1e-5, atol=1e-4)
    output = correction_sums(dense, block, 0, [batch], ["mlp.down_proj"], "output")
    assert output is not None
    assert output.residual is not None
