"""Builds models with random weights, small enough to compress in a fraction of a second, and a tokenizer for them."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]
VOCABULARY = len(CHARACTERS) + 3
"""Number of tokens: the characters, and those for unknown, start and end."""
CONTEXT = 64
"""Maximum number of positions of the models."""
BUNDLED = Path(__file__).parents[2] / "hf_lowrank" / "data" / "reference-7m"
"""The trained model that the package brings."""

CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }}\n{% endfor %}"


def tokenizer(bos: bool = True, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per character.

    Args:
        bos: whether there is a beginning-of-sequence token.
        adds_bos: whether the tokenizer puts that token before every text by itself.
    """
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    if bos and adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fields = {"tokenizer_object": backend, "unk_token": "<unk>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    if bos:
        fields["bos_token"] = "<s>"
    return PreTrainedTokenizerFast(**fields)


def text(documents: int = 40, seed: int = 0) -> list[str]:
    """Return documents of 25 random words, which tokenize to about a hundred tokens."""
    generator = torch.Generator().manual_seed(seed)
    words = ["the", "cat", "dog", "sat", "ran", "on", "mat", "and", "then", "slept", "red", "blue", "over", "tree"]
    texts = []
    for _ in range(documents):
        drawn = torch.randint(len(words), (25,), generator=generator).tolist()
        texts.append(" ".join(words[i] for i in drawn))
    return texts


def token_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    """Return random token ids, (rows, length)."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """Build a Llama of four blocks.

    It has grouped-query attention (four heads over two) and a gated feed-forward network of 80 neurons.
    """
    fields = {
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return _build(
        LlamaForCausalLM, LlamaConfig, seed, dtype, {**fields, "max_position_embeddings": CONTEXT, **changes}
    )


def gpt2(seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build a GPT-2 of three blocks of `Conv1D` layers with biases. Query, key and value are one layer."""
    fields = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT}
    return _build(GPT2LMHeadModel, GPT2Config, seed, dtype, fields)


def opt(seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build an OPT of two blocks with biases everywhere and a plain feed-forward network."""
    fields = {
        "hidden_size": 32,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    }
    return _build(
        OPTForCausalLM, OPTConfig, seed, dtype, {**fields, "max_position_embeddings": CONTEXT, "pad_token_id": 0}
    )


def gemma2(seed: int = 0) -> PreTrainedModel:
    """Build a Gemma 2 of four blocks, which are called with different arguments.

    Every other block attends only to a window of 8 tokens.
    """
    fields = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return _build(
        Gemma2ForCausalLM,
        Gemma2Config,
        seed,
        torch.float32,
        {**fields, "head_dim": 8, "sliding_window": 8, "pad_token_id": 0},
    )


def mixtral(seed: int = 0) -> PreTrainedModel:
    """Build a Mixtral of two blocks whose feed-forward networks are fused experts."""
    fields = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return _build(
        MixtralForCausalLM, MixtralConfig, seed, torch.float32, {**fields, "num_local_experts": 4, "pad_token_id": 0}
    )


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """Save the model and the tokenizer in a folder, as a user would have them, and return the folder."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def _build(cls: Any, config_cls: Any, seed: int, dtype: torch.dtype, fields: dict[str, Any]) -> PreTrainedModel:
    """Build a model with weights and biases that depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = config_cls(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, initializer_range=0.1, **fields)
        model: PreTrainedModel = cls(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers sets biases to zero, with which many faults would not show
                torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)
