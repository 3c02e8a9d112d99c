"""What `import torch` runs where hf_lowrank is installed (entry point `torch.backends`): the plugin registers itself when it is needed.

So a program that never heard of `hf_lowrank` opens compressed checkpoints. Nothing is imported here, and nothing happens in programs that
load no model; `TORCH_DEVICE_BACKEND_AUTOLOAD=0` switches it off.
"""

import importlib
import importlib.util
import sys
from pathlib import Path


def register() -> None:
    """Import `hf_lowrank` right after transformers' quantizers, which know every format that `from_pretrained` opens."""
    package = importlib.util.find_spec("hf_lowrank")
    if package is None or package.origin is None:
        return
    spec = importlib.util.spec_from_file_location(
        "hf_lowrank_registration", Path(package.origin).with_name("registration.py")
    )
    if spec is None or spec.loader is None:
        return
    registration = importlib.util.module_from_spec(spec)  # by its path: the package itself would import transformers
    spec.loader.exec_module(registration)
    sys.modules["hf_lowrank.registration"] = registration  # the package is to know which imports are under way
    # if the quantizers are what imports torch, they are not complete yet; what needs them is imported later
    if "transformers.configuration_utils" not in sys.modules:  # a config is read before any model: it is checked, too
        registration.after_import(
            "transformers.models.auto.configuration_auto", lambda: importlib.import_module("hf_lowrank")
        )
    name = (
        "transformers.modeling_utils"
        if "transformers.quantizers.auto" in sys.modules
        else "transformers.quantizers.auto"
    )
    registration.after_import(name, lambda: importlib.import_module("hf_lowrank"))
