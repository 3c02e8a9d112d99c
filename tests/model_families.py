"""One tiny random model per family, by its class names in transformers; shapes are small but keep what makes the family special."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY = 64
LENGTH = 12
SIZES = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
DEEPSEEK = {**SIZES, **LATENT, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
T5 = {"d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
WHISPER = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32,
    "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
PICTURE = {"image_size": 16, "patch_size": 4}
LLAVA = {
    "vision_config": {"model_type": "clip_vision_model", **SIZES, **PICTURE, "projection_dim": 32},
    "text_config": {"model_type": "llama", **GROUPED, "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0},
    "image_token_index": 63, "image_seq_length": 16, "vision_feature_layer": -1,
}  # fmt: skip


def text(rows: int = 4, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Random token ids, (rows, length)."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def token_batches() -> list[dict[str, Tensor]]:
    return [{"input_ids": text(4)}, {"input_ids": text(2, seed=1)}]


def pair_batches() -> list[dict[str, Tensor]]:
    """Encoder and decoder texts of different lengths; the encoder's are padded."""
    mask = torch.ones(4, LENGTH, dtype=torch.long)
    mask[1, 7:] = 0
    return [{"input_ids": text(4), "attention_mask": mask, "decoder_input_ids": text(4, 9, seed=1)}]


def sound_batches() -> list[dict[str, Tensor]]:
    features = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    return [{"input_features": features, "decoder_input_ids": text(2, 9)}]


def picture_batches() -> list[dict[str, Tensor]]:
    return [{"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))}]


def picture_and_text_batches() -> list[dict[str, Tensor]]:
    """One picture of 16 patches in each text; token 63 stands for a patch."""
    ids = torch.cat([text(2, 3).clamp(max=62), torch.full((2, 16), 63), text(2, 9, seed=1).clamp(max=62)], dim=1)
    return [{"input_ids": ids, **picture_batches()[0], "pixel_values": picture_batches()[0]["pixel_values"][:2]}]


@dataclass(frozen=True)
class Family:
    """How to make the model, what to calibrate it on, and what there is to say about it.

    Attributes:
        model: name of the class in transformers. config: fields of its config.
        batches: makes the calibration batches.
        dense: shell patterns of the layers that stay dense, and why.
        warning: a part of the warning that its report must have.
        note: for the table of supported models.
    """

    model: str
    config: dict[str, Any]
    note: str = ""
    batches: Callable[[], list[dict[str, Tensor]]] = token_batches
    dense: dict[str, str] = field(default_factory=dict)
    warning: str = ""

    def make(self, **changes: Any) -> PreTrainedModel:
        cls = getattr(transformers, self.model)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: PreTrainedModel = cls(cls.config_class(**{**COMMON, **self.config, **changes})).eval()
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.1)
        return model


COMMON = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}

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
    "Falcon": Family("FalconForCausalLM", {**SIZES, "ffn_hidden_size": 80, "alibi": False}),
    "OLMo 2": Family("Olmo2ForCausalLM", GROUPED),
    "SmolLM3": Family("SmolLM3ForCausalLM", GROUPED),
    "Cohere": Family("CohereForCausalLM", GROUPED),
    "StarCoder 2": Family("Starcoder2ForCausalLM", GROUPED),
    "Mixtral": Family("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}),
    "Qwen2-MoE": Family("Qwen2MoeForCausalLM", {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 48}),
    "Qwen3-MoE": Family("Qwen3MoeForCausalLM", {**GROUPED, **EXPERTS, "head_dim": 8}),
    "OLMoE": Family("OlmoeForCausalLM", {**GROUPED, **EXPERTS}),
    "DeepSeek-V2": Family("DeepseekV2ForCausalLM", {**DEEPSEEK, "first_k_dense_replace": 1}),
    "DeepSeek-V3": Family("DeepseekV3ForCausalLM", {**DEEPSEEK, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}),
    "BERT": Family("BertForMaskedLM", SIZES),
    "RoBERTa": Family("RobertaForMaskedLM", SIZES),
    "ModernBERT": Family("ModernBertForMaskedLM", {**SIZES, "num_hidden_layers": 3, "local_attention": 8}),
    "ALBERT": Family("AlbertForMaskedLM", {**SIZES, "embedding_size": 16}),
    "T5": Family("T5ForConditionalGeneration", {**T5, "d_ff": 64}, batches=pair_batches),
    "T5 1.1, FLAN-T5": Family(
        "T5ForConditionalGeneration",
        {**T5, "d_ff": 80, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        batches=pair_batches,
    ),
    "BART": Family(
        "BartForConditionalGeneration",
        {
            k: v
            for k, v in WHISPER.items()
            if k not in ("num_mel_bins", "max_source_positions", "max_target_positions", "suppress_tokens", "begin_suppress_tokens")
        },
        batches=pair_batches,
    ),
    "Whisper": Family("WhisperForConditionalGeneration", WHISPER, batches=sound_batches),
    "ViT": Family("ViTForImageClassification", {**SIZES, **PICTURE}, batches=picture_batches),
    "LLaVA": Family("LlavaForConditionalGeneration", LLAVA, batches=picture_and_text_batches),
    "BitNet-style sub-norm": Family("BitNetForCausalLM", GROUPED),
    "GPT-OSS": Family(
        "GptOssForCausalLM", {**GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
    ),
    "Granite-MoE": Family("GraniteMoeForCausalLM", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Mamba": Family("MambaForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
}
