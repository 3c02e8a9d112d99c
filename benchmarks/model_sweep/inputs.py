"""Makes inputs that a tiny model runs on, by the names of what its `forward` takes and by the sizes in its config."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_lowrank.models.architectures import main_input

from .tiny import TOKENS, VOCABULARY


def inputs_of(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Yield inputs that a model may run on, the most likely ones first."""
    names = [*inspect.signature(model.forward).parameters]
    main = main_input(model)
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
    names = "num_mel_bins feature_size feature_projection_input_dim input_dim input_feat_per_channel feat_dim"
    bins = _find(model.config, *names.split(), default=80)
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
