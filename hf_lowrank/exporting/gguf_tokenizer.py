"""A tokenizer in the metadata of a GGUF file: tokens with their kinds and ranks, and how texts are cut.

llama.cpp has tokenizers of its own. It knows two kinds of byte pair encoding: of bytes, where a name says by which
patterns a text is cut first, and of characters with bytes as the last resort (SentencePiece's).
"""

import json
from typing import Any

from gguf import GGUFWriter, TokenType

from ..runtime.errors import CompressionError

GPT2 = {"type": "ByteLevel", "use_regex": True}
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    LETTERS + r"\p{N}{1,3}" + REST: "llama-bpe",
    LETTERS + r"\p{N}" + REST: "qwen2",
}
"""llama.cpp's names of the patterns by which a text is cut into words."""
SPACE = "▁"
NOT_HELD = "GGUF does not hold it; hf-lowrank export --format compressed-tensors, or hf-lowrank dense, keep it"


def add_tokenizer(writer: GGUFWriter, tokenizer: Any, size: int) -> None:
    """Write a tokenizer's metadata.

    Args:
        tokenizer: a fast tokenizer of transformers.
        size: number of rows of the model's embedding. Rows without a token get names of their own.

    Raises:
        CompressionError: for a tokenizer that llama.cpp has no counterpart of.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CompressionError(f"tokenizer {type(tokenizer).__name__}: has no tokenizer.json; {NOT_HELD}")
    parts = json.loads(backend.to_str())
    model = parts["model"]
    if model.get("type") != "BPE":
        raise CompressionError(f"tokenizer of type {model.get('type')}: {NOT_HELD}")
    is_of_bytes = "ByteLevel" in json.dumps(parts["pre_tokenizer"])
    if is_of_bytes:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_name_of_splits(parts))
        writer.add_token_merges([" ".join(pair) for pair in _merges(model)])
    elif model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_adds_space(parts))
    else:
        raise CompressionError(f"tokenizer of characters without bytes: {NOT_HELD}")
    tokens, types, scores = _tokens(parts, size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if not is_of_bytes:
        writer.add_token_scores(scores)
    _add_special_tokens(writer, tokenizer)


def _name_of_splits(parts: dict[str, Any]) -> str:
    """Return llama.cpp's name of how a text is cut into words."""
    normalizer = parts["normalizer"]
    steps = parts["pre_tokenizer"].get("pretokenizers", [parts["pre_tokenizer"]])
    kinds = [step["type"] for step in steps]
    last = steps[-1]
    if last["type"] == "ByteLevel" and not last.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and last["use_regex"] and normalizer is None:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and last["use_regex"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not last["use_regex"]:
            pattern = steps[0]["pattern"].get("Regex")
            if pattern in SPLITS and steps[0]["behavior"] == "Isolated":
                return SPLITS[pattern]
    raise CompressionError(f"tokenizer that cuts texts by {' and '.join(kinds)} of its own: {NOT_HELD}")


def _merges(model: dict[str, Any]) -> list[list[str]]:
    """Return the pairs that are merged, in their order."""
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]


def _adds_space(parts: dict[str, Any]) -> bool:
    """Return whether a text gets a space before its first word."""
    normalizer, splits = parts["normalizer"] or {}, parts["pre_tokenizer"] or {}
    steps = [*normalizer.get("normalizers", [normalizer]), *splits.get("pretokenizers", [splits])]
    return any(
        step.get("type") == "Prepend" or step.get("prepend_scheme", "never") in ("first", "always") for step in steps
    )


def _tokens(parts: dict[str, Any], size: int) -> tuple[list[bytes], list[int], list[float]]:
    """Return the tokens with their types and scores, by id. A score is the rank of the merge, negative."""
    model = parts["model"]
    ids: dict[int, str] = {index: token for token, index in model["vocab"].items()}
    added = {token["id"]: token for token in parts["added_tokens"]}
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(model)):
        ranks.setdefault(left + right, rank)
    tokens, types, scores = [], [], []
    for index in range(size):
        text = added[index]["content"] if index in added else ids.get(index)
        kind = TokenType.NORMAL
        if text is None:
            text, kind = f"[PAD{index}]", TokenType.UNUSED
        elif text == model.get("unk_token"):
            kind = TokenType.UNKNOWN
        elif index in added:
            kind = TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
        elif model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x"):
            kind = TokenType.BYTE
        tokens.append(text.encode())
        types.append(int(kind))
        scores.append(-float(ranks.get(text, len(ranks))))
    return tokens, types, scores


def _add_special_tokens(writer: GGUFWriter, tokenizer: Any) -> None:
    """Write the special tokens, which of them every text gets, and the template of chats."""
    for name in ("bos", "eos", "unk", "sep", "pad", "mask"):
        index = getattr(tokenizer, f"{name}_token_id", None)
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    encoded = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and encoded[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(
        tokenizer.eos_token_id is not None and len(encoded) > 1 and encoded[-1] == tokenizer.eos_token_id
    )
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        writer.add_chat_template(template)
