"""LoRA on compressed models: PEFT's own, with merges that lose nothing.

PEFT chooses a layer for an adapter by the type of what it is put on, and would take a compressed layer for the `nn.Linear` whose place it
takes: that trains, but cannot merge. A config can name other classes for other layers; the one thing changed in PEFT is
`BaseTuner.inject_adapter`, which every adapter goes through, so that each config names ours. Models without compressed layers never notice.
"""

import functools
import importlib
import sys
from typing import Any

from torch import nn

from ..runtime.layers import CompressedLinear
from .recompression import Truncation, recompress

__all__ = ["Truncation", "extend_peft", "recompress"]

EXTENDED = "peft.tuners.tuners_utils"
"""The module of PEFT that `extend_peft` needs."""


def extend_peft() -> None:
    """Make PEFT know compressed layers; called as soon as `EXTENDED` is imported, by whoever, while the rest of PEFT is not yet."""
    tuner: Any = vars(sys.modules[EXTENDED])["BaseTuner"]
    original = tuner.inject_adapter

    @functools.wraps(original)
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        put = functools.partial(original, self, model, adapter_name, *args, **kwargs)
        if not any(isinstance(module, CompressedLinear) for module in model.modules()):
            return put()
        return importlib.import_module(".injection", __name__).inject(put, self.peft_config[adapter_name], model)

    tuner.inject_adapter = inject_adapter
