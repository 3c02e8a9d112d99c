"""Compressed embeddings: rows and head compute with the same dequantized values, stay tied, and go where the model
goes."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedModel,
)
from transformers.models.m2m_100.modeling_m2m_100 import M2M100ScaledWordEmbedding

from hf_lowrank import CheckpointError, CompressionConfig, CompressionError, LayerSpec, compress, inspect, verify
from hf_lowrank.compression.embeddings import CHOICES, find_embeddings
from hf_lowrank.compression.planning import make_plan
from hf_lowrank.execution.files import files_size
from hf_lowrank.methods import make_method
from hf_lowrank.models.architectures import find_blocks
from hf_lowrank.runtime.embeddings import CompressedEmbedding, TiedHead, compress_embedding, is_embedding
from hf_lowrank.runtime.quantization import BITS, quantize

from ..support import tiny_models
from ..support.fresh_process import INPUT_IDS

IDS = torch.tensor(INPUT_IDS)


def gemma(tied: bool = True) -> PreTrainedModel:
    """Build a model whose embeddings multiply their rows by a number."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
        config = Gemma3TextConfig(
            vocab_size=99,
            num_hidden_layers=1,
            head_dim=16,
            tie_word_embeddings=tied,
            max_position_embeddings=64,
            **sizes,
        )
        return Gemma3ForCausalLM(config).eval()


