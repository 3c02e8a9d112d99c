"""The back ends under test, each registered as a whole.

The C++ library is tested once per instruction set, and once as a module that takes tensors itself. Triton is tested on
a GPU or in its interpreter.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowrank import kernels
from hf_lowrank.kernels.cpu import native
from hf_lowrank.runtime import ops, quantized_ops

from .layers import FACTORED, PackedLayer, operation_of

DIRECT = tuple(operation for operation in kernels.OPERATIONS if not operation.endswith("_grad"))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class BackEnd:
    """A back end in use.

    Attributes:
        kernels: its kernels by operation.
        exact_tokens: largest number of tokens for which the entries of the matrix are not rounded.
        exact_joined_tokens: this number for a matrix whose entries are put together first, from kept values and signs
            or from codes and scales.
        exact_masked_codes: this number for codes with a bitmap.
        largest: largest numbers of rows, columns and tokens to draw at random. The interpreter is slow.
        factor_tokens: largest number of tokens for which it computes low-rank products itself.
    """

    kernels: dict[str, Callable[..., Tensor | None]]
    exact_tokens: int
    exact_joined_tokens: int
    exact_masked_codes: int
    device: str = "cpu"
    largest: tuple[int, int, int] = (150, 1200, 72)
    factor_tokens: int = 16

    def kernel(self, form: str, x: Tensor, layer: PackedLayer) -> Tensor | None:
        """Return what the kernel itself returns."""
        y = self.kernels[operation_of(form)](*self.placed(x, *layer.arguments(form)))
        return None if y is None else y.cpu()

    def declared(self, form: str, x: Tensor, layer: PackedLayer) -> Tensor:
        """Return the product by the declared operation."""
        module = quantized_ops if form.startswith("quantized") else ops
        y: Tensor = getattr(module, operation_of(form))(*self.placed(x, *layer.arguments(form)))
        return y.cpu()

    def gradient(self, operation: str, grad: Tensor, *arguments: Any) -> Tensor:
        result = self.kernels[operation](*self.placed(grad, *arguments))
        assert result is not None
        return result.cpu()

    def placed(self, *arguments: Any) -> list[Any]:
        return [argument.to(self.device) if isinstance(argument, Tensor) else argument for argument in arguments]

    def rounds(self, form: str, tokens: int) -> bool:
        joined = form == "bitmask_binary_linear" or form.startswith("quantized")
        exact = self.exact_joined_tokens if joined else self.exact_tokens
        return tokens > (self.exact_masked_codes if form == "quantized_linear, bitmask" else exact)

    def takes(self, form: str, tokens: int) -> bool:
        return form not in FACTORED or tokens <= self.factor_tokens


def instruction_sets() -> tuple[str, ...]:
    if native.library_path() is None:
        return ()
    return native.INSTRUCTION_SETS[: native.INSTRUCTION_SETS.index(native.best_instruction_set()) + 1]


NAMES = [
    *(pytest.param(name) for name in instruction_sets()),
    *(["direct"] if native.module() else []),
    pytest.param(
        "triton", marks=pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")
    ),
]


@contextmanager
def in_use(name: str) -> Iterator[BackEnd]:
    """Have one back end compute what it takes."""
    from hf_lowrank.kernels.cpu import products as cpp

    if name == "direct" or name in native.INSTRUCTION_SETS:
        avx512 = (native.instruction_set_in_use() if name == "direct" else name) == "avx512"
        exact = {
            "exact_tokens": cpp.FEW_TOKENS,
            "exact_joined_tokens": 8 if avx512 else cpp.FEW_TOKENS,
            "exact_masked_codes": 4 if avx512 else cpp.FEW_TOKENS,
        }
    if name in native.INSTRUCTION_SETS:
        with native.forced_instruction_set(name):
            yield BackEnd(cpp.KERNELS, **exact)
        return
    if name == "direct":
        direct = {operation: getattr(native.module(), operation) for operation in DIRECT}
        with torch.no_grad():
            yield BackEnd(cpp.KERNELS | direct, largest=(150, 1200, cpp.FEW_TOKENS), **exact)
        return
    from hf_lowrank.kernels.triton import products

    device = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
    for operation, kernel in products.KERNELS.items():
        ops.register_kernel(operation, device, "triton", kernel)
    try:
        with nullcontext() if device == "cuda" else multiplying_bfloat16():
            exact = products.VECTOR_TOKENS
            yield BackEnd(
                products.KERNELS,
                exact,
                exact,
                exact,
                device,
                largest=(20, 400, 20),
                factor_tokens=products.FACTOR_TOKENS,
            )
    finally:
        ops.unregister_kernels()
        kernels.load()


@contextmanager
def multiplying_bfloat16() -> Iterator[None]:
    """Have `tl.dot` multiply bfloat16 in Triton's interpreter, which would multiply the bits as integers."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    def of_numbers(self: Any, a: Any, b: Any, *further: Any) -> Any:
        return multiply(self, widened(a), widened(b), *further)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", of_numbers)
        yield
