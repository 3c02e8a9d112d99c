"""What happens when adapters of any kind are put on a model with compressed layers."""

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
"""Versions of PEFT; older ones do not run with Transformers 5."""

BESIDE_THE_LAYER = (
    *("ADALORA", "BEFT", "BOFT", "C3A", "FOURIERFT", "GRALORA", "IA3", "LILY"),
    *("MISS", "OFT", "PVERA", "RANDLORA", "ROAD", "UNILORA", "VBLORA", "VERA"),
)
"""Adapters that see only what goes into a layer and what comes out: they do the same on a compressed layer as on a dense one. The others
read its weight, and would take packed values for it."""


def inject(inject_adapter: Callable[[], Any], config: Any, model: nn.Module) -> Any:
    """Put an adapter on a model that has compressed layers.

    LoRA gets layers of our own, which merge exactly. Those of other adapters raise when they are to be merged: they would change `weight`
    as if it were the whole matrix, some shapes allow that, and the result would be silently wrong.

    Args:
        inject_adapter: what PEFT does.
        config: the adapter's config.

    Raises:
        CompressionError: for adapters that work on the weight of a layer, if they are put on a compressed one.
    """
    if Version(peft.__version__) < Version(TESTED.partition(" ")[0]) or not hasattr(
        peft.LoraConfig, "_register_custom_module"
    ):
        raise CompressionError(
            f"peft {peft.__version__}: adapters on compressed layers were tested with {TESTED}; install one of these"
        )
    if isinstance(config, peft.LoraConfig):
        config._register_custom_module({CompressedLinear: CompressedLoraLinear})
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    known = kind in BESIDE_THE_LAYER or isinstance(config, peft.LoraConfig)
    try:
        result = inject_adapter()
    except (RuntimeError, TypeError, IndexError) as error:
        if known:
            raise
        raise _no_dense_weight(kind) from error
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, CompressedLoraLinear):
            if isinstance(module.get_base_layer(), CompressedLinear):
                if not known:
                    raise _no_dense_weight(kind)
                module.merge = functools.partial(_refuse, f"{name}: {kind}")  # type: ignore[method-assign]
    return result


def _no_dense_weight(kind: str) -> CompressionError:
    return CompressionError(
        f"{kind} adapters work on the dense weight of a layer, which compressed layers do not have; use LoRA (peft.LoraConfig), or name "
        "only dense layers in target_modules"
    )


def _refuse(what: str, *args: Any, **kwargs: Any) -> None:
    raise CompressionError(
        f"{what} cannot be merged exactly into a compressed layer; leave it unmerged, train a LoRA (peft.LoraConfig) instead, or make the "
        "model dense first (model.dequantize())"
    )