def bert() -> PreTrainedModel:
    """Build a model whose head has a bias, which is tied as well."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
        return BertForMaskedLM(BertConfig(vocab_size=99, max_position_embeddings=64, **sizes)).eval()


MODELS = {
    "untied": lambda: tiny_models.llama(num_hidden_layers=1),
    "tied": lambda: tiny_models.llama(num_hidden_layers=1, tie_word_embeddings=True),
    "scaled": gemma,
    "scaled, untied": lambda: gemma(tied=False),
    "conv1d": tiny_models.gpt2,
    "experts": tiny_models.mixtral,
    "bias": bert,
}


def compressed(name: str, bits: int = 8) -> PreTrainedModel:
    """Compress a model with its embeddings."""
    recipe = CompressionConfig("rtn", ratio=0.75, embeddings=bits)
    return compress(MODELS[name](), recipe, calibration=INPUT_IDS, progress=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_compressed_embeddings_lives_as_any_other(name: str, tmp_path: Path) -> None:
    """It computes what the dense model of the same values computes, and is that model again wherever it goes."""
    dense, model = MODELS[name](), compressed(name)
    found = find_embeddings(dense)
    expected = model(IDS).logits
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    reopened = type(model).from_pretrained(folder)
    again = tmp_path / "again"
    reopened.save_pretrained(again)
    reopened.tie_weights()  # as programs do that change a model
    copies = {
        "reopened": reopened,
        "saved again": type(model).from_pretrained(again),
        "copied": copy.deepcopy(model),
        "pickled": pickle.loads(pickle.dumps(model)),
    }
    for how, other in copies.items():
        table, head = other.get_input_embeddings(), other.get_output_embeddings()
        assert torch.equal(other(IDS).logits, expected), how
        assert isinstance(table, CompressedEmbedding) and isinstance(head, TiedHead) == bool(found.tied), how
        assert not found.tied or vars(head)["embedding"] is table, how
    assert verify(folder).sound
    stored = inspect(folder)
    weights = [dense.get_submodule(name).weight for name in found.own_weights]
    biases = [dense.get_submodule(name).bias for name in [found.head, *found.tied] if name and found.head == name]
    assert stored.dense_embedding_bytes == 4 * sum(tensor.numel() for tensor in [*weights, *filter(None, biases)])
    assert 0.25 < stored.embedding_bytes / stored.dense_embedding_bytes < 0.3
    assert stored.model_bytes == model.compression_report["model_bytes"]
    reopened.dequantize()
    torch.testing.assert_close(reopened(IDS).logits, expected)
    head = reopened.get_output_embeddings()
    assert type(reopened.get_input_embeddings()) is type(dense.get_input_embeddings())
    assert (head.weight is reopened.get_input_embeddings().weight) == bool(found.tied)
    reopened.save_pretrained(tmp_path / "dense")
    assert torch.equal(type(model).from_pretrained(tmp_path / "dense")(IDS).logits, reopened(IDS).logits)


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    bits=st.sampled_from(BITS),
    group=st.integers(1, 80),
    tied=st.booleans(),
)
@settings(deadline=None, max_examples=30)
def test_rows_and_head_are_those_of_the_dequantized_matrix(
    rows: int, columns: int, bits: int, group: int, tied: bool
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(rows, columns, dtype=torch.float64)
            self.head = nn.Linear(columns, rows, bias=False, dtype=torch.float64)
            self.head.weight = self.table.weight

    model = Model()
    quantized = quantize(model.table.weight.detach(), bits, group)
    heads = {"head": model.head} if tied else {}
    spec = LayerSpec(sparse="full", weight_bits=bits, weight_group=group)
    compress_embedding(model, "table", spec, heads).store(quantized)
    values = quantized.dequantize()
    ids = torch.arange(rows).view(1, rows, 1)
    assert torch.equal(model.table(ids)[0, :, 0], values) and torch.equal(model.table.to_dense(), values)
    assert model.table(ids[:, :0]).shape == (1, 0, 1, columns)
    with pytest.raises(IndexError):
        model.table(torch.tensor([-1]))
    if tied:
        x = torch.randn(3, columns, dtype=torch.float64, requires_grad=True)
        torch.testing.assert_close(model.head(x), x @ values.T)
        # Gradients reach the scales from both sides.
        (model.head(x).sum() + model.table(ids).sum()).backward()
        dense = values.clone().requires_grad_(True)
        ((x @ dense.T).sum() + dense.sum()).backward()
        assert x.grad is not None and dense.grad is not None
        levels = torch.where(quantized.scale.repeat_interleave(group, 1)[:, :columns] == 0, 0, values)
        grad = (model.table.weight_scale.grad * quantized.scale).sum()
        torch.testing.assert_close(grad, (dense.grad * levels).sum())
    assert [*dict(model.named_parameters())] == (
        ["table.weight_scale"] if tied else ["table.weight_scale", "head.weight"]
    )


def test_embeddings_that_scale_are_those_that_are_known() -> None:
    """What such a class computes is its rows, times its number."""
    ids = torch.tensor([[1, 3], [0, 2]])
    for table in (gemma().get_input_embeddings(), M2M100ScaledWordEmbedding(4, 8, 1, embed_scale=2.5)):
        assert is_embedding(table)
        holder = nn.ModuleDict({"table": copy.deepcopy(table)})
        spec = LayerSpec(sparse="full", weight_bits=8, weight_group=8)
        stored = compress_embedding(holder, "table", spec, {})
        stored.store(quantize(table.weight.detach(), 8, 8))
        table.weight = nn.Parameter(stored.to_dense())
        assert torch.equal(stored(ids), table(ids)) and torch.equal(stored.to_module(table.weight)(ids), table(ids))

    class Other(nn.Embedding):
        pass

    assert not is_embedding(Other(3, 4)) and not is_embedding(nn.Embedding(3, 4, max_norm=1.0))


def test_tokens_are_added_to_the_dense_model_or_not_at_all() -> None:
    for name in ("tied", "untied"):
        model = compressed(name)
        rows = model.get_input_embeddings().num_embeddings
        for same in ({}, {"new_num_tokens": rows}, {"pad_to_multiple_of": 11}):
            assert model.resize_token_embeddings(**same) is model.get_input_embeddings()
        with pytest.raises(
            CompressionError, match=f"have {rows} rows and keep them, {rows + 5} were asked for"
        ) as raised:
            model.resize_token_embeddings(rows + 5)
        assert "\n" not in str(raised.value)
        model.dequantize()
        model.resize_token_embeddings(rows + 5, mean_resizing=False)
        assert model(IDS).logits.shape[-1] == rows + 5


def test_the_base_model_has_the_same_embeddings(tmp_path: Path) -> None:
    for name in ("tied", "untied"):
        model = compressed(name)
        model.save_pretrained(tmp_path / name)
        base = AutoModel.from_pretrained(tmp_path / name)
        assert isinstance(base.embed_tokens, CompressedEmbedding)
        assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_a_head_without_its_rows_says_so(tmp_path: Path) -> None:
    compressed("tied").save_pretrained(tmp_path / "saved")
    places = {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", device_map={**places, "model.rotary_emb": "cpu"}, offload_folder=tmp_path / "offloaded"
    )
    with pytest.raises(CompressionError, match="give both the same device in device_map"):
        model(IDS)


def test_models_export_and_compile() -> None:
    model = compressed("tied")
    model.config.use_cache = False
    expected = model(IDS).logits
    program = torch.export.export(model, (IDS,), strict=False)
    torch.testing.assert_close(program.module()(IDS).logits, expected)
    for module, x in ((model.model.embed_tokens, IDS), (model.lm_head, model.model(IDS).last_hidden_state)):
        assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x), module(x))


def test_other_uses_of_the_rows_are_refused_in_one_line() -> None:
    sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_layers": 1, "decoder_layers": 1}
    bart = BartForConditionalGeneration(
        BartConfig(vocab_size=99, encoder_attention_heads=2, decoder_attention_heads=2, **sizes)
    )
    rows = [{"input_ids": IDS, "decoder_input_ids": IDS}]
    with pytest.raises(CompressionError, match="stay dense; .*more uses than embeddings and head") as raised:
        compress(bart, CompressionConfig("rtn", embeddings=True), calibration=rows, progress=False)
    assert "\n" not in str(raised.value)
    for wrong in (1, 9, "8", 8.5, [8]):
        with pytest.raises(CompressionError, match=r"^embeddings: found .*, expected true, false, or bits"):
            CompressionConfig(embeddings=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"sparse": "none", "weight_bits": 0, "weight_group": 0},
        {"rank": 1},
        {"weight_bits": 9},
        {"bias": True},
        {"kind": "sparse_lowrank_binary", "binary_rank": 1},
    ],
)
def test_a_config_that_says_something_else_of_embeddings_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    compressed("tied").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = AutoConfig.from_pretrained(tmp_path)
    config.quantization_config["layers"]["model.embed_tokens"] |= change
    file.unlink()
    config.auto_map = {"AutoConfig": "modeling_hf_lowrank.CompressedAutoConfig"}
    file.write_text(config.to_json_string(use_diff=False))
    with pytest.raises(CheckpointError):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_size_takes_embeddings_where_it_needs_them(tied: bool, tmp_path: Path) -> None:
    """From large to small files, embeddings take fewer bits, and every size that is within reach is met."""

    def model() -> PreTrainedModel:
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "tie_word_embeddings": tied}
        return tiny_models.llama(dtype=torch.bfloat16, **sizes)

    taken = []
    for share in (0.95, 0.6, 0.5, 0.3):
        size = int(share * sum(tensor.numel() * 2 for tensor in model().parameters())) + 5000
        recipe = CompressionConfig("wanda" if share > 0.4 else "rtn", size=size)
        made = make_plan(model(), recipe, make_method(recipe.method, {}), find_blocks(model()), {})
        small = compress(model(), recipe, calibration=INPUT_IDS, progress=False)
        small.save_pretrained(tmp_path / str(share))
        assert 0.96 * size <= files_size(tmp_path / str(share)) <= size
        taken.append(made.embeddings)
        recorded = small.config.quantization_config
        assert recorded.embeddings == (made.embeddings or None)
        assert (find_embeddings(model()).name in recorded.layers) == bool(made.embeddings)
    assert taken[0] == 0 and taken == sorted(taken, key=lambda bits: bits or 16, reverse=True)
    assert set(taken) <= set(CHOICES) and len(set(taken)) > 1
    # A ratio and bits speak of the blocks.
    for target in ({"ratio": 0.9}, {"bits": 1.5}):
        recipe = CompressionConfig("wanda", **target)
        assert make_plan(model(), recipe, make_method("wanda", {}), find_blocks(model()), {}).embeddings == 0
