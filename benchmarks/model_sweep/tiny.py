"""Builds a tiny random model of any class of transformers, and inputs that it runs on.

The default config of a class is shrunk by the names of its fields. Where no model that runs comes of it, all widths are
divided by one number instead, and at last only the number of layers is reduced.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

MOST_PARAMETERS = 130_000_000
"""Maximum number of parameters of a tiny model."""
VOCABULARY = 128
TOKENS = 24
"""Number of tokens of a text."""

Values = dict[str, Any]

WIDTHS = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "embed_dim": 32, "hidden_dim": 32, "dim": 32, "emb_dim": 32,
    "intermediate_size": 64, "ffn_dim": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "d_ff": 64, "mlp_dim": 64,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32, "ffn_hidden_size": 64, "n_inner": 64,
    "projection_dim": 32, "out_hidden_size": 32, "output_dim": 32, "embedding_size": 32, "embedding_dim": 32,
    "decoder_hidden_size": 32, "encoder_hidden_size": 32, "encoder_hidden_dim": 32, "decoder_intermediate_size": 64,
    "shared_intermediate_size": 32, "projector_hidden_size": 32, "word_embed_proj_dim": 32, "text_hidden_size": 32,
    "cross_attention_hidden_size": 32, "output_hidden_size": 32, "qformer_hidden_size": 32, "lru_width": 32,
    "hidden_size_per_layer_input": 8, "laurel_rank": 8, "d_kv": 8, "dim_head": 8,
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "qk_head_dim": 12, "index_head_dim": 8, "global_head_dim": 8, "head_dim": 8, "attention_head_dim": 8,
    "head_size": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_head_dim": 8,
    "mamba_d_state": 8, "ssm_state_size": 8, "state_size": 8, "mamba_d_head": 16, "mamba_head_dim": 16,
    "rotary_dim": 4, "classifier_proj_size": 16, "fpn_hidden_size": 32, "aux_channels": 16, "query_pre_attn_scalar": 8,
    "hidden_size_global": 32, "vision_hidden_size": 32, "audio_hidden_size": 32, "backbone_hidden_size": 32,
}  # fmt: skip
"""Sizes of the fields that say how wide something is."""
HEADS = {
    "num_attention_heads": 4, "num_heads": 4, "n_head": 4, "n_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "decoder_num_attention_heads": 4, "encoder_num_attention_heads": 4,
    "attention_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2, "encoder_num_key_value_heads": 2,
    "decoder_num_key_value_heads": 2, "num_global_key_value_heads": 2, "index_n_heads": 2, "linear_num_heads": 4,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4, "mamba_n_heads": 4, "mamba_num_heads": 4, "num_query_groups": 2,
}  # fmt: skip
LAYERS = (
    "num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth", "encoder_layers", "decoder_layers",
    "num_encoder_layers", "num_decoder_layers", "encoder_num_hidden_layers", "decoder_num_hidden_layers", "layers",
    "l_layers", "x_layers", "r_layers", "num_blocks", "resampler_depth", "decoder_num_layers", "encoder_num_layers",
    "qformer_num_hidden_layers", "max_window_layers",
)  # fmt: skip
"""Fields that say how many layers there are."""
COUNTS = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "num_kv_shared_layers": 0, "zero_expert_num": 2, "num_queries": 8,
    "num_query_tokens": 8, "num_latents": 8, "d_latents": 32, "num_nextn_predict_layers": 0, "index_topk": 8,
    "num_self_attends_per_block": 2, "max_2d_position_embeddings": 1024, "vocab_size_per_layer_input": VOCABULARY,
}  # fmt: skip
LIMITS = {
    "max_position_embeddings": 128, "n_positions": 128, "max_source_positions": 64, "max_target_positions": 64,
    "context_length": 128, "sliding_window": 16, "local_attention": 16, "attention_window_size": 16,
    "entity_vocab_size": 64, "codebook_size": 64, "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY,
    "text_vocab_size": VOCABULARY, "audio_vocab_size": VOCABULARY, "decoder_vocab_size": VOCABULARY,
    "image_size": 64, "pretrain_image_size": 64, "img_size": 64, "num_mel_bins": 16, "num_frames": 4,
    "num_image_tokens": 16, "image_seq_length": 16, "mm_tokens_per_image": 16, "bigram_vocab_size": 64,
}  # fmt: skip
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


def inputs_of(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Yield inputs that a model may run on, the most likely ones first."""
    names = [*inspect.signature(model.forward).parameters]
    main = model.main_input_name
    if "grid_thw" in names:
        patches = _vision_patches(model)
        first_name = next(name for name in names if name in ("hidden_states", "pixel_values"))
        yield {first_name: patches, "grid_thw": torch.tensor([[1, 4, 4]])}
        return
    for make in _MAKERS.get(main, _MAKERS["input_ids"]):
        first = {main: make(model)}
        if main == "input_features" and "input_features_mask" in names:
            first["input_features_mask"] = torch.ones(first[main].shape[:2], dtype=torch.bool)
        for more in _companions(model, names, main):
            yield first | more


