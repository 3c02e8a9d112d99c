"""Tiny models that read sounds, pictures or codes, many of which give their inputs other names than their parts do."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

from .model_families import BART, COMMON, PICTURE, SIZES, T5, VOCABULARY, WHISPER

SPEECH = {
    "hidden_size": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_layers": 1,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_mel_bins": 8,
    "speech_decoder_prenet_units": 16,
    "speech_decoder_postnet_units": 16,
    "speaker_embedding_dim": 8,
    "decoder_start_token_id": 1,
    "use_guided_attention_loss": False,
}
WAV2VEC2 = {**SIZES, "conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
HEADS_OF_BOTH = {
    f"{part}_num_{name}": 4 for part in ("encoder", "decoder") for name in ("attention_heads", "key_value_heads")
}
MOONSHINE = {"hidden_size": 32, "intermediate_size": 64, "decoder_start_token_id": 1, **HEADS_OF_BOTH}
CODEBOOKS = 4
CODES: dict[str, Any] = {
    "vocab_size": 32,
    "pad_token_id": 31,
    "bos_token_id": 31,
    "num_hidden_layers": 2,
    "ffn_dim": 64,
    "num_attention_heads": 4,
    "hidden_size": 32,
    "num_codebooks": CODEBOOKS,
    "max_position_embeddings": 64,
}
KYUTAI = {
    "ffn_dim": 64,
    "vocab_size": 32,
    "codebook_vocab_size": 33,
    "num_codebooks": CODEBOOKS,
    "audio_bos_token_id": 1,
    "audio_pad_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
ENCODEC = {
    "hidden_size": 16,
    "codebook_dim": 16,
    "num_filters": 4,
    "upsampling_ratios": [4, 2],
    "codebook_size": 32,
    "target_bandwidths": [1.5],
    "num_lstm_layers": 1,
}
PERCEIVER = {
    "d_model": 32,
    "d_latents": 32,
    "num_latents": 8,
    "num_blocks": 1,
    "num_self_attends_per_block": 2,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 4,
}
GPT_2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "add_cross_attention": True}
BERT_DECODER = {**SIZES, **COMMON, "is_decoder": True, "add_cross_attention": True}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def ids(*shape: int, below: int = VOCABULARY) -> Tensor:
    return torch.randint(3, below, shape, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Reader:
    """A model, and the inputs that it reads.

    Attributes:
        make_config: makes its config.
        inputs: what it reads beside what its decoder does.
        decoder_input: name of what its decoder reads, with its values. None for a model without a decoder.
    """

    make_config: Callable[[], Any]
    inputs: dict[str, Tensor]
    decoder_input: tuple[str, Tensor] | None = None

    @property
    def batch(self) -> dict[str, Tensor]:
        """All that the model reads."""
        return self.inputs | dict([self.decoder_input] if self.decoder_input else [])

    def make(self, class_name: str) -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = self.make_config()
            model: PreTrainedModel = getattr(hf, class_name)(config).eval()
        return model


def _pair(config_class: Any, encoder: Any, decoder: Any) -> Any:
    config = config_class.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return config


def _musicgen() -> Any:
    parts = {
        "text_encoder": hf.T5Config(**T5, d_ff=64, vocab_size=VOCABULARY),
        "audio_encoder": hf.EncodecConfig(**ENCODEC),
        "decoder": hf.MusicgenDecoderConfig(**CODES),
    }
    return hf.MusicgenConfig(**{name: part.to_dict() for name, part in parts.items()})


def _speech_pair(encoder: Any) -> Any:
    return _pair(hf.SpeechEncoderDecoderConfig, encoder, hf.BertConfig(**BERT_DECODER))


TEXT, SOUND, FRAMES = ("decoder_input_ids", ids(2, 9)), random(2, 3200), random(2, 40, 8)
SPEAKER = {"speaker_embeddings": random(2, 8)}
SPECTROGRAM = ("decoder_input_values", random(2, 10, 8))
READERS = {
    "SpeechT5ForSpeechToText": Reader(
        lambda: hf.SpeechT5Config(**{**COMMON, **SPEECH}), {"input_values": SOUND}, TEXT
    ),
    "SpeechT5ForTextToSpeech": Reader(
        lambda: hf.SpeechT5Config(**{**COMMON, **SPEECH}), {"input_ids": ids(2, 7), **SPEAKER}, SPECTROGRAM
    ),
    "SpeechT5ForSpeechToSpeech": Reader(
        lambda: hf.SpeechT5Config(**{**COMMON, **SPEECH}), {"input_values": SOUND, **SPEAKER}, SPECTROGRAM
    ),
    "SpeechEncoderDecoderModel": Reader(
        lambda: _speech_pair(hf.Wav2Vec2Config(**WAV2VEC2)), {"input_values": SOUND}, TEXT
    ),
    "SpeechEncoderDecoderModel inputs": Reader(
        lambda: _speech_pair(hf.Wav2Vec2Config(**WAV2VEC2)), {"inputs": SOUND}, TEXT
    ),
    "SpeechEncoderDecoderModel features": Reader(
        lambda: _speech_pair(hf.Wav2Vec2BertConfig(**SIZES, feature_projection_input_dim=8)),
        {"input_features": FRAMES},
        TEXT,
    ),
    "VisionEncoderDecoderModel": Reader(
        lambda: _pair(
            hf.VisionEncoderDecoderConfig, hf.ViTConfig(**SIZES, **PICTURE), hf.GPT2Config(**{**COMMON, **GPT_2})
        ),
        {"pixel_values": random(2, 3, 16, 16)},
        TEXT,
    ),
    "EncoderDecoderModel": Reader(
        lambda: _pair(hf.EncoderDecoderConfig, hf.BertConfig(**{**COMMON, **SIZES}), hf.BertConfig(**BERT_DECODER)),
        {"input_ids": ids(2, 12)},
        TEXT,
    ),
    "MoonshineForConditionalGeneration": Reader(
        lambda: hf.MoonshineConfig(**{**COMMON, **MOONSHINE}), {"input_values": SOUND}, TEXT
    ),
    "Speech2TextForConditionalGeneration": Reader(
        lambda: hf.Speech2TextConfig(**{**COMMON, **BART, "input_feat_per_channel": 8, "conv_channels": 16}),
        {"input_features": FRAMES},
        TEXT,
    ),
    "WhisperForConditionalGeneration": Reader(
        lambda: hf.WhisperConfig(**{**COMMON, **BART, **WHISPER}), {"input_features": random(2, 8, 32)}, TEXT
    ),
    "BlipForQuestionAnswering": Reader(
        lambda: hf.BlipConfig(
            text_config={**COMMON, **SIZES, "encoder_hidden_size": 32}, vision_config={**SIZES, **PICTURE}
        ),
        {"input_ids": ids(2, 7), "pixel_values": random(2, 3, 16, 16)},
        TEXT,
    ),
    "MusicgenForConditionalGeneration": Reader(
        _musicgen, {"input_ids": ids(2, 7)}, ("decoder_input_ids", ids(2 * CODEBOOKS, 9, below=30))
    ),
    "MusicgenForCausalLM": Reader(
        lambda: hf.MusicgenDecoderConfig(**CODES), {"input_ids": ids(2 * CODEBOOKS, 9, below=30)}
    ),
    "MusicgenForCausalLM with text": Reader(
        lambda: hf.MusicgenDecoderConfig(**CODES),
        {"input_ids": ids(2 * CODEBOOKS, 9, below=30), "encoder_hidden_states": random(2, 5, 32)},
    ),
    "KyutaiSpeechToTextModel": Reader(
        lambda: hf.KyutaiSpeechToTextConfig(**{**SIZES, **KYUTAI}), {"input_ids": ids(2, 9, CODEBOOKS + 1, below=30)}
    ),
    "BartForCausalLM": Reader(
        lambda: hf.BartConfig(**{**COMMON, **BART}),
        {"input_ids": ids(2, 9), "encoder_hidden_states": random(2, 5, 32)},
    ),
    "PerceiverForMaskedLM": Reader(lambda: hf.PerceiverConfig(**{**COMMON, **PERCEIVER}), {"input_ids": ids(2, 9)}),
    "PerceiverForMaskedLM inputs": Reader(
        lambda: hf.PerceiverConfig(**{**COMMON, **PERCEIVER}), {"inputs": ids(2, 9)}
    ),
}
"""Readers by the name of their class, and by which of several inputs they are given."""
