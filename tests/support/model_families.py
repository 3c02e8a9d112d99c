"""Builds one tiny random model per family, with what makes the family special.

Run as a module, this file prints docs/models.md.
"""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_lowrank.models.architectures import (
    FeedForward,
    find_blocks,
    find_feed_forwards,
    find_layers,
    fused_experts,
    separate_experts,
)

VOCABULARY = 64
LENGTH = 12
"""Number of tokens of a text."""
PICTURE_TOKEN = 63
"""The token that stands for a patch of a picture. Texts do not use it."""

Batches = list[dict[str, Tensor]]
"""Calibration batches: the arguments that a model is called with."""


def text(rows: int = 4, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Return random token ids, (rows, length)."""
    return torch.randint(3, PICTURE_TOKEN, (rows, length), generator=torch.Generator().manual_seed(seed))


def texts() -> Batches:
    """Return two batches, one of them padded."""
    mask = torch.ones(4, LENGTH, dtype=torch.long)
    mask[1, 7:] = 0
    return [{"input_ids": text(4), "attention_mask": mask}, {"input_ids": text(2, seed=1)}]


def pairs_of_texts() -> Batches:
    """Return padded texts for the encoder, and others of the same length for the decoder that are padded elsewhere.

    Only their masks tell them apart.
    """
    encoder_mask, decoder_mask = torch.ones(2, 4, LENGTH, dtype=torch.long)
    encoder_mask[1, 7:] = 0
    decoder_mask[2, 4:] = 0
    return [
        {
            "input_ids": text(4),
            "attention_mask": encoder_mask,
            "decoder_input_ids": text(4, seed=1),
            "decoder_attention_mask": decoder_mask,
        }
    ]


def sounds_and_texts() -> Batches:
    sounds = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    return [{"input_features": sounds, "decoder_input_ids": text(2, 9)}]


def pictures() -> Batches:
    return [{"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))}]


def pictures_in_texts() -> Batches:
    """Return texts that hold a picture of 16 patches each."""
    (picture,) = pictures()
    patches = torch.full((3, 16), PICTURE_TOKEN)
    return [{"input_ids": torch.cat([text(3, 3), patches, text(3, 9, seed=1)], dim=1), **picture}]


@dataclass(frozen=True)
class Family:
    """Says how to build the model of a family, what it is calibrated on, and what users should know about it.

    Attributes:
        model: name of the class in transformers.
        config: fields of its config.
        note: what is special, for users.
        batches: makes its calibration batches.
        outside: ends of the names of those weights of the blocks that belong to no linear layer.
    """

    model: str
    config: dict[str, Any]
    note: str = ""
    batches: Callable[[], Batches] = texts
    outside: tuple[str, ...] = ()

    def make(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """Build the model, with the same weights at every call.

        Biases and norms are random too, so that nothing that they do can hide.
        """
        cls = getattr(transformers, self.model)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: PreTrainedModel = cls(cls.config_class(**{**COMMON, **self.config})).eval()
            for parameter in model.parameters():
                if parameter.dim() == 1:  # biases and norms start at zero and one
                    parameter.data += 0.1 * torch.randn_like(parameter)
        return model.to(dtype)


COMMON = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}
SIZES = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
DEEPSEEK = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
T5 = {"d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 1,
}
WHISPER = {
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 32,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
PICTURE = {"image_size": 16, "patch_size": 4}
LLAVA = {
    "vision_config": {"model_type": "clip_vision_model", **SIZES, **PICTURE, "projection_dim": 32},
    "text_config": {"model_type": "llama", **GROUPED, **COMMON},
    "image_token_index": PICTURE_TOKEN,
    "image_seq_length": 16,
    "vision_feature_layer": -1,
}

EXPERTS = "each expert is compressed by itself"
SHARED_EXPERTS = f"{EXPERTS}, and so are the shared experts"
FUSED_EXPERTS = "the experts are one tensor and stay dense, as the report warns; attention is compressed"
ROUTER = (".gate.weight",)
SHIFTED_TEXT = "without `decoder_input_ids` or `labels` the decoder reads the text itself"
BIAS_TABLE = ("relative_attention_bias.weight",)

FAMILIES = {
    "Llama": Family("LlamaForCausalLM", GROUPED),
    "Mistral": Family("MistralForCausalLM", {**GROUPED, "sliding_window": 8}),
    "Qwen2, Qwen2.5": Family("Qwen2ForCausalLM", GROUPED),
    "Qwen3": Family("Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}),
    "Gemma 2": Family("Gemma2ForCausalLM", {**GROUPED, "head_dim": 8, "sliding_window": 8}),
    "Gemma 3": Family("Gemma3ForCausalLM", {**GROUPED, "head_dim": 8, "sliding_window": 8}),
    "Phi-3": Family("Phi3ForCausalLM", GROUPED),
    "OPT": Family("OPTForCausalLM", {**SIZES, "ffn_dim": 80, "word_embed_proj_dim": 32}),
    "GPT-NeoX, Pythia": Family("GPTNeoXForCausalLM", SIZES),
    "GPT-2": Family("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "Falcon": Family(
        "FalconForCausalLM", {**SIZES, "ffn_hidden_size": 80, "alibi": False}, "its own class of linear layer"
    ),
    "OLMo 2": Family("Olmo2ForCausalLM", GROUPED),
    "SmolLM3": Family("SmolLM3ForCausalLM", GROUPED),
    "Cohere": Family("CohereForCausalLM", GROUPED, "attention and feed-forward network read the same input"),
    "StarCoder 2": Family("Starcoder2ForCausalLM", GROUPED),
    "BitNet": Family(
        "BitNetForCausalLM", GROUPED, "a norm over the neurons: SoLA compresses them as they lie, without prime ones"
    ),
    "Mixtral": Family("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}, EXPERTS, outside=ROUTER),
    "Qwen2-MoE": Family(
        "Qwen2MoeForCausalLM",
        {**GROUPED, **MIXTURE, "shared_expert_intermediate_size": 48},
        f"{EXPERTS}, and so is the shared one; its gate stays dense",
        outside=ROUTER,
    ),
    "Qwen3-MoE": Family("Qwen3MoeForCausalLM", {**GROUPED, **MIXTURE, "head_dim": 8}, EXPERTS, outside=ROUTER),
    "OLMoE": Family("OlmoeForCausalLM", {**GROUPED, **MIXTURE}, EXPERTS, outside=ROUTER),
    "GPT-OSS": Family(
        "GptOssForCausalLM",
        {**GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
        FUSED_EXPERTS,
        outside=(".router.weight", "_proj_bias"),
    ),
    "DeepSeek-V2": Family("DeepseekV2ForCausalLM", {**SIZES, **LATENT, **DEEPSEEK}, SHARED_EXPERTS, outside=ROUTER),
    "DeepSeek-V3": Family(
        "DeepseekV3ForCausalLM",
        {**SIZES, **LATENT, **DEEPSEEK, "n_group": 2, "topk_group": 1},
        SHARED_EXPERTS,
        outside=ROUTER,
    ),
    "BERT": Family("BertForMaskedLM", SIZES),
    "RoBERTa": Family("RobertaForMaskedLM", SIZES),
    "ModernBERT": Family(
        "ModernBertForMaskedLM",
        {**SIZES, "num_hidden_layers": 3, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "T5": Family("T5ForConditionalGeneration", {**T5, "d_ff": 64}, SHIFTED_TEXT, pairs_of_texts, BIAS_TABLE),
    "T5 1.1, FLAN-T5": Family(
        "T5ForConditionalGeneration",
        {**T5, "d_ff": 80, "feed_forward_proj": "gated-gelu"},
        SHIFTED_TEXT,
        pairs_of_texts,
        BIAS_TABLE,
    ),
    "BART": Family("BartForConditionalGeneration", BART, SHIFTED_TEXT, pairs_of_texts),
    "Whisper": Family("WhisperForConditionalGeneration", {**BART, **WHISPER}, "encoder and decoder", sounds_and_texts),
    "ViT": Family("ViTForImageClassification", {**SIZES, **PICTURE}, "", pictures),
    "LLaVA": Family(
        "LlavaForConditionalGeneration",
        LLAVA,
        "both towers; with texts alone the vision tower stays dense, and says so",
        pictures_in_texts,
    ),
}

READS = {
    texts: "texts",
    pairs_of_texts: "texts, or pairs",
    sounds_and_texts: "`input_features` and texts",
    pictures: "`pixel_values`",
    pictures_in_texts: "texts, with or without `pixel_values`",
}

INTRODUCTION = """# Models

Any Transformers model works whose blocks are a list of modules with `nn.Linear` or `Conv1D` layers. Blocks, layers and
feed-forward networks are found by structure (`hf_lowrank/models/architectures.py`). For each family below a small
model is compressed, saved, opened again and run in `tests/models/test_model_families.py`, from which this page is made
(`python -m tests.support.model_families > docs/models.md`). [Model classes](model_classes.md) lists what came
of other classes that the Auto classes of Transformers know.

| family | class | layers of a block | feed-forward | calibrated on | note |
|---|---|---|---|---|---|
"""
REMARKS = """
- *Fused* feed-forward networks hold gate and up in one matrix. SoLA permutes both halves alike and keeps the prime
  columns of the output matrix. The fused matrix itself gets low rank alone, as its prime rows lie in two places.
- *Experts* that Transformers keeps in two tensors are compressed one by one where that computes the same, which is
  tried out. Others (GPT-OSS: transposed, with biases) stay dense, and the report says so. An expert is calibrated on
  the tokens that come to it. The report counts the experts that see fewer tokens than they have inputs, and those that
  see none, which are compressed without data. Products run expert by expert, not in one grouped kernel. The family's
  own names are what `hf-lowrank dense` writes.
- Models of texts are calibrated on the bundled text if nothing is named. Only models that generate from a text alone
  calibrate on themselves. The others say so and want data.
- `soco`, `fwsvd`, `lowrank`, `slab-gram` and `auto` learn from the loss of the next token, and refuse models without
  one.
- Calibration is whatever `forward` takes. A model of texts is calibrated on texts. For models of sounds, pictures or
  both, give batches of tensors as the processor makes them: `calibration=[{"input_values": ...}, ...]` for Wav2Vec2,
  `input_features` for Whisper, `pixel_values` for ViT, `input_ids` and `pixel_values` for CLIP. Names and shapes are
  those of the model's own `forward`: MusicGen's `input_ids` hold a row for each of its codebooks, which stay together.
  What a model cannot be given is said in one line before any work.
- Blocks may return hidden states by themselves or in a tuple, list, dictionary, `ModelOutput` or dataclass, and take
  them by position or keyword. A block that runs several times (ALBERT) is calibrated on all of its calls. What several
  blocks have in common is compressed once, on the calls in the first of them; single layers in common stay dense.
- Linear layers that are themselves the elements of a list, such as one head for each of several outputs, belong to no
  block and stay dense, as embeddings and heads do.
- Layers whose weights a model reads past the layers themselves (Mamba's kernels), and those that calibration never
  calls, stay dense and are reported.
"""


def table() -> str:
    """Return the text of docs/models.md."""
    rows = [_row(name, family) for name, family in FAMILIES.items()]
    return INTRODUCTION + "".join(rows) + REMARKS


def _row(name: str, family: Family) -> str:
    model = family.make()
    blocks = find_blocks(model)
    experts = separate_experts(blocks)  # changes the model, so it comes before the search for layers
    layer_names = [f"`{layer.name.rpartition('.')[2]}`" for layer in find_layers(blocks)]
    linears = ", ".join(dict.fromkeys(layer_names))
    if any(isinstance(module, Conv1D) for module in model.modules()):
        linears += " (`Conv1D`)"
    kinds = _feed_forward_kinds(blocks, experts)
    if fused_experts(model, blocks):
        kinds.append("fused experts")
    feed_forward = ", ".join(kinds) or "–"
    cells = (name, f"`{family.model}`", linears, feed_forward, READS[family.batches], family.note)
    return f"| {' | '.join(cells)} |\n"


def _feed_forward_kinds(blocks: Mapping[str, nn.Module], experts: Container[str]) -> list[str]:
    """Return the kinds of the feed-forward networks of the blocks, in the order in which they come up."""
    kinds: dict[str, None] = {}
    for block_name, block in blocks.items():
        for network in find_feed_forwards(block):
            owner = f"{block_name}.{network.output}".rsplit(".", 2)[0]
            kinds["experts" if owner in experts else _kind(network)] = None
    return list(kinds)


def _kind(network: FeedForward) -> str:
    if network.fused:
        return "gated, fused"
    return "gated" if len(network.inputs) == 2 else "plain"


if __name__ == "__main__":
    print(table(), end="")
