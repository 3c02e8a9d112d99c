"""The operations that compiled graphs call, as kernels of torch's dispatcher (see operators.cpp)."""

import ctypes
import sys
from functools import cache
from pathlib import Path

import torch

from . import native

FUNCTIONS = (
    "aoti_torch_device_type_cpu",
    "aoti_torch_dtype_uint8",
    "aoti_torch_dtype_float16",
    "aoti_torch_dtype_bfloat16",
    "aoti_torch_dtype_float32",
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_dim",
    "aoti_torch_get_sizes",
    "aoti_torch_get_strides",
    "aoti_torch_get_dtype",
    "aoti_torch_get_device_type",
    "aoti_torch_empty_strided",
    "aoti_torch_delete_tensor_object",
    "torch_get_num_threads",
    "torch_call_dispatcher",
    "aoti_torch_library_init_impl",
    "torch_library_impl",
)
"""C functions of torch that operators.cpp calls, in the order of its `struct Torch`. Torch 2.10 has all of them."""
ERROR_TEXT = "torch_exception_get_what_without_backtrace"
"""Function that returns the message of the last error, where torch has it."""
FILES = {"linux": "libtorch_cpu.so", "darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}


def use(enabled: bool) -> None:
    """Let compiled graphs compute with these kernels, or not. Where torch lacks their functions, nothing happens."""
    if registered():
        native.loaded().hf_lowrank_use_operators(ctypes.c_int32(enabled))


@cache
def registered() -> bool:
    """Register the kernels with torch, once in a process. Return whether that was possible."""
    functions = _functions()
    if functions is None:
        return False
    refused: int = native.loaded().hf_lowrank_register_operators(functions)
    return refused == 0


def _functions() -> ctypes.Array[ctypes.c_void_p] | None:
    """Return the addresses of torch's functions, None where torch is too old or its library lies elsewhere."""
    path = Path(torch.__file__).parent / "lib" / FILES.get(sys.platform, "libtorch_cpu.so")
    try:
        library = ctypes.CDLL(str(path))  # loaded already, by torch
        addresses = [_address(library, name) for name in FUNCTIONS]
    except (OSError, AttributeError):
        return None
    error_text = _address(library, ERROR_TEXT) if hasattr(library, ERROR_TEXT) else None
    return (ctypes.c_void_p * (len(addresses) + 1))(*addresses, error_text)


def _address(library: ctypes.CDLL, name: str) -> int | None:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value
