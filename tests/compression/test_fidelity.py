"""A compressed model keeps what it must keep, and its report says how far its layers are from the dense ones."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_lowrank import SparseLowRankLinear, compress
from hf_lowrank.budget import Budget
from hf_lowrank.methods import Decomposition, Method, Statistics, method_class
from hf_lowrank.methods.spectral import factorize
from hf_lowrank.models.architectures import find_blocks, find_layers
from hf_lowrank.models.linears import permute_inputs, permute_outputs

from ..support import tiny_models
from .recipes import IDS, MODELS, config


@pytest.mark.parametrize("method", ["svd", "svd-llm", "slab"])
@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_biases_are_kept_bit_for_bit(name: str, method: str) -> None:
    dense = MODELS[name]()
    model = compress(MODELS[name](), config(method), calibration=IDS)
    for entry in model.compression_report["layers"]:
        assert torch.equal(model.get_submodule(entry["name"]).bias, dense.get_submodule(entry["name"]).bias)


def first_block_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the inputs (T, n), float64, of the linear layers of the first block for the calibration tokens."""
    inputs_of_layers: dict[str, Tensor] = {}
    for layer in find_layers(find_blocks(model)):
        if layer.block == 0:

            def record(module: nn.Module, inputs: tuple[Tensor, ...], name: str = layer.name) -> None:
                inputs_of_layers[name] = inputs[0].flatten(0, -2).double()

            model.get_submodule(layer.name).register_forward_pre_hook(record)
    with torch.no_grad():
        model(torch.tensor(IDS))
    return inputs_of_layers


@pytest.mark.parametrize("method", ["svd", "svd-llm"])
@pytest.mark.parametrize("name", MODELS)
def test_the_reported_error_is_the_error_on_the_calibration_tokens(name: str, method: str) -> None:
    """The law is tried in the first block, as no compression changes its inputs.

    With whitened truncation (SVD-LLM), the square of the error is also the share of the energy in the singular values
    that are cut.
    """
    dense = MODELS[name](dtype=torch.float64)
    inputs = first_block_inputs(dense)
    model = compress(MODELS[name](dtype=torch.float64), config(method), calibration=IDS)
    report = {entry["name"]: entry for entry in model.compression_report["layers"]}
    for layer, x in inputs.items():
        module, compressed = dense.get_submodule(layer), model.get_submodule(layer)
        weight = (module.weight.T if name == "gpt2" else module.weight).detach().double()
        difference = weight - compressed.to_dense()
        if method == "svd-llm":
            error = float((difference @ x.T).norm() / (weight @ x.T).norm())
            assert report[layer]["metric"] == "gram"
            energies = factorize(weight, x.T @ x).sigma.square()
            assert error**2 == pytest.approx(float(energies[compressed.spec.rank :].sum() / energies.sum()), rel=1e-6)
        else:
            assert report[layer]["metric"] == "column_norms"
            error = float((difference * x.norm(dim=0)).norm() / (weight * x.norm(dim=0)).norm())
        assert report[layer]["relative_error"] == pytest.approx(error, rel=1e-6)


FEED_FORWARDS = {
    "llama": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "gpt2": ("mlp.c_fc", "mlp.c_proj"),
    "opt": ("fc1", "fc2"),
}
"""The layers of a feed-forward network. The last one reads the neurons."""


@pytest.mark.parametrize("name", MODELS)
def test_permuted_neurons_leave_the_function_unchanged(name: str) -> None:
    model = MODELS[name](dtype=torch.float64)
    ids = torch.tensor(IDS)
    with torch.no_grad():
        before = model(ids).logits
        for block in find_blocks(model).values():
            *inputs, output = (block.get_submodule(part) for part in FEED_FORWARDS[name])
            neurons = output.weight.shape[0 if name == "gpt2" else 1]  # `Conv1D` stores (in, out)
            order = torch.randperm(neurons, generator=torch.Generator().manual_seed(3))
            for module in inputs:
                permute_outputs(module, order)
            permute_inputs(output, order)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-12, atol=1e-12)


def test_prime_neurons_of_sola_are_kept_bit_for_bit() -> None:
    dense, model = tiny_models.llama(), compress(tiny_models.llama(), config("sola", 0.3), calibration=IDS)
    checked = 0
    for block in range(4):
        network = model.get_submodule(f"model.layers.{block}.mlp")
        dense_network = dense.get_submodule(f"model.layers.{block}.mlp")
        if not isinstance(network.down_proj, SparseLowRankLinear):
            continue
        # The prime neurons are known by the columns that the output matrix keeps.
        columns = dense_network.down_proj.weight
        neurons = [int((columns == kept[:, None]).all(dim=0).nonzero()) for kept in network.down_proj.weight.T]
        assert neurons == sorted(set(neurons))  # each once, in the order of the model
        assert len(neurons) == int(0.15 * 80)  # the default share of prime neurons
        for name in ("gate_proj", "up_proj"):
            layer = network.get_submodule(name)
            if isinstance(layer, SparseLowRankLinear):
                assert torch.equal(layer.weight, dense_network.get_submodule(name).weight[neurons])
        checked += 1
    assert checked


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_neurons_prime_reproduce_the_dense_network(dtype: torch.dtype) -> None:
    dense = tiny_models.llama(dtype=dtype, num_key_value_heads=4)
    recipe = config("sola", 0.05, options={"prime_share": 1.0, "skip_blocks": 0})
    model = compress(copy.deepcopy(dense), recipe, calibration=IDS)
    x = torch.randn(5, 7, 32, dtype=dtype, generator=torch.Generator().manual_seed(0))
    tolerance = {"rtol": 0, "atol": 1e-6 if dtype == torch.float32 else 1e-14}
    with torch.no_grad():
        for block in range(4):
            torch.testing.assert_close(model.model.layers[block].mlp(x), dense.model.layers[block].mlp(x), **tolerance)


@pytest.mark.parametrize("method", ["slab", "svd-llm"])
def test_sequential_methods_see_the_compressed_blocks_before_them(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The query projection of a block reads what the blocks before it give.

    These blocks are the compressed ones for `slab`, and the dense ones for `svd-llm`, which is not sequential.
    """
    recorded: list[Statistics] = []
    usual = method_class(method).decompose

    def recording(self: Method, weight: Tensor, statistics: Statistics, budget: Budget) -> Decomposition:
        recorded.append(statistics)
        return usual(self, weight, statistics, budget)

    monkeypatch.setattr(method_class(method), "decompose", recording)
    # One layer after the other, so that the statistics come in the order of the layers.
    monkeypatch.setattr("hf_lowrank.compression.solving.parallel_slots", lambda working_memory: 1)
    model = compress(tiny_models.llama(), config(method), calibration=IDS)
    queries = recorded[::7]  # the query projection is the first of the seven layers of a block
    source = model if method == "slab" else tiny_models.llama()
    norms: list[Tensor] = []

    def record_norms(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        norms.append(inputs[0].detach().flatten(0, -2).double().norm(dim=0))

    for block in source.model.layers:
        block.self_attn.q_proj.register_forward_pre_hook(record_norms)
    with torch.no_grad():
        source(torch.tensor(IDS))
    for statistics, norm in zip(queries, norms, strict=True):
        torch.testing.assert_close(statistics.column_norms, norm, rtol=1e-5, atol=1e-5)
