"""PEFT's LoRA layer around a compressed one: training is unchanged, and merging is exact."""

from typing import Any

from peft.tuners import lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ..runtime.errors import CompressionError
from ..runtime.layers import CompressedLinear
from .merging import Addition, add_lowrank, remove_lowrank

INITIALIZATIONS = (True, False, "gaussian", "eva")
"""Initializations that neither read nor change the dense weight, which a compressed layer does not have."""


class CompressedLoraLinear(lora.Linear):
    """y = (compressed layer)(x) + scaling · B (A x).

    Merging adds the product to what the layer stores (`merging.add_lowrank`). No stored value changes, and unmerging
    gives the layer back bit for bit.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        # PEFT sets this for a Conv1D, whose weight is (in, out). A compressed layer is always (out, in).
        self.fan_in_fan_out = False
        self.target_name: str = kwargs.get("target_name") or type(base_layer).__name__
        self.additions: list[Addition] = []

    def update_layer(self, adapter_name: str, r: int, *args: Any, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            CompressionError: if its initialization is one that changes the dense weight.
        """
        if "config" in kwargs:  # newer versions of PEFT pass the settings together
            initialization = kwargs["config"].init_lora_weights
        else:
            initialization = kwargs["init_lora_weights"]
        if initialization not in INITIALIZATIONS:
            raise CompressionError(
                f"adapter {adapter_name!r}: init_lora_weights={initialization!r} needs the dense weight, "
                "which a compressed layer does not have; "
                f"expected one of {', '.join(map(repr, INITIALIZATIONS))}"
            )
        super().update_layer(adapter_name, r, *args, **kwargs)

    def resolve_lora_variant(self, **kwargs: Any) -> None:
        """Return None for plain LoRA, as PEFT does.

        Raises:
            CompressionError: for DoRA and the other variants.
        """
        variant = super().resolve_lora_variant(**kwargs)
        if variant is not None:
            variant_name = type(variant).__name__.removesuffix("LinearVariant")
            raise CompressionError(
                f"{variant_name}: this variant of LoRA cannot be merged exactly into a compressed layer; "
                "use plain LoRA (use_dora=False and the like; use_rslora=True is fine), "
                "or name only dense layers in target_modules"
            )

    @property
    def compressed(self) -> CompressedLinear:
        """The layer that adapters are merged into.

        Raises:
            CompressionError: if adapters of another kind lie in between.
        """
        layer = self.base_layer
        if not isinstance(layer, CompressedLinear):
            raise CompressionError(
                f"{self.target_name}: another adapter ({type(layer).__name__}) lies between LoRA and the layer; "
                "unload that first"
            )
        return layer

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the compressed layer.

        Args:
            safe_merge: changes nothing, as the result is always checked.
            adapter_names: the adapters to merge. By default these are the active ones.

        Raises:
            CompressionError: if the layer cannot take an adapter exactly. The layer is then as it was before that
                adapter.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.lora_A:  # the adapter is on other layers only
                continue
            lora_a: Any = self.lora_A[adapter]
            lora_b: Any = self.lora_B[adapter]
            # B takes the scaling, in float64, so that A and B are rounded only once, to the dtype of the layer.
            b = lora_b.weight.detach().double() * self.scaling[adapter]
            bias = None
            if lora_b.bias is not None:
                bias = lora_b.bias.detach().double() * self.scaling[adapter]
            self.additions.append(add_lowrank(self.compressed, lora_a.weight, b, bias, self.target_name))
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take all merged adapters out of the compressed layer, the last one first."""
        while self.merged_adapters:
            self.merged_adapters.pop()
            remove_lowrank(self.compressed, self.additions.pop())
