"""One file per method, the maths only; importing this package registers them all."""

from . import slab, svd
from .base import Budget, Decomposition, Layer, Method, Statistics
from .registry import make_method, method_class, register_method, registered_methods

__all__ = [
    "Budget",
    "Decomposition",
    "Layer",
    "Method",
    "Statistics",
    "make_method",
    "method_class",
    "register_method",
    "registered_methods",
    "slab",
    "svd",
]
