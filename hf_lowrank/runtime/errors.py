"""The errors that users see: one line that names the thing, what was found, what was expected, and the cure."""

LONGEST_MESSAGE = 1000
"""Characters; what a hostile checkpoint has put into a message is cut in its middle."""


class CompressionError(ValueError):
    """Base of every error that `hf_lowrank` raises on purpose."""

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class CheckpointError(CompressionError):
    """A compressed checkpoint, or the config inside it, does not say what it must."""


class NumericalError(CompressionError):
    """A value that must be finite is not; the message names the layer."""


def one_line(text: str) -> str:
    """The text on one line of bounded length, with nothing in it that a terminal would obey or an encoder refuse."""
    if len(text) > LONGEST_MESSAGE:
        half = LONGEST_MESSAGE // 2
        text = f"{text[:half]} … {text[-half:]}"
    return "".join(
        letter if letter.isprintable() else " " if letter.isspace() else letter.encode("unicode_escape").decode()
        for letter in text
    )
