"""How a model is walked: block by block at once, or all of it first to decide what each layer gets."""

from .layerwise import layer_by_layer
from .mixed import choose_then_build
from .refine import refine
from .spectral import measure_then_decide

__all__ = ["choose_then_build", "layer_by_layer", "measure_then_decide", "refine"]
