"""Putting adapters of any kind on a model with compressed layers."""

import functools
from collections.abc import Callable
from typing import Any

import peft
from packaging.version import Version
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..runtime.errors import CompressionError
from ..runtime.layers import CompressedLinear
from .lora import CompressedLoraLinear

TESTED = "0.18 to 0.21"
"""Versions of PEFT that were tested. Older ones do not run with Transformers 5."""

BESIDE_THE_LAYER = (
    *("ADALORA", "BEFT", "BOFT", "C3A", "FOURIERFT", "GRALORA", "IA3", "LILY"),
    *("MISS", "OFT", "PVERA", "RANDLORA", "ROAD", "UNILORA", "VBLORA", "VERA"),
)
"""Adapters that see only what goes into a layer and what comes out of it.

They do the same on a compressed layer as on a dense one. All others read the layer's weight, and would take packed
values for it.
"""


def inject(inject_adapter: Callable[[], Any], config: Any, model: nn.Module) -> Any:
    """Put an adapter on a model that has compressed layers.

    LoRA gets layers of our own, which merge exactly. The layers of other adapters raise when they are to be merged:
    they would change `weight` as if it were the whole matrix. Some shapes allow that, and the result would be silently
    wrong.

    Args:
        inject_adapter: PEFT's own injection.
        config: the adapter's config.

    Raises:
        CompressionError: for adapters that work on the weight of a layer, if they are put on a compressed one.
    """
    _check_version()
    is_lora = isinstance(config, peft.LoraConfig)
    if is_lora:
        # PEFT asks these classes first when it chooses a layer.
        config._register_custom_module({CompressedLinear: CompressedLoraLinear})
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    leaves_weight_alone = is_lora or kind in BESIDE_THE_LAYER
    try:
        result = inject_adapter()
    except (RuntimeError, TypeError, IndexError) as error:
        # Adapters that read the weight fail in ways of their own when its shape is not that of the layer.
        if leaves_weight_alone:
            raise
        raise _no_dense_weight(kind) from error
    for name, adapter in _foreign_adapters(model):
        if not leaves_weight_alone:
            raise _no_dense_weight(kind)
        adapter.merge = functools.partial(_refuse, f"{name}: {kind}")
    return result


def _check_version() -> None:
    """Raise CompressionError if PEFT is older than what was tested, or cannot register classes of layers."""
    oldest = Version(TESTED.partition(" ")[0])
    if Version(peft.__version__) < oldest or not hasattr(peft.LoraConfig, "_register_custom_module"):
        raise CompressionError(
            f"peft {peft.__version__}: adapters on compressed layers were tested with {TESTED}; install one of these"
        )


def _foreign_adapters(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the adapters on compressed layers that are not our LoRA, by name."""
    adapters = []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, CompressedLoraLinear):
            if isinstance(module.get_base_layer(), CompressedLinear):
                adapters.append((name, module))
    return adapters


def _no_dense_weight(kind: str) -> CompressionError:
    return CompressionError(
        f"{kind} adapters work on the dense weight of a layer, which compressed layers do not have; "
        "use LoRA (peft.LoraConfig), or name only dense layers in target_modules"
    )


def _refuse(what: str, *args: Any, **kwargs: Any) -> None:
    """Raise CompressionError in place of a merge that would be wrong."""
    raise CompressionError(
        f"{what} cannot be merged exactly into a compressed layer; leave it unmerged, "
        "train a LoRA (peft.LoraConfig) instead, or make the model dense first (model.dequantize())"
    )
