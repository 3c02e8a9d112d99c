"""The function that `import torch` calls where hf_lowrank is installed, by the entry point `torch.backends`.

By it, a program that never heard of `hf_lowrank` opens compressed checkpoints. Nothing is imported here, and nothing
happens in programs that load no model. `HF_LOWRANK_AUTOLOAD=off` switches it off. `TORCH_DEVICE_BACKEND_AUTOLOAD=0`
does so for every entry point of this kind. `import torch` would fail with whatever is raised here, so that becomes
one warning.
"""

import sys

SWITCH = "HF_LOWRANK_AUTOLOAD"
"""Environment variable that switches the entry point off."""


def register() -> None:
    """Import `hf_lowrank` right after transformers' quantizers, without which `from_pretrained` opens no format."""
    try:
        _register()
    except Exception as error:
        _warn(error)


def _register() -> None:
    import os

    if os.environ.get(SWITCH, "").lower() in ("off", "0", "false", "no"):
        return
    if "hf_lowrank" in sys.modules:  # the program imported it, and its own hooks wait already
        return
    registration = _registration()
    loss = "compressed checkpoints do not open"
    # A program may read a config before it loads any model. The config is checked, too.
    if "transformers.configuration_utils" not in sys.modules:
        registration.after_foreign_import("transformers.models.auto.configuration_auto", _import_package, loss)
    # If the quantizers are what imports torch, they are not complete yet. Whatever uses them is imported after them.
    if "transformers.quantizers.auto" in sys.modules:
        registration.after_foreign_import("transformers.modeling_utils", _import_package, loss)
    else:
        registration.after_foreign_import("transformers.quantizers.auto", _import_package, loss)


def _registration():  # type: ignore[no-untyped-def]
    """Return the module `hf_lowrank.registration`, imported without the package around it.

    An import of the package would import parts of transformers that may be under way already.
    """
    import importlib.util

    name = "hf_lowrank.registration"
    if name not in sys.modules:
        package = importlib.util.find_spec("hf_lowrank")
        if package is None or package.origin is None:
            raise ImportError("the package hf_lowrank is missing, and only its hf_lowrank_autoload.py is there")
        # Asked as an import would ask them, so that it makes no difference whether the package lies in a folder.
        found = (
            finder.find_spec(name, package.submodule_search_locations)
            for finder in sys.meta_path
            if hasattr(finder, "find_spec")
        )
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            raise ImportError(f"{name} is missing")
        registration = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(registration)
        sys.modules[name] = registration  # the package must know which imports are under way
    return sys.modules[name]


def _import_package() -> None:
    import importlib

    # Of a file that was cut off, nothing but the import succeeds.
    if not hasattr(importlib.import_module("hf_lowrank"), "__version__"):
        raise ImportError("the package hf_lowrank is empty")


def _warn(error: Exception) -> None:
    """Say what does not work and how to mend it, on standard error where warnings are errors."""
    import warnings

    reason = " ".join(f"{type(error).__name__}: {error}".split())
    message = (
        f"hf_lowrank: compressed checkpoints do not open in this process ({reason}); "
        f"install hf_lowrank again or uninstall it, or set {SWITCH}=off in programs that do not need it"
    )
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=4)
    except Exception:
        print(message, file=sys.stderr)
