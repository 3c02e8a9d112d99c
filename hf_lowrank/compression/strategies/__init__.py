"""How a model is walked: block by block at once, or all of it first to decide what each layer gets."""

from .layerwise import layerwise
from .mixed import mixed_strategy
from .refine import refine
from .spectral import spectral_strategy

__all__ = ["layerwise", "mixed_strategy", "refine", "spectral_strategy"]
