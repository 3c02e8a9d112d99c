"""Hooks of modules that are taken off again."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def temporary_hooks(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Remove the hooks with these handles when the `with` block ends, also by an error."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
