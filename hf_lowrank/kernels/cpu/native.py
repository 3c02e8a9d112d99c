"""The C++ library: finding it, its C interface, and which of its instruction sets is in use."""

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
"""From the slowest to the fastest; the position is the number in the C interface."""
ENVIRONMENT_VARIABLE = "HF_LOWRANK_CPU_ISA"

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The dtypes the library computes with, and their numbers in the C interface."""


class Product(ctypes.Structure):
    """`struct Product` of product.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "columns", "rows")),
        *((name, ctypes.c_void_p) for name in ("x", "y", "values", "mask")),
        ("kept", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("signs", "scale_in", "scale_out")),
        ("binary_rank", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("lowrank_a", "lowrank_b")),
        ("rank", ctypes.c_int64),
        ("pivots", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("codes", "code_scale")),
        ("group", ctypes.c_int64),
        ("code_bits", ctypes.c_int32),
        *(
            (name, ctypes.c_int32)
            for name in ("x_dtype", "values_dtype", "scale_dtype", "lowrank_dtype", "code_scale_dtype")
        ),
        *((name, ctypes.c_int32) for name in ("threads", "instruction_set")),
    ]


def library_path() -> Path | None:
    """The built extension beside this file, or None."""
    candidates = (Path(__file__).with_name(f"_native{suffix}") for suffix in EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.exists()), None)


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None after one warning."""
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
    """The library, for kernels, which are only registered where there is one."""
    native = library()
    assert native is not None
    return native


@cache
def module() -> ModuleType | None:
    """The library as a module of functions that take tensors; None where it was built without Python's headers or torch is too old."""
    try:
        functions = import_module(f"{__package__}._native") if library() else None
    except ImportError:
        return None
    if functions is not None:
        functions.use_instruction_set(instruction_set())
    return functions


@cache
def best_instruction_set() -> str:
    """The fastest instruction set that both the library and this processor have."""
    native = library()
    return INSTRUCTION_SETS[native.hf_lowrank_instruction_set() if native else 0]


_forced: list[int] = []


def instruction_set() -> int:
    """The number of the instruction set in use: the forced one, the environment's, or the best."""
    return _forced[-1] if _forced else _from_environment()


def instruction_set_in_use() -> str:
    """Its name."""
    return INSTRUCTION_SETS[instruction_set()]


@cache
def _from_environment() -> int:
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    return INSTRUCTION_SETS.index(best_instruction_set()) if name is None else _number(name)


@contextmanager
def forced_instruction_set(name: str) -> Iterator[None]:
    """Use one instruction set for all threads of the process, for tests and benchmarks.

    Raises:
        ValueError: if it is unknown or this processor lacks it.
    """
    _forced.append(_number(name))
    functions = module()
    try:
        if functions is not None:
            functions.use_instruction_set(instruction_set())
        yield
    finally:
        _forced.pop()
        if functions is not None:
            functions.use_instruction_set(instruction_set())


def _number(name: str) -> int:
    available = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(best_instruction_set()) + 1]
    if name not in available:
        raise ValueError(
            f"instruction set {name!r} is not available here, expected one of {', '.join(available)}; unset {ENVIRONMENT_VARIABLE}"
        )
    return INSTRUCTION_SETS.index(name)
