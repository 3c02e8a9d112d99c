"""Doing something as soon as a module has been imported, without importing it."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

_RUNNING: dict[str, list[Callable[[], object]]] = {}
"""Actions that wait for modules which are being imported now. Those are in `sys.modules`, but not complete."""


def after_import(name: str, action: Callable[[], object]) -> None:
    """Call `action` once, right after the module `name` is first imported, or at once if it is imported already."""
    if name in _RUNNING:
        _RUNNING[name].append(action)
    elif name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Watcher(name, action))


class _Watcher(importlib.abc.MetaPathFinder):
    """A finder that lets the other finders find the module, and has the module's loader call the action at the end."""

    def __init__(self, name: str, action: Callable[[], object]) -> None:
        self.name = name
        self.action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)  # so that the search below finds the module and not this watcher again
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            is_outermost = fullname not in _RUNNING  # one module may have several watchers, each around the next
            waiting = _RUNNING.setdefault(fullname, [])
            try:
                execute(module)
            finally:
                if is_outermost:
                    del _RUNNING[fullname]
            self.action()
            if is_outermost:
                for action in waiting:
                    action()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
