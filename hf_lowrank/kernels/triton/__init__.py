"""GPU back end in Triton: fused products for a few tokens, unpacked tiles and the matrix library's products for many.

It was verified in Triton's interpreter and compiled for compute capabilities 8.0 and 9.0. No GPU has run it yet, and
therefore it is off unless it is asked for.
"""

import warnings
from importlib import import_module
from importlib.util import find_spec

import torch

from ...runtime.ops import register_kernel

NAME = "triton"
ON_BY_DEFAULT = False
LEAST_CAPABILITY = (8, 0)
"""The first compute capability whose GPUs have bfloat16."""


def register() -> None:
    """Offer the kernels for the "cuda" device, if this machine can run them."""
    reason = unavailable()
    if reason is None:
        # Imported only now, as `products` imports Triton, which may not be installed.
        for operation, kernel in import_module(f"{__name__}.products").KERNELS.items():
            register_kernel(operation, "cuda", NAME, kernel)
    elif torch.cuda.is_available():  # a machine without a GPU needs no warning about GPUs
        warnings.warn(
            f"hf_lowrank: {reason}; compressed layers compute with plain torch on the GPU, and are slower",
            stacklevel=2,
        )


def describe(operation: str) -> tuple[str, str]:
    """Return the name of the back end of an operation, and what it does here or why it cannot compute it."""
    reason = unavailable()
    if reason is not None:
        return "torch", reason
    products = import_module(f"{__name__}.products")
    if operation.endswith("_grad"):
        does = "rows unpacked in full, some at a time, and multiplied by torch"
    elif operation in ("lowrank_linear", "pivoted_linear"):
        does = f"up to {products.FACTOR_TOKENS} tokens by factor, more: two products of torch"
    else:
        many = "rows unpacked, some at a time, and multiplied by torch"
        does = f"up to {products.FEW_TOKENS} tokens from the packed form, more: {many}"
    return NAME, f"{does}; bfloat16, float16, float32; never run on a GPU before"


def unavailable() -> str | None:
    """Return why this machine cannot run the kernels, or None if it can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if find_spec("triton") is None:
        return "the package triton is not installed; PyTorch's CUDA builds for Linux bring it"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        return "compute capability {}.{}, at least {}.{} is needed".format(*capability, *LEAST_CAPABILITY)
    return None
