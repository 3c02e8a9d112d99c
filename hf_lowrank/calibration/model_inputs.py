"""Turn what a user gives as a model's own inputs, such as a row of a tokenized dataset, into a batch."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..models.architectures import codebooks, forward_names, without_head
from ..runtime.errors import CompressionError
from .batches import TokenBatch, reads_labels
from .texts import described

OF_A_LOSS = re.compile(
    r"label|target|loss|answer|^(start|end)_positions$|is_impossible|cls_index|p_mask|^ans$|^future_|^(return|output|use)_"
)
"""Names of what the heads of models take beside their inputs, to compute a loss or to choose what they return."""


def readable_inputs(model: PreTrainedModel) -> set[str]:
    """Return the names of the inputs that a model reads. A mask by itself is none."""
    names = set(forward_names(model))
    base_names = set(forward_names(without_head(model)))
    of_the_head = {name for name in names - base_names if not OF_A_LOSS.search(name)}
    readable = (base_names | of_the_head | {"input_ids"}) - {"attention_mask", "labels"}
    # A decoder reads labels as its inputs, delayed. Other models read them only to compute a loss.
    if reads_labels(model):
        readable.add("labels")
    return readable


def batch_from_inputs(item: Mapping[str, Any], model: PreTrainedModel, where: str) -> tuple[TokenBatch, bool]:
    """Return the inputs that the model reads as a batch, and whether they were one row, without a batch dimension.

    Other entries are for the loss or for the user.

    Raises:
        CompressionError: if an input is no array of numbers, or token ids have another shape than the model reads.
    """
    others = {}
    # The names are sorted, as a set of names has another order in every process.
    for name in sorted((readable_inputs(model) & item.keys()) - {"input_ids"}):
        if item[name] is not None:
            others[name] = as_tensor(item[name], f"{where}: {name}")
    mask = item.get("attention_mask")
    if mask is not None:
        mask = as_tensor(mask, f"{where}: attention_mask")
    no_tokens = torch.empty(0, 0, dtype=torch.long)
    if item.get("input_ids") is None:
        return TokenBatch(no_tokens, mask, others), False
    input_ids = as_ids(item["input_ids"], f"{where}: input_ids")
    codes = _codes(input_ids, model, where)
    if codes is not None:
        return TokenBatch(no_tokens, mask, {"input_ids": codes, **others}), False
    if input_ids.dim() not in (1, 2):
        raise CompressionError(
            f"{where}: found input_ids of the shape {tuple(input_ids.shape)}, which {type(model).__name__} does not "
            "read; expected (tokens,) or (samples, tokens)"
        )
    is_row = input_ids.dim() == 1  # a row of a tokenized dataset is a batch of one sequence
    if is_row:
        input_ids = input_ids[None]
        others = {name: tensor[None] if tensor.dim() == 1 else tensor for name, tensor in others.items()}
    if mask is not None:
        if mask.numel() != input_ids.numel():
            raise CompressionError(
                f"{where}: found input_ids of the shape {tuple(input_ids.shape)} and an attention_mask of "
                f"{tuple(mask.shape)}; expected the same"
            )
        mask = mask.reshape(input_ids.shape)
    return TokenBatch(input_ids, mask, others), is_row


def _codes(input_ids: Tensor, model: PreTrainedModel, where: str) -> Tensor | None:
    """Return the codes of several codebooks with one entry per sample, or None if `input_ids` are tokens of a text.

    Raises:
        CompressionError: if the model reads the rows of all codebooks together, and some are missing.
    """
    count = codebooks(model)
    if count:
        if input_ids.dim() in (2, 3) and input_ids.shape[-2] and input_ids.shape[-2] % count == 0:
            return input_ids.reshape(-1, count, input_ids.shape[-1])
        raise CompressionError(
            f"{where}: found input_ids of the shape {tuple(input_ids.shape)}, but {type(model).__name__} reads the "
            f"codes of {count} codebooks together; expected (samples * {count}, tokens)"
        )
    # Others read them position by position, some of them with a token of text beside the codes.
    width = getattr(model.config, "num_codebooks", None)
    if isinstance(width, int) and input_ids.dim() == 3 and input_ids.shape[2] in (width, width + 1):
        return input_ids
    return None


def as_tensor(value: Any, where: str) -> Tensor:
    """Return a value as a tensor on the CPU, or raise CompressionError if it is no array of numbers."""
    try:
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
            value = torch.stack(list(value))
        # What is no tensor yet is copied: arrays of numpy may be read-only, which torch does not like.
        tensor = value if isinstance(value, Tensor) else torch.tensor(value)
        return tensor.detach().cpu()
    except (ValueError, TypeError, RuntimeError) as error:
        raise CompressionError(
            f"{where}: found {described(value)}, expected numbers in rows of one length ({error})"
        ) from error


def as_ids(value: Any, where: str) -> Tensor:
    """Return token ids as an int64 tensor on the CPU, or raise CompressionError if they are no whole numbers."""
    ids = as_tensor(value, where)
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise CompressionError(f"{where}: found token ids of the type {ids.dtype}, expected whole numbers")
    return ids.long()
