"""The errors that users see: one line that names the thing, what was found, what was expected, and the cure."""


class CompressionError(ValueError):
    """Base of every error that `hf_lowrank` raises on purpose."""


class CheckpointError(CompressionError):
    """A compressed checkpoint, or the config inside it, does not say what it must."""


class NumericalError(CompressionError):
    """A value that must be finite is not; the message names the layer."""
