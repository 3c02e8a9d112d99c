"""Hooks and `forward` methods of modules that are taken off again."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def temporary_hooks(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Remove the hooks with these handles when the `with` block ends, also by an error."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced_forwards(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let modules compute by other functions while active.

    Args:
        forwards: the function of each module, with the signature of its `forward`, which models inspect.
    """
    # A module that accelerate has hooks on has a `forward` of its own, which is put back.
    own_forwards = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module, own_forward in own_forwards.items():
            del vars(module)["forward"]
            if own_forward is not None:
                vars(module)["forward"] = own_forward
