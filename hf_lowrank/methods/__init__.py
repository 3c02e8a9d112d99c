"""The methods of compression: one file per method, which holds its mathematics only.

There are three kinds of method, by the strategy that `compress()` follows with them (`compression/strategies/`):

- `Method` (base.py), "layerwise": a layer has its budget before it is looked at, and is decomposed within it;
- `SpectralMethod` (spectral.py), "spectral": the spectra of all layers are measured before the ranks are decided on;
- `MixedMethod` (mixed.py), "mixed": a layer can become one of several things, and one budget decides for
  all layers.

Importing this package registers all methods. CONTRIBUTING.md shows how one is added.
"""

from . import (
    asvd,
    auto,
    fwsvd,
    gptq,
    lowrank,
    magnitude,
    oats,
    rtn,
    slab,
    slab_gram,
    soco,
    sola,
    sparsegpt,
    svd,
    svd_llm,
    wanda,
)
from .base import Decomposition, Method, Statistics
from .mixed import Choice, MixedMethod
from .registry import make_method, method_class, register_method, registered_methods
from .spectral import Measurement, SpectralMethod

__all__ = [
    "Choice",
    "Decomposition",
    "Measurement",
    "Method",
    "MixedMethod",
    "SpectralMethod",
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
