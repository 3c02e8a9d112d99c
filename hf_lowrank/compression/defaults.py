"""What a recipe leaves open that depends on the model: the method, and how small the model becomes."""

import logging
from dataclasses import replace

from transformers import PreTrainedModel

from ..methods import make_method
from ..runtime.configuration import CompressionConfig, DefaultMethod, DefaultRatio
from ..runtime.errors import CompressionError
from .checks import check_predicts_next_token

logger = logging.getLogger(__name__)

DEFAULT_BITS = 6.0
"""Stored bits per weight with `auto` where a recipe says nothing of bits, ratio or size: next to nothing is lost."""

WITHOUT_NEXT_TOKENS = "slab"
"""The method of a recipe that names none, for models from which `auto` cannot learn what the loss depends on."""


def with_defaults(model: PreTrainedModel, config: CompressionConfig) -> CompressionConfig:
    """Return a recipe with the method and the bits that it leaves open.

    Args:
        model: the dense model, or its skeleton.
    """
    if isinstance(config.method, DefaultMethod):
        method = str(config.method)
        try:
            check_predicts_next_token(model, make_method(method))
        except CompressionError:
            method = WITHOUT_NEXT_TOKENS
            logger.info("%s predicts no next tokens: the method is %s", type(model).__name__, method)
        config = replace(config, method=method)
    names_no_target = isinstance(config.ratio, DefaultRatio) and config.bits is None and config.size is None
    if config.method == "auto" and names_no_target:
        config = replace(config, bits=DEFAULT_BITS)
    return config
