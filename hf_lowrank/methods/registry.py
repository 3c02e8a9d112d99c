"""The registry of methods by name, and the reading of their options."""

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

from ..runtime.configuration import canonical_method_name
from ..runtime.errors import CompressionError, quoted
from .base import Method

_methods: dict[str, type[Method]] = {}


def register_method(name: str) -> Callable[[type[Method]], type[Method]]:
    """Return a class decorator that registers a method under the canonical form of `name`.

    Raises:
        CompressionError: if the name is taken (raised by the decorator).
    """
    canonical = canonical_method_name(name)

    def register(method: type[Method]) -> type[Method]:
        if canonical in _methods:
            module = _methods[canonical].__module__
            raise CompressionError(f"a method named {canonical!r} is registered already: {module}")
        method.name = canonical
        _methods[canonical] = method
        return method

    return register


def registered_methods() -> list[str]:
    """Return the names of all methods, sorted."""
    return sorted(_methods)


def method_class(name: str) -> type[Method]:
    """Return the class of a method.

    The name may be written in any case, with hyphens or underscores.

    Raises:
        CompressionError: for an unknown name. The message suggests the names nearest to it.
    """
    canonical = canonical_method_name(name)
    if canonical not in _methods:
        suggestion = _suggestion(canonical, registered_methods())
        raise CompressionError(f"unknown method {quoted(name)}{suggestion} (hf-lowrank methods lists all)")
    return _methods[canonical]


def make_method(name: str, options: dict[str, Any] | None = None) -> Method:
    """Return a method with its options.

    Options may be texts, as they come from a command line. They are read as the type of the option's default.

    Raises:
        CompressionError: for an unknown method or option, or a value of the wrong type.
    """
    cls = method_class(name)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for option, value in (options or {}).items():
        if option not in fields:
            names = ", ".join(sorted(fields)) or "none"
            suggestion = _suggestion(option, list(fields))
            raise CompressionError(f"{cls.name} has no option {quoted(option)}{suggestion} (its options: {names})")
        values[option] = _option_value(cls.name, option, value, fields[option].default)
    return cls(**values)


def _option_value(method: str, option: str, value: Any, default: Any) -> Any:
    """Return `value` in the type of `default`.

    Raises:
        CompressionError: if it cannot be read as that type.
    """
    kind = type(default)
    if isinstance(value, str):
        if default is None:
            value = _read_optional(value)
        elif kind is not str:
            value = _read_text(method, option, value, kind)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    # The type of an option whose default is None is not known here; its method checks it.
    if default is not None and type(value) is not kind:
        raise _wrong_type(method, option, value, kind)
    return value


def _read_text(method: str, option: str, text: str, kind: type) -> Any:
    """Return `text` read as a value of type `kind`."""
    lowered = text.lower()
    try:
        if kind is bool:
            return {"true": True, "false": False}[lowered]
        return kind(lowered)
    except (ValueError, KeyError):
        raise _wrong_type(method, option, text, kind) from None


def _read_optional(text: str) -> Any:
    """Return None for "none", a whole number for digits, and any other text as it is."""
    if text.lower() == "none":
        return None
    if text.lstrip("-").isdigit():
        return int(text)
    return text


def _wrong_type(method: str, option: str, value: Any, kind: type) -> CompressionError:
    return CompressionError(f"{method}: option {option} is {quoted(value)}, expected a value of type {kind.__name__}")


def _suggestion(name: str, candidates: list[str]) -> str:
    """Return the part of an error message that suggests the candidates nearest to `name`, empty if none is near."""
    near = difflib.get_close_matches(name, candidates, n=3)
    if not near:
        return ""
    return f"; did you mean {' or '.join(map(repr, near))}?"
