"""Doing something as soon as a module has been imported, without importing it, and without breaking its import."""

import importlib.machinery
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

ADVICE = (
    "install hf_lowrank again (pip install --force-reinstall --no-deps hf_lowrank) beside versions that it supports "
    "(transformers >= 5.0, torch >= 2.6), or set HF_LOWRANK_AUTOLOAD=off in programs that do not need it"
)
"""Cure for whatever goes wrong in an action that waits for another library."""

_WAITING: dict[str, list[Callable[[], object]]] = {}
"""Actions by the module that they wait for."""
_RUNNING: set[str] = set()
"""Modules among these that are being imported now. They are in `sys.modules`, but not complete."""
_has_warned = False


def after_import(name: str, action: Callable[[], object]) -> None:
    """Call `action` once, right after the module `name` is first imported, or at once if it is imported already."""
    if name in sys.modules and name not in _RUNNING:
        action()
        return
    _WAITING.setdefault(name, []).append(action)
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


def after_foreign_import(name: str, action: Callable[[], object], loss: str) -> None:
    """Do the same for a module of another library, whose import must succeed even where `action` raises."""
    after_import(name, lambda: attempt(action, loss))


def attempt(action: Callable[[], object], loss: str) -> None:
    """Call `action`. If it raises, warn of what does not work now (`loss`) instead.

    Later failures in the same process are not told, as they have the same cause.
    """
    global _has_warned
    try:
        action()
    except Exception as error:  # whatever it is, the program may not need what is lost
        if not _has_warned:
            _has_warned = True
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            _warn(f"hf_lowrank: {loss} in this process ({reason}); {ADVICE}")


def _warn(message: str) -> None:
    """Warn, on standard error if warnings are errors here."""
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    except Exception:
        print(message, file=sys.stderr)


class _Finder:
    """Lets the other finders find a module that is waited for, and its loader call the actions at the end.

    It is in `sys.meta_path` only while an action waits. Other programs may take it out, wrap it, or only ask where a
    module is.
    """

    def __init__(self) -> None:
        self.searching = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _WAITING:
            return None
        outer = getattr(self.searching, "name", None)
        if fullname == outer:
            return None
        self.searching.name = fullname  # a finder that wraps this one would otherwise ask it for ever
        try:
            spec = _find_by_others(fullname, path, target)
        finally:
            self.searching.name = outer
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


_FINDER: Any = _Finder()


def _find_by_others(
    fullname: str, path: Sequence[str] | None, target: ModuleType | None
) -> importlib.machinery.ModuleSpec | None:
    """Return what the first other finder that knows the module says about it."""
    for finder in list(sys.meta_path):
        if finder is not _FINDER and hasattr(finder, "find_spec"):
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                return spec
    return None


class _Loader:
    """Loads one module by its own loader and then calls the actions that wait for it."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["loader"], name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        create = getattr(self.loader, "create_module", None)
        module: ModuleType | None = None if create is None else create(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        # From here on nobody sees this loader any more: not the module, and not whoever looks for its source or data.
        module.__loader__ = self.loader
        name = module.__name__
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
            name = module.__spec__.name
        _RUNNING.add(name)
        try:
            self.loader.exec_module(module)
        finally:
            _RUNNING.discard(name)
        # An action that raises makes the import fail. All of them are called again at the next attempt.
        for action in _WAITING.get(name, []):
            action()
        _WAITING.pop(name, None)
        if not _WAITING and _FINDER in sys.meta_path:
            sys.meta_path.remove(_FINDER)
