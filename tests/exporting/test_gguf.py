"""GGUF files hold the values of the checkpoint, as llama.cpp's own Python package reads them.

llama.cpp itself opens such files in `tests/serving/engine`.
"""

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_lowrank import CompressionConfig, CompressionError, cli, compress, export
from hf_lowrank.exporting.gguf_blocks import blocks_of
from hf_lowrank.exporting.gguf_families import ARCHITECTURES, row_order
from hf_lowrank.exporting.gguf_tokenizer import SPLITS
from hf_lowrank.exporting.integers import integers_of
from hf_lowrank.runtime.layers import SparseLowRankLinear
from hf_lowrank.runtime.quantization import BITS, quantize
from tests.support import tiny_models

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
EXACT_BITS = BITS[:-1]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return byte pair encoding of bytes, cut as by GPT-2."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator(tiny_models.text(4), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template="{{ 1 }}"
    )


def piece_tokenizer() -> PreTrainedTokenizerFast:
    """Return byte pair encoding of characters as SentencePiece's, with bytes as the last resort."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdeht",
        "he",
        "the",
        "▁the",
    ]
    merges = [("h", "e"), ("t", "he"), ("▁", "the")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def build(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """Return a model of one of transformers' types, compressed to 4 bits, with norms and biases of random values."""
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**{**SIZES, "query_pre_attn_scalar": 16, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) / 10
    recipe = CompressionConfig(method="rtn", options={"bits": 4}, samples=2, sequence_length=8)
    return compress(model, recipe, calibration=[tiny_models.token_ids(2, 8)], progress=False)


def saved(model: PreTrainedModel, folder: Path, tokenizer: Any = None) -> Path:
    model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """Return the values, the types and the metadata of a file."""
    reader = GGUFReader(file)
    values = {
        tensor.name: torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        for tensor in reader.tensors
    }
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    return values, types, {key: field.contents() for key, field in reader.fields.items()}


@pytest.mark.parametrize("group", [32, 64, 200])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("exact", [False, True])
def test_blocks_have_the_values_of_the_layer_but_for_the_error_that_they_name(
    bits: int, group: int, exact: bool
) -> None:
    weight = torch.randn(7, 192, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 30
    quantized = quantize(weight, bits, group)
    layer = SparseLowRankLinear.from_parts(192, 7, "full", quantized, dtype=torch.float32)
    integers = integers_of(layer)
    assert integers is not None
    blocks = blocks_of(integers, exact)
    assert blocks is not None
    found = torch.from_numpy(gguf.dequantize(blocks.data, blocks.type)).double()
    distance = layer.weight_scale.double().repeat_interleave(group, dim=1)[:, :192]
    error = float(((found - layer.to_dense(torch.float64)) / distance.detach()).abs().max())
    assert error == pytest.approx(blocks.error, abs=1e-5)
    assert blocks.error == 0 or (bits in (4, 5) and not exact and error < 0.01) or (bits == 8 and error < 0.6)


@pytest.mark.parametrize("columns", [48, 96], ids=["columns", "group"])
def test_what_does_not_fit_blocks_of_32_is_not_put_into_them(columns: int) -> None:
    weight = torch.randn(3, columns, dtype=torch.float64)
    layer = SparseLowRankLinear.from_parts(columns, 3, "full", quantize(weight, 4, 48), dtype=torch.float32)
    integers = integers_of(layer)
    assert integers is not None and blocks_of(integers) is None


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_tensor_of_a_family_has_its_value(kind: str, tmp_path: Path) -> None:
    folder = saved(build(kind), tmp_path / "model")
    result = export(folder, tmp_path / "model.gguf", "gguf", exact=True)
    assert {(layer.form, layer.loss) for layer in result.layers} == {("Q5_0", None)}
    values, types, metadata = read(tmp_path / "model.gguf")
    dense = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    config = dense.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[kind], 1)
    for name, tensor in dense.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        wanted = row_order(config, name)(tensor)
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            wanted = wanted + 1
        found = values.pop(names.get_name(name, try_suffixes=(".weight", ".bias")))
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert not values
    assert metadata["general.architecture"] == gguf.MODEL_ARCH_NAMES[ARCHITECTURES[kind]]
    assert set(types.values()) == {"Q5_0", "F32"}


def test_rows_are_put_into_pairs_of_neighbors() -> None:
    """The first half of a head turns with the second one in transformers, and every row with the next in llama.cpp."""
    config = transformers.LlamaConfig(**SIZES)
    rows = torch.arange(64)[:, None]
    ordered = row_order(config, "model.layers.0.self_attn.q_proj.weight")(rows).flatten().tolist()
    assert ordered[:4] == [0, 8, 1, 9] and ordered[16:18] == [16, 24] and sorted(ordered) == list(range(64))
    assert row_order(config, "model.layers.0.self_attn.v_proj.weight")(rows) is rows


