"""Causal attention on a CPU, computed a few queries at a time over the keys that they see.

PyTorch's own kernel for CPUs computes sequences of up to 512 tokens as if every query saw every key, and multiplies
bfloat16 no faster than float32. Here no more than the lower triangle is computed, by products of bfloat16 that are
summed in float32: half the time, and results that are no less exact.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .grams import products_of

QUERIES_AT_ONCE = 64
"""Number of queries that are computed at a time."""


class CausalAttention(TorchFunctionMode):
    """While active, computes `scaled_dot_product_attention` by `causal_attention` where that is what it means.

    It applies to bfloat16 on a CPU without gradients. Everything else is left to PyTorch.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and _is_plainly_causal(*args, **kwargs):
            return causal_attention(args[0], args[1], args[2], kwargs.get("scale"))
        return func(*args, **kwargs)


def _is_plainly_causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Return whether a call of `scaled_dot_product_attention` with these arguments can be computed here."""
    tensors = (query, key, value)
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    is_known = all(tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16 for tensor in tensors)
    fits = query.dim() == key.dim() == value.dim() == 4 and query.shape[2] == key.shape[2] == value.shape[2]
    return is_causal and attn_mask is None and dropout_p == 0 and is_known and fits and not needs_gradient


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Return softmax(scale · Q Kᵀ) V, (B, H, T, d'), where each query sees the keys up to its own place.

    Args:
        query: (B, H, T, d).
        key, value: (B, H', T, d) and (B, H', T, d'), with H' a divisor of H: so many queries share a head.
        scale: 1/√d by default.
    """
    heads, length, width = query.shape[1:]
    if scale is None:
        scale = width**-0.5
    # Float32 matrices that hold bfloat16 values are multiplied as such here, and summed in float32.
    q, k, v = query.float(), key.float().transpose(2, 3), value.float()
    k, v = (tensor.repeat_interleave(heads // tensor.shape[1], dim=1) for tensor in (k, v))
    result = torch.empty(*query.shape[:3], v.shape[3], dtype=query.dtype)
    later = torch.ones(QUERIES_AT_ONCE, QUERIES_AT_ONCE, dtype=torch.bool).triu(1)
    with products_of(query.dtype):
        for start in range(0, length, QUERIES_AT_ONCE):
            end = min(start + QUERIES_AT_ONCE, length)
            scores = (q[:, :, start:end] @ k[..., :end]).mul_(scale)
            scores[..., start:].masked_fill_(later[: end - start, : end - start], -torch.inf)
            result[:, :, start:end] = scores.softmax(dim=-1) @ v[:, :, :end]
    return result
