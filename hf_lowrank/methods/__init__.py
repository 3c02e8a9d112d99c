"""One file per method, the maths only; importing this package registers them all."""

from . import asvd, auto, fwsvd, gptq, lowrank, magnitude, oats, rtn, slab, slab_gram, soco, sola, sparsegpt, svd, svd_llm, wanda
from .base import Budget, Decomposition, Layer, Method, Statistics
from .registry import make_method, method_class, register_method, registered_methods

__all__ = [
    "Budget",
    "Decomposition",
    "Layer",
    "Method",
    "Statistics",
    "asvd",
    "auto",
    "fwsvd",
    "gptq",
    "lowrank",
    "magnitude",
    "make_method",
    "method_class",
    "oats",
    "register_method",
    "registered_methods",
    "rtn",
    "slab",
    "slab_gram",
    "soco",
    "sola",
    "sparsegpt",
    "svd",
    "svd_llm",
    "wanda",
]
