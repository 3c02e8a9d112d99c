"""The C++ library: where it lies, its C interface, and which of its instruction sets is in use."""

import ctypes
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

INSTRUCTION_SETS = ("portable", "avx2", "avx512")
"""Names from the slowest to the fastest. A name's position is its number in the C interface."""
ENVIRONMENT_VARIABLE = "HF_LOWRANK_CPU_ISA"

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The dtypes that the library computes with, and their numbers in the C interface."""


class Product(ctypes.Structure):
    """`struct Product` of product.h, field by field in the same order."""

    _fields_ = [
        ("tokens", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        # the sparse part
        ("values", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("kept", ctypes.c_int64),
        # the binary part
        ("signs", ctypes.c_void_p),
        ("scale_in", ctypes.c_void_p),
        ("scale_out", ctypes.c_void_p),
        ("binary_rank", ctypes.c_int64),
        # the low-rank part, and its pivots
        ("lowrank_a", ctypes.c_void_p),
        ("lowrank_b", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("pivots", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        # the quantized matrix
        ("codes", ctypes.c_void_p),
        ("code_scale", ctypes.c_void_p),
        ("group", ctypes.c_int64),
        ("code_bits", ctypes.c_int32),
        # numbers of `DTYPES`
        ("x_dtype", ctypes.c_int32),
        ("values_dtype", ctypes.c_int32),
        ("scale_dtype", ctypes.c_int32),
        ("lowrank_dtype", ctypes.c_int32),
        ("code_scale_dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("instruction_set", ctypes.c_int32),
    ]


def library_path() -> Path | None:
    """Return the built extension beside this file, or None if there is none."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.exists():
            return path
    return None


@cache
def library() -> ctypes.CDLL | None:
    """Return the loaded library, or None after one warning if it was not built."""
    path = library_path()
    if path is None:
        warnings.warn(
            "hf_lowrank: the CPU kernels were not built, compressed layers compute with plain torch and are slower; "
            "install a C++ compiler and reinstall hf_lowrank",
            stacklevel=2,
        )
        return None
    return ctypes.CDLL(str(path))


def loaded() -> ctypes.CDLL:
    """Return the library to a kernel. Kernels are registered only where there is a library."""
    native = library()
    assert native is not None
    return native


@cache
def module() -> ModuleType | None:
    """Return the library as a Python module of functions that take tensors.

    It is None where the library was not built, was built without Python's headers, or torch is too old to offer its
    tensors through DLPack's C functions.
    """
    if library() is None:
        return None
    try:
        return import_module(f"{__package__}._native")
    except ImportError:
        return None


@cache
def best_instruction_set() -> str:
    """Return the fastest instruction set that both the library and this processor have."""
    native = library()
    if native is None:
        return INSTRUCTION_SETS[0]
    return INSTRUCTION_SETS[native.hf_lowrank_instruction_set()]


_forced: list[int] = []
"""Numbers of the instruction sets of the `forced_instruction_set` blocks that are open, the innermost last."""


def instruction_set() -> int:
    """Return the number of the instruction set in use: the forced one, else the environment's, else the best.

    Raises:
        ValueError: if the environment names one that is unknown or that this processor lacks.
    """
    if _forced:
        return _forced[-1]
    return _from_environment()


def instruction_set_in_use() -> str:
    """Return the name of the instruction set in use."""
    return INSTRUCTION_SETS[instruction_set()]


@cache
def _from_environment() -> int:
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    if name is None:
        return INSTRUCTION_SETS.index(best_instruction_set())
    return _number(name)


@contextmanager
def forced_instruction_set(name: str) -> Iterator[None]:
    """Use one instruction set for all threads of the process, for tests and benchmarks.

    Raises:
        ValueError: if it is unknown or this processor lacks it.
    """
    _forced.append(_number(name))
    try:
        share_instruction_set()
        yield
    finally:
        _forced.pop()
        share_instruction_set()


def share_instruction_set() -> None:
    """Tell the library which instruction set is in use, for calls that do not pass through Python."""
    native = library()
    if native is not None:
        native.hf_lowrank_use_instruction_set(ctypes.c_int32(instruction_set()))


def _number(name: str) -> int:
    """Return the number of an instruction set, or raise ValueError if it is unknown or this processor lacks it."""
    # A processor that has an instruction set has the slower ones too.
    available = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(best_instruction_set()) + 1]
    if name not in available:
        raise ValueError(
            f"instruction set {name!r} is not available here, expected one of {', '.join(available)}; "
            f"unset {ENVIRONMENT_VARIABLE}"
        )
    return INSTRUCTION_SETS.index(name)
