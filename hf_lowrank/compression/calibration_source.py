"""What a run calibrates on, and the tokenizer that reads it, where the caller has left that open."""

import logging
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from ..calibration.texts import BUNDLED
from ..execution.files import one_line
from ..runtime.errors import CompressionError
from ..runtime.origin import Origin

SAMPLES_INSTEAD = (
    "without a tokenizer the bundled text cannot be read: calibrating on text sampled from the model itself; "
    "give a tokenizer to calibrate on the bundled text"
)
"""What is said where a model is calibrated on itself though nobody asked for it."""

logger = logging.getLogger(__name__)


def resolve_calibration(model: PreTrainedModel, source: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Return what to calibrate on, and the tokenizer for it.

    A text that is named is read with the tokenizer that lies beside the model, if none is given. In place of the
    bundled text, a model that has no tokenizer anywhere is calibrated on text sampled from itself, with a warning.

    Args:
        source: what the caller gives, or else what the config names.

    Raises:
        CompressionError: if the bundled text cannot be read, and nothing can be sampled from the model either.
    """
    if tokenizer is not None or not isinstance(source, str) or source == "self":
        return source, tokenizer
    tokenizer = _tokenizer_beside(model)
    if tokenizer is not None or source != BUNDLED:
        return source, tokenizer
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise CompressionError(
            f"calibration: {type(model).__name__} has no tokenizer to read the bundled text with; give one "
            "(compress(model, config, tokenizer=...)), or token ids as calibration="
        )
    logger.warning(SAMPLES_INSTEAD)
    return "self", None


def _tokenizer_beside(model: PreTrainedModel) -> Any:
    """Return the tokenizer of the folder or the repo that a model was loaded from. None if it has none that opens."""
    origin = Origin.of(model)
    if not origin.source:
        return None
    try:
        return AutoTokenizer.from_pretrained(
            origin.folder or origin.source,
            subfolder=origin.subfolder,
            revision=origin.revision,
            cache_dir=origin.cache_dir,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:  # as for any tokenizer that is not there or damaged
        logger.warning("no tokenizer beside the model (%s)", one_line(error))
        return None
