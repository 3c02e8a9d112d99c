"""The dtype that most float numbers of a checkpoint have, and the warning if a save makes it wider than it was."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from .config_checks import TORCH_NAMES
from .safetensors_headers import StoredTensor


def usual_dtype(stored: Mapping[str, StoredTensor]) -> torch.dtype | None:
    """Return the dtype of most float numbers in a checkpoint. None if it has none."""
    numbers: Counter[str] = Counter()
    for tensor in stored.values():
        if tensor.dtype in TORCH_NAMES:
            numbers[tensor.dtype] += math.prod(tensor.shape)
    if not numbers:
        return None
    dtype: torch.dtype = getattr(torch, TORCH_NAMES[numbers.most_common(1)[0][0]])
    return dtype


def width_warning(tensors: Iterable[Any], known: Sequence[Any], intended: torch.dtype | None) -> str | None:
    """Return a warning, without the folder, if most float numbers of a model are wider than they were.

    Args:
        tensors: what is saved. Values that are no tensors are passed over.
        known: dtypes that the model was compressed in and loaded from, as far as they are known.
        intended: a dtype that is meant to be.
    """
    numbers: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            numbers[tensor.dtype] += tensor.numel()
    earlier = [dtype for dtype in known if isinstance(dtype, torch.dtype)]
    if not numbers or not earlier:
        return None
    (dtype, count), usual = numbers.most_common(1)[0], min(earlier, key=lambda dtype: dtype.itemsize)
    if dtype.itemsize <= usual.itemsize or dtype == intended:
        return None
    names = [str(each).removeprefix("torch.") for each in (dtype, usual)]
    return (
        f"saved in {names[0]}, though the model was in {names[1]}: "
        f"{count * (dtype.itemsize - usual.itemsize):,} bytes more than it needs; "
        f"call model.to({usual}) before you save it"
    )
