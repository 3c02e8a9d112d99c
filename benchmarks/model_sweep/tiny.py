"""Builds a tiny random model of any class of transformers, and inputs that it runs on.

The default config of a class is shrunk by the names of its fields. Where no model that runs comes of it, all widths
are divided by one number instead, and at last only the number of layers is reduced.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

MOST_PARAMETERS = 130_000_000
"""Maximum number of parameters of a tiny model."""
VOCABULARY = 128
TOKENS = 24
"""Number of tokens of a text."""

Values = dict[str, Any]


def _sizes(names: dict[int, str]) -> dict[str, int]:
    """Return a size by the name of a field, from the names of the fields of each size."""
    return {name: size for size, of_size in names.items() for name in of_size.split()}


WIDTHS = _sizes(
    {
        4: "qk_rope_head_dim rotary_dim",
        8: """
            hidden_size_per_layer_input laurel_rank d_kv dim_head qk_nope_head_dim v_head_dim index_head_dim
            global_head_dim head_dim attention_head_dim head_size linear_key_head_dim linear_value_head_dim
            linear_head_dim mamba_d_state ssm_state_size state_size query_pre_attn_scalar
        """,
        12: "qk_head_dim",
        16: "moe_intermediate_size kv_lora_rank mamba_d_head mamba_head_dim classifier_proj_size aux_channels",
        24: "q_lora_rank",
        32: """
            hidden_size d_model n_embd embed_dim hidden_dim dim emb_dim shared_expert_intermediate_size
            projection_dim out_hidden_size output_dim embedding_size embedding_dim decoder_hidden_size
            encoder_hidden_size encoder_hidden_dim shared_intermediate_size projector_hidden_size
            word_embed_proj_dim text_hidden_size cross_attention_hidden_size output_hidden_size
            qformer_hidden_size lru_width fpn_hidden_size hidden_size_global vision_hidden_size
            audio_hidden_size backbone_hidden_size
        """,
        64: """
            intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff mlp_dim ffn_hidden_size n_inner
            decoder_intermediate_size
        """,
    }
)
"""Sizes of the fields that say how wide something is."""
HEADS = _sizes(
    {
        2: """
            num_key_value_heads num_kv_heads encoder_num_key_value_heads decoder_num_key_value_heads
            num_global_key_value_heads index_n_heads linear_num_key_heads num_query_groups
        """,
        4: """
            num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads
            decoder_num_attention_heads encoder_num_attention_heads attention_heads linear_num_heads
            linear_num_value_heads num_encoder_attention_heads num_decoder_attention_heads mamba_n_heads
            mamba_num_heads
        """,
    }
)
LAYERS = [
    "num_hidden_layers",
    "n_layer",
    "num_layers",
    "n_layers",
    "depth",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
    "encoder_num_hidden_layers",
    "decoder_num_hidden_layers",
    "layers",
    "l_layers",
    "x_layers",
    "r_layers",
    "num_blocks",
    "resampler_depth",
    "decoder_num_layers",
    "encoder_num_layers",
    "qformer_num_hidden_layers",
    "max_window_layers",
]
"""Fields that say how many layers there are."""
COUNTS = _sizes(
    {
        0: "num_kv_shared_layers num_nextn_predict_layers",
        1: "n_shared_experts n_group topk_group first_k_dense_replace",
        2: "num_experts_per_tok num_experts_per_token moe_topk moe_k zero_expert_num num_self_attends_per_block",
        4: "num_experts num_local_experts n_routed_experts moe_num_experts",
        8: "num_queries num_query_tokens num_latents index_topk",
        32: "d_latents",
        128: "vocab_size_per_layer_input",
        1024: "max_2d_position_embeddings",
    }
)
LIMITS = _sizes(
    {
        4: "num_frames",
        16: """
            sliding_window local_attention attention_window_size num_mel_bins num_image_tokens image_seq_length
            mm_tokens_per_image
        """,
        64: """
            max_source_positions max_target_positions entity_vocab_size codebook_size image_size
            pretrain_image_size img_size bigram_vocab_size
        """,
        128: """
            max_position_embeddings n_positions context_length src_vocab_size tgt_vocab_size text_vocab_size
            audio_vocab_size decoder_vocab_size
        """,
    }
)
"""Fields that are reduced if they are larger."""
PICTURES = ("image_size", "img_size")
WIDTHS_OF_STAGES = ("hidden_sizes", "embed_dims", "widths", "conv_dim")
KEPT = ("layer_norm_eps", "rope_parameters", "rope_scaling", "id2label", "label2id", "generation_config")


def shrink(values: Values, layers: int) -> Values:
    """Return the values of a config with small widths, counts and tables, those of its parts included."""
    small: Values = {}
    for name, value in values.items():
        if isinstance(value, dict) and name not in KEPT:
            small[name] = shrink(value, layers)
        elif isinstance(value, int) and not isinstance(value, bool):
            small[name] = _small_number(name, value, layers)
        else:
            small[name] = value
    heads = small.get("num_attention_heads")
    if isinstance(heads, int) and isinstance(small.get("hidden_size"), int):
        for name, derived in (("head_dim", small["hidden_size"] // heads), ("num_key_value_heads", heads)):
            if name in values and values[name] is None:
                small[name] = derived
    if values.get("num_key_value_heads") == 1:
        small["num_key_value_heads"] = 1
    elif values.get("num_key_value_heads") == values.get("num_attention_heads") is not None:
        small["num_key_value_heads"] = small["num_attention_heads"]
    return _with_sections(_short(small, layers))


def _small_number(name: str, value: int, layers: int) -> int:
    if value <= 0 or name in KEPT:
        return value
    if name == "vocab_size":
        return VOCABULARY if value >= VOCABULARY else value
    if name.endswith(("_token_id", "_token_index")) and value >= VOCABULARY:
        # Tokens of different kinds stay different.
        return 64 + sum(map(ord, name)) % 60
    if name in LAYERS and value > layers:
        return layers
    for fixed in (WIDTHS, HEADS, COUNTS):
        if name in fixed and value > fixed[name]:
            return fixed[name]
    return min(value, LIMITS.get(name, value))


def divided(values: Values, divisor: int) -> Values:
    """Return the values of a config with few layers, a small vocabulary, and all widths divided by one number."""
    small: Values = {}
    for name, value in values.items():
        if isinstance(value, dict) and name not in KEPT:
            small[name] = divided(value, divisor)
        elif name in WIDTHS and isinstance(value, int) and value >= 4 * divisor:
            small[name] = value // divisor
        elif name in WIDTHS_OF_STAGES and isinstance(value, (list, tuple)):
            small[name] = [max(part // divisor, 1) if isinstance(part, int) else part for part in value]
        elif isinstance(value, int) and not isinstance(value, bool) and name not in {*WIDTHS, *HEADS, *PICTURES}:
            small[name] = _small_number(name, value, 2)
        else:
            small[name] = value
    return _with_sections(_short(small, 2))


def _short(values: Values, layers: int) -> Values:
    """Return the values with lists of one entry per layer as long as there are layers, in which all kinds occur."""
    short = dict(values)
    if any(name in values for name in LAYERS):
        for name, value in values.items():
            per_layer = name in ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")
            if isinstance(value, (list, tuple)) and (per_layer or len(value) > max(layers, 8)):
                kinds = [entry for position, entry in enumerate(value) if entry not in value[:position]]
                short[name] = [kinds[position % len(kinds)] for position in range(layers)]
    for name in ("depths", "stage_num_blocks"):
        if isinstance(short.get(name), (list, tuple)):
            short[name] = [min(count, 1) if isinstance(count, int) else count for count in short[name]]
    for name in ("deepstack_visual_indexes", "fullatt_block_indexes", "global_attn_indexes"):
        if short.get(name):
            short[name] = [0]
    return short


def _with_sections(values: Values) -> Values:
    """Return the values with sections of rotary dimensions that fit the size of a head."""
    rope = values.get("rope_parameters")
    if not isinstance(rope, dict) or "mrope_section" not in rope:
        return values
    size = values.get("head_dim") or values.get("hidden_size", 32) // values.get("num_attention_heads", 4)
    half = int(size * rope.get("partial_rotary_factor", 1)) // 2
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    return values | {"rope_parameters": rope | {"mrope_section": sections}}


def configs(config_class: type[PreTrainedConfig], overrides: Values) -> Iterator[Callable[[], PreTrainedConfig]]:
    """Yield functions that make configs of a class, from the smallest to that with its own widths."""
    values = config_class(**overrides.get("first", {})).to_dict()
    values = _without(values, "per_layer_config")
    for dropped in ("transformers_version", "architectures", "dtype", "model_type", "out_features", "out_indices"):
        values.pop(dropped, None)
    overrides = {name: value for name, value in overrides.items() if name != "first"}
    reduced = [shrink(values, 2), shrink(values, 4), divided(values, 8), divided(values, 1)]
    for small in reduced:
        for chosen in (_changes(values, small), small):
            merged = _merged(chosen, overrides)
            yield lambda merged=merged: config_class(**merged)


def _changes(values: Values, small: Values) -> Values:
    """Return the values that are not what they were, so that the class derives the others from them."""
    changed = {}
    for name, value in small.items():
        if isinstance(value, dict) and isinstance(values[name], dict) and "model_type" in values[name]:
            changed[name] = _changes(values[name], value) | {"model_type": value["model_type"]}
        elif value != values[name] and not (isinstance(value, list) and len(value) != len(values[name])):
            changed[name] = value
    return changed


def _without(values: Values, dropped: str) -> Values:
    """Return the values without those of a name, in the parts either."""
    kept = {}
    for name, value in values.items():
        if name != dropped:
            kept[name] = _without(value, dropped) if isinstance(value, dict) else value
    return kept


def _merged(values: Values, overrides: Values) -> Values:
    merged = dict(values)
    for name, value in overrides.items():
        both_dicts = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merged(merged[name], value) if both_dicts else value
    return merged


def build(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model with random weights, biases and norms included, so that nothing that they do can hide.

    Raises:
        MemoryError: if the model is not tiny.
    """
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > MOST_PARAMETERS:
        raise MemoryError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = model_class(config).eval()
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif float(parameter.square().mean()) < 1e-6:  # some classes leave such weights to the checkpoint
            parameter.data = 0.1 * torch.randn_like(parameter)
    return model