def _companions(model: PreTrainedModel, names: list[str], main: str) -> Iterator[dict[str, Tensor]]:
    """Yield further inputs beside the main one, from none to all that can be made."""
    ids = _text(model)
    decoder = {"decoder_input_ids": ids} if "decoder_input_ids" in names else {}
    if model.config.is_encoder_decoder and main != "input_ids":
        yield decoder
    yield {}
    if decoder:
        yield decoder
    if main != "input_ids" and "input_ids" in names:
        yield {"input_ids": ids}
    if main == "input_ids" and "pixel_values" in names:
        yield {"pixel_values": _picture(model)}
    if "bbox" in names:
        yield {"bbox": torch.randint(0, 100, (*ids.shape, 2)).repeat(1, 1, 2).sort(dim=-1).values}
    if "input_features" in names and main == "input_ids":
        yield {"input_features": _frames_last(model)}
    if "input_values" in names and main == "input_ids":
        yield {"input_values": _sound(model)}


def _find(config: Any, *names: str, default: int) -> int:
    """Return the first of the named sizes that a config or one of its parts has."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    for name in names:
        for part in parts:
            value = getattr(part, name, None)
            if isinstance(value, (list, tuple)) and value:
                value = value[0]
            if isinstance(value, int) and value > 0:
                return value
    return default


def _text(model: PreTrainedModel) -> Tensor:
    vocabulary = max(min(_find(model.config, "vocab_size", default=VOCABULARY), 60), 8)
    return torch.randint(3, vocabulary, (2, TOKENS), generator=_generator())


def _picture(model: PreTrainedModel) -> Tensor:
    side = _find(model.config, "image_size", "img_size", "input_size", default=64)
    channels = _find(model.config, "num_channels", "in_channels", "in_chans", default=3)
    return torch.randn(2, channels, side, side, generator=_generator())


def _small_picture(model: PreTrainedModel) -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=_generator())


def _large_picture(model: PreTrainedModel) -> Tensor:
    return torch.randn(1, 3, 224, 224, generator=_generator())


def _video(model: PreTrainedModel) -> Tensor:
    frames = _find(model.config, "num_frames", "frames_per_clip", default=4)
    return _picture(model)[:, None].repeat(1, frames, 1, 1, 1)


def _flat_patches(model: PreTrainedModel) -> Tensor:
    patch = _find(model.config, "patch_size", default=16)
    return torch.randn(2, 16, 3 * patch * patch, generator=_generator())


def _vision_patches(model: PreTrainedModel) -> Tensor:
    """Return the patches of a picture of 4 x 4 of them, as vision towers of Qwen read them."""
    patch = _find(model.config, "patch_size", default=14)
    frames = _find(model.config, "temporal_patch_size", default=1)
    channels = _find(model.config, "in_channels", "num_channels", "in_chans", default=3)
    return torch.randn(16, channels * frames * patch * patch, generator=_generator())


def _frames_last(model: PreTrainedModel) -> Tensor:
    """Return spectrograms as Whisper reads them, (B, mel bins, frames)."""
    frames = 2 * _find(model.config, "max_source_positions", default=64)
    return torch.randn(2, _find(model.config, "num_mel_bins", default=80), frames, generator=_generator())


def _frames_first(model: PreTrainedModel) -> Tensor:
    """Return spectrograms (B, frames, mel bins)."""
    bins = _find(model.config, "num_mel_bins", "feature_size", "feature_projection_input_dim", "input_dim",
                 "input_feat_per_channel", "feat_dim", default=80)  # fmt: skip
    return torch.randn(2, 128, bins, generator=_generator())


def _fixed_frames(model: PreTrainedModel) -> Tensor:
    frames = _find(model.config, "max_length", default=128)
    return torch.randn(2, frames, _find(model.config, "num_mel_bins", default=128), generator=_generator())


def _sound(model: PreTrainedModel) -> Tensor:
    return torch.randn(2, 6400, generator=_generator())


def _channel_sound(model: PreTrainedModel) -> Tensor:
    return torch.randn(2, _find(model.config, "audio_channels", default=1), 6400, generator=_generator())


def _series(model: PreTrainedModel) -> Tensor:
    return torch.randn(2, _find(model.config, "context_length", default=32), 1, generator=_generator())


def _codes(model: PreTrainedModel) -> Tensor:
    books = _find(model.config, "num_codebooks", "n_codebooks", default=2)
    return torch.randint(3, 60, (2, TOKENS, books), generator=_generator())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


_MAKERS: dict[str, list[Callable[[PreTrainedModel], Tensor]]] = {
    "input_ids": [_text, _codes],
    "pixel_values": [_picture, _small_picture, _large_picture, _flat_patches, _video],
    "pixel_values_videos": [_video],
    "input_features": [_frames_last, _frames_first, _fixed_frames],
    "input_values": [_sound, _fixed_frames, _frames_first, _channel_sound],
    "past_values": [_series],
}
