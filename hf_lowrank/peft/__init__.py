"""LoRA on compressed models: PEFT's own adapters, with merges that lose nothing.

PEFT chooses a layer for an adapter by the type of the module that the adapter is put on. It would take a compressed
layer for the `nn.Linear` that it stands in for: that trains, but cannot merge. A PEFT config can name other classes
for other modules. The only thing that is changed in PEFT is `BaseTuner.inject_adapter`, which every adapter goes
through, so that each config names our classes. Models without compressed layers never notice.
"""

import functools
import importlib
import sys
from typing import Any

from torch import nn

from ..runtime.compressed_linear import has_compressed_layers
from ..runtime.load_hooks import HOOKED
from .recompression import Truncation, recompress

__all__ = ["Truncation", "extend_peft", "recompress"]

EXTENDED = "peft.tuners.tuners_utils"
"""The module of PEFT that `extend_peft` changes."""


def extend_peft() -> None:
    """Make PEFT use our layers for compressed ones. A second call does nothing.

    It is called as soon as `EXTENDED` has been imported, by whatever program. The rest of PEFT is not imported yet
    then, and therefore `injection`, which needs it, is imported with the first adapter.
    """
    tuner: Any = vars(sys.modules[EXTENDED])["BaseTuner"]
    original = tuner.inject_adapter
    if hasattr(original, HOOKED):
        return

    @functools.wraps(original)
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        inject_as_peft = functools.partial(original, self, model, adapter_name, *args, **kwargs)
        if not has_compressed_layers(model):
            return inject_as_peft()
        injection = importlib.import_module(".injection", __name__)
        return injection.inject(inject_adapter=inject_as_peft, config=self.peft_config[adapter_name], model=model)

    setattr(inject_adapter, HOOKED, True)
    tuner.inject_adapter = inject_adapter
