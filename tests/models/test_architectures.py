"""Blocks, layers, roles and feed-forward networks are found by structure in every architecture."""

import pytest
import torch
from torch import nn

from hf_lowrank import CompressionConfig, CompressionError, compress
from hf_lowrank.models.architectures import (
    FeedForward,
    find_blocks,
    find_feed_forwards,
    find_layers,
    fused_experts,
    separate_experts,
)

from ..support import tiny_models
from ..support.model_families import FAMILIES

LLAMA = {
    "self_attn.q_proj": ("query", 32, 32),
    "self_attn.k_proj": ("key", 16, 32),
    "self_attn.v_proj": ("value", 16, 32),
    "self_attn.o_proj": ("output", 32, 32),
    "mlp.gate_proj": ("ffn_in", 80, 32),
    "mlp.up_proj": ("ffn_in", 80, 32),
    "mlp.down_proj": ("ffn_out", 32, 80),
}
GPT2 = {
    "attn.c_attn": ("other", 96, 32),
    "attn.c_proj": ("other", 32, 32),
    "mlp.c_fc": ("ffn_in", 128, 32),
    "mlp.c_proj": ("ffn_out", 32, 128),
}
OPT = {
    "self_attn.k_proj": ("key", 32, 32),
    "self_attn.v_proj": ("value", 32, 32),
    "self_attn.q_proj": ("query", 32, 32),
    "self_attn.out_proj": ("output", 32, 32),
    "fc1": ("ffn_in", 96, 32),
    "fc2": ("ffn_out", 32, 96),
}
MIXTRAL = {name: entry for name, entry in LLAMA.items() if name.startswith("self_attn")}

CASES = {
    "llama": (
        tiny_models.llama,
        "model.layers",
        4,
        LLAMA,
        [FeedForward(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")],
    ),
    "gpt2": (tiny_models.gpt2, "transformer.h", 3, GPT2, [FeedForward(("mlp.c_fc",), "mlp.c_proj")]),
    "opt": (tiny_models.opt, "model.decoder.layers", 2, OPT, [FeedForward(("fc1",), "fc2")]),
    "mixtral": (tiny_models.mixtral, "model.layers", 2, MIXTRAL, []),
}


@pytest.mark.parametrize("name", CASES)
def test_blocks_layers_roles_and_networks(name: str) -> None:
    make, path, count, expected, networks = CASES[name]
    model = make()
    blocks = find_blocks(model)
    assert list(blocks) == [f"{path}.{i}" for i in range(count)]
    layers = find_layers(blocks)
    for block in range(count):
        roles_and_shapes = {}
        for layer in layers:
            if layer.block == block:
                name_in_block = layer.name.removeprefix(f"{path}.{block}.")
                roles_and_shapes[name_in_block] = (layer.role, layer.out_features, layer.in_features)
                assert layer.blocks == count
        assert roles_and_shapes == expected
    for block in blocks.values():
        assert find_feed_forwards(block) == networks


@pytest.mark.parametrize("name", CASES)
def test_layers_are_in_the_order_of_the_blocks_and_unique(name: str) -> None:
    layers = find_layers(find_blocks(CASES[name][0]()))
    assert [layer.block for layer in layers] == sorted(layer.block for layer in layers)
    assert len({layer.name for layer in layers}) == len(layers)


def test_embeddings_and_head_are_never_layers() -> None:
    for make, *_ in CASES.values():
        model = make()
        outside = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
        assert not outside & {id(model.get_submodule(layer.name)) for layer in find_layers(find_blocks(model))}


def test_fused_experts_that_stay_so_are_found_and_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    family = FAMILIES["GPT-OSS"]
    model = family.make()
    blocks = find_blocks(model)
    assert separate_experts(blocks) == {}
    experts = fused_experts(model, blocks)
    assert sum(experts.values()) == 2 * 4 * 3 * 32 * 80  # blocks, experts, matrices
    assert fused_experts(tiny_models.llama(), find_blocks(tiny_models.llama())) == {}
    compressed = compress(model, CompressionConfig(method="svd", ratio=0.3), calibration=family.batches())
    warnings = compressed.save_pretrained.report["warnings"]
    assert any("fused expert" in warning and next(iter(experts)) in warning for warning in warnings)
    assert any("fused expert" in record.getMessage() for record in caplog.records)
    for name, parameter in model.named_parameters():
        if name in experts:
            assert torch.equal(parameter, family.make().get_parameter(name))


def test_separated_experts_are_layers_with_networks_of_their_own() -> None:
    blocks = find_blocks(tiny_models.mixtral())
    assert list(separate_experts(blocks)) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert separate_experts(blocks) == {}
    roles = {}
    for layer in find_layers(blocks):
        if layer.block == 1:
            name_in_block = layer.name.removeprefix("model.layers.1.")
            roles[name_in_block] = (layer.role, layer.out_features, layer.in_features)
    experts = {f"mlp.experts.{index}.gate_up": ("other", 128, 32) for index in range(4)}
    experts |= {f"mlp.experts.{index}.down": ("ffn_out", 32, 64) for index in range(4)}
    assert roles == MIXTRAL | experts
    networks = [
        FeedForward((f"mlp.experts.{index}.gate_up",), f"mlp.experts.{index}.down", fused=True) for index in range(4)
    ]
    assert find_feed_forwards(blocks["model.layers.1"]) == networks


def test_a_model_without_blocks_is_an_error() -> None:
    model = tiny_models.llama()
    model.model.layers = nn.ModuleList()
    with pytest.raises(CompressionError, match="LlamaForCausalLM: found no list of blocks"):
        find_blocks(model)


def test_a_square_feed_forward_network_is_not_guessed() -> None:
    """With f = d its matrices cannot be told apart, so that its neurons are not permuted.

    The layers themselves are found.
    """
    model = tiny_models.llama(intermediate_size=32)
    blocks = find_blocks(model)
    assert find_feed_forwards(next(iter(blocks.values()))) == []
    assert len(find_layers(blocks)) == 28
