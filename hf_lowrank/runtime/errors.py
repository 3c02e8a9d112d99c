"""The errors that users see.

Every message is one line that names the thing, what was found, what was expected, and the cure.
"""

import logging
from collections.abc import Iterable

logger = logging.getLogger(__name__)
"""Warnings of the runtime, of one line, too."""
LONGEST_MESSAGE = 1000
"""Maximum number of characters of a message. A longer one, as a hostile checkpoint may cause, is cut in its middle."""
LONGEST_PATH = 500
"""Number of characters up to which a path stands in a message as a whole."""

LONGEST_QUOTE = 60
"""Maximum number of characters of what a message quotes of a user's text, rows or options."""
MOST_LISTED = 8
"""Maximum number of names that a message lists."""


class CompressionError(ValueError):
    """Base class of every error that `hf_lowrank` raises on purpose."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class CheckpointError(CompressionError):
    """Raised when a compressed checkpoint, or the config inside it, does not hold what it must."""


class SaveError(CompressionError, OSError):
    """Raised when a model cannot be saved to a folder. It is an OSError, too, as of transformers' own saves."""

    def __init__(self, folder: object, reason: str) -> None:
        super().__init__(f"{folder}: cannot be saved ({reason}); what was there before is as it was")
        self.strerror = reason


class NumericalError(CompressionError):
    """Raised when a value that must be finite is not. The message names the layer."""


def printable(text: str) -> str:
    """Return the text as one line of bounded length, without control characters and lone surrogates.

    Messages quote file names and values of checkpoints. A terminal would obey control characters in them, and
    an encoder would refuse surrogates.
    """
    return "".join(map(_printable_letter, shortened(text, LONGEST_MESSAGE)))


def shortened(text: object, limit: int = LONGEST_QUOTE) -> str:
    """Return a text, or the beginning and the end of one that is longer than the limit."""
    text = str(text)
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} … {text[-half:]}"


def path_in_message(path: object) -> str:
    """Return a path as a whole. What is longer than a path on a disk can be was a text, and is shortened."""
    text = str(path)
    return text if len(text) <= LONGEST_PATH else shortened(text)


def quoted(value: object) -> str:
    """Return a value as it is written in Python, shortened."""
    return shortened(repr(value))


def listed(names: Iterable[object]) -> str:
    """Return the first names for a message, each shortened, and how many more there are."""
    all_names = list(names)
    shown = ", ".join(map(shortened, all_names[:MOST_LISTED]))
    more = len(all_names) - MOST_LISTED
    return f"{shown} and {more} more" if more > 0 else shown


def _printable_letter(letter: str) -> str:
    """Return a printable letter as it is, any white space as a space, and everything else as its escape sequence."""
    if letter.isprintable():
        return letter
    if letter.isspace():
        return " "
    return letter.encode("unicode_escape").decode()
