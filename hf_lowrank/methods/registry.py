"""Methods by name."""

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

from ..runtime.configuration import canonical_method_name
from ..runtime.errors import CompressionError
from .base import Method

_methods: dict[str, type[Method]] = {}


def register_method(name: str) -> Callable[[type[Method]], type[Method]]:
    """Class decorator: make a method known under `name`."""

    canonical = canonical_method_name(name)

    def register(method: type[Method]) -> type[Method]:
        if canonical in _methods:
            taken_by = _methods[canonical].__module__
            raise CompressionError(f"a method named {canonical!r} is registered already: {taken_by}")
        method.name = canonical
        _methods[canonical] = method
        return method

    return register


def registered_methods() -> list[str]:
    """Names of all methods, sorted."""
    return sorted(_methods)


def method_class(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        CompressionError: for an unknown name, with the nearest known one.
    """
    canonical = canonical_method_name(name)
    if canonical not in _methods:
        raise CompressionError(
            f"unknown method {name!r}{_suggestion(canonical, registered_methods())} (hf-lowrank methods lists all)"
        )
    return _methods[canonical]


def make_method(name: str, options: dict[str, Any] | None = None) -> Method:
    """A method with its options; strings, as they come from a command line, are read as the type of the default.

    Raises:
        CompressionError: for an unknown method or option, or a value of the wrong type.
    """
    cls = method_class(name)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for option, value in (options or {}).items():
        if option not in fields:
            known = ", ".join(sorted(fields)) or "none"
            raise CompressionError(
                f"{name} has no option {option!r}{_suggestion(option, list(fields))} (its options: {known})"
            )
        values[option] = _read(name, option, value, fields[option].default)
    return cls(**values)


def _read(method: str, option: str, value: Any, default: Any) -> Any:
    kind = type(default)
    if isinstance(value, str) and kind is not str and default is not None:
        text = value.lower()
        try:
            value = {"true": True, "false": False}[text] if kind is bool else kind(value)
        except (ValueError, KeyError):
            raise CompressionError(
                f"{method}: option {option} is {value!r}, expected a value of type {kind.__name__}"
            ) from None
    elif isinstance(value, str) and default is None and value.lower() == "none":
        value = None
    elif isinstance(value, str) and default is None and value.lstrip("-").isdigit():
        value = int(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if default is not None and type(value) is not kind:
        raise CompressionError(f"{method}: option {option} is {value!r}, expected a value of type {kind.__name__}")
    return value


def _suggestion(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
