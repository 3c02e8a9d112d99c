"""The function that `import torch` calls where hf_lowrank is installed, by the entry point `torch.backends`.

By it, a program that never heard of `hf_lowrank` opens compressed checkpoints. Nothing is imported here, and nothing
happens in programs that load no model. `TORCH_DEVICE_BACKEND_AUTOLOAD=0` switches it off.
"""

import importlib
import importlib.util
import sys
from pathlib import Path


def register() -> None:
    """Import `hf_lowrank` right after transformers' quantizers, without which `from_pretrained` opens no format."""
    if "hf_lowrank" in sys.modules:  # the program imported it, and its own hooks wait already
        return
    package = importlib.util.find_spec("hf_lowrank")
    if package is None or package.origin is None:
        return
    # By its path, as an import of the package itself would import transformers.
    file = Path(package.origin).with_name("registration.py")
    spec = importlib.util.spec_from_file_location("hf_lowrank_registration", file)
    if spec is None or spec.loader is None:
        return
    registration = importlib.util.module_from_spec(spec)  # by its path, so that the package itself is not imported yet
    spec.loader.exec_module(registration)
    sys.modules["hf_lowrank.registration"] = registration  # the package must know which imports are under way
    # A program may read a config before it loads any model. The config is checked, too.
    if "transformers.configuration_utils" not in sys.modules:
        registration.after_import("transformers.models.auto.configuration_auto", _import_package)
    # If the quantizers are what imports torch, they are not complete yet. Whatever uses them is imported after them.
    if "transformers.quantizers.auto" in sys.modules:
        registration.after_import("transformers.modeling_utils", _import_package)
    else:
        registration.after_import("transformers.quantizers.auto", _import_package)


def _import_package() -> None:
    importlib.import_module("hf_lowrank")
