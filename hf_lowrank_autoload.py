"""The entry point `torch.backends`, which `import torch` runs where hf_lowrank is installed.

It has the plugin register itself when it is needed, so that a program that never heard of `hf_lowrank` opens
compressed checkpoints. Nothing is imported here, and nothing happens in programs that load no model.
`TORCH_DEVICE_BACKEND_AUTOLOAD=0` switches it off.
"""

import importlib
import importlib.util
import sys
from pathlib import Path


def register() -> None:
    """Have `hf_lowrank` imported right after transformers' quantizers, which know every format of checkpoints."""
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
    registration = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(registration)
    # The package must use this very module, which records the imports that are under way.
    sys.modules["hf_lowrank.registration"] = registration
    # A config is read before any model, and is checked too.
    if "transformers.configuration_utils" not in sys.modules:
        registration.after_import("transformers.models.auto.configuration_auto", action=_import_package)
    # If the quantizers are what imports torch, they are not complete yet. A module that needs them is imported later.
    awaited = "transformers.quantizers.auto"
    if awaited in sys.modules:
        awaited = "transformers.modeling_utils"
    registration.after_import(awaited, action=_import_package)


def _import_package() -> None:
    importlib.import_module("hf_lowrank")
