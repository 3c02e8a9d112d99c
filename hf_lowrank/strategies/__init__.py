"""How a model is walked: block by block at once, or all of it first to decide what each layer gets."""

from .choose_then_build import choose_then_build
from .layer_by_layer import layer_by_layer
from .measure_then_decide import measure_then_decide
from .refine import refine
from .run import Run

__all__ = ["Run", "choose_then_build", "layer_by_layer", "measure_then_decide", "refine"]