def test_dtypes_and_the_type_asked_for_decide_on_dense_matrices(tmp_path: Path) -> None:
    folder = saved(build("llama", torch.bfloat16), tmp_path / "model")
    for asked, expected in (("auto", "BF16"), ("q8_0", "Q8_0"), ("f16", "F16")):
        export(folder, tmp_path / "model.gguf", "gguf", dense_type=asked, overwrite=True)
        _, types, _ = read(tmp_path / "model.gguf")
        assert types["token_embd.weight"] == expected
        assert types["blk.0.attn_norm.weight"] == "F32" and types["blk.0.attn_q.weight"] == "Q4_1"


def test_layers_that_no_type_holds_are_dense_and_said(tmp_path: Path) -> None:
    model = tiny_models.llama(num_hidden_layers=1)
    compress(model, CompressionConfig("slab", samples=2, sequence_length=8), calibration=[tiny_models.token_ids(2, 8)])
    folder = saved(model, tmp_path / "model")
    result = export(folder, tmp_path / "model.gguf", "gguf")
    assert {(layer.form, layer.loss) for layer in result.layers} == {
        ("dense, F32", "the format does not hold kept values and signs")
    }
    values, _, _ = read(tmp_path / "model.gguf")
    dense = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    assert torch.equal(values["blk.0.ffn_down.weight"], dense.model.layers[0].mlp.down_proj.weight)
    with pytest.raises(CompressionError, match="^--exact: gguf does not hold model"):
        export(folder, tmp_path / "exact.gguf", "gguf", exact=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "model.gguf"]


@pytest.mark.parametrize("make", [byte_tokenizer, piece_tokenizer])
def test_the_tokenizer_is_in_the_file(make: Any, tmp_path: Path) -> None:
    tokenizer = make()
    export(saved(build("llama"), tmp_path / "model", tokenizer), tmp_path / "model.gguf", "gguf")
    _, _, metadata = read(tmp_path / "model.gguf")
    tokens = metadata["tokenizer.ggml.tokens"]
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert len(tokens) == SIZES["vocab_size"] == len(metadata["tokenizer.ggml.token_type"])
    assert metadata["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    if make is byte_tokenizer:
        assert (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
        assert metadata["tokenizer.chat_template"] == "{{ 1 }}"
    else:
        scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
        assert metadata["tokenizer.ggml.model"] == "llama" and metadata["tokenizer.ggml.add_space_prefix"] is True
        assert scores["he"] > scores["the"] > scores["▁the"] > scores["a"]
        kinds = dict(zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True))
        assert kinds["<0x41>"] == gguf.TokenType.BYTE and kinds["<unk>"] == gguf.TokenType.UNKNOWN


@pytest.mark.parametrize(("pattern", "name"), SPLITS.items())
def test_known_patterns_have_llama_cpps_names(pattern: str, name: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    export(saved(build("llama"), tmp_path / "model", tokenizer), tmp_path / "model.gguf", "gguf")
    assert read(tmp_path / "model.gguf")[2]["tokenizer.ggml.pre"] == name


def test_rotation_of_llama_3_is_in_the_file(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model = build("llama", rope_parameters=rope)
    export(saved(model, tmp_path / "model"), tmp_path / "model.gguf", "gguf")
    factors = read(tmp_path / "model.gguf")[0]["rope_freqs.weight"]
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq, rtol=1e-5, atol=0)
    assert math.isclose(float(factors[0]), 1) and float(factors[-1]) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "gpt2"}, "gguf: models of type gpt2 are not exported"),
        ({"hidden_act": "relu"}, "llama.cpp does not compute this model's activation relu"),
        ({"tokenizer": tiny_models.tokenizer}, "tokenizer of type WordLevel: GGUF does not hold it"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
            "embedding of type dynamic",
        ),
    ],
    ids=["family", "activation", "tokenizer", "rotation"],
)
def test_what_llama_cpp_does_not_know_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    tokenizer = change.pop("tokenizer", byte_tokenizer)()
    if change.get("kind") == "gpt2":
        model = tiny_models.gpt2()
        compress(
            model, CompressionConfig("slab", samples=2, sequence_length=8), calibration=[tiny_models.token_ids(2, 8)]
        )
    else:
        model = build("llama", **change)
    folder = saved(model, tmp_path / "model", tokenizer)
    done = CliRunner().invoke(cli.app, ["export", str(folder), "--format", "gguf", "-o", str(tmp_path / "model.gguf")])
    assert done.exit_code == 1 and done.stderr.count("\n") == 1 and message in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_file_is_not_replaced_unless_asked_for(tmp_path: Path) -> None:
    folder = saved(build("llama"), tmp_path / "model")
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(CompressionError, match="model.gguf: exists; choose another name or add --overwrite"):
        export(folder, tmp_path / "model.gguf", "gguf")
    with pytest.raises(CompressionError, match="is a folder; name the file to write"):
        export(folder, tmp_path, "gguf")
    assert (tmp_path / "model.gguf").read_text() == "mine"
