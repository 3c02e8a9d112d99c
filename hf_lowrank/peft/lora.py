"""PEFT's LoRA layer around a compressed one: the same in training, exact in merging."""

from typing import Any

from peft.tuners import lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ..runtime.errors import CompressionError
from ..runtime.layers import CompressedLinear
from .merging import Addition, add_lowrank, remove_lowrank

INITIALIZATIONS = (True, False, "gaussian", "eva")
"""Those that do not read or change the dense weight, which a compressed layer does not have."""


class CompressedLoraLinear(lora.Linear):
    """y = (compressed layer)(x) + scaling · B (A x).

    Merging adds the product to what the layer stores (`merging.add_lowrank`): no stored value changes, and unmerging gives the layer back
    bit for bit.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self.fan_in_fan_out = False  # of the dense layer, perhaps a Conv1D; compressed ones are all (out, in)
        self.target_name: str = kwargs.get("target_name") or type(base_layer).__name__
        self.additions: list[Addition] = []

    def update_layer(self, adapter_name: str, r: int, *args: Any, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            CompressionError: if its initialization is one that changes the dense weight.
        """
        chosen = kwargs["config"].init_lora_weights if "config" in kwargs else kwargs["init_lora_weights"]
        if chosen not in INITIALIZATIONS:
            raise CompressionError(
                f"adapter {adapter_name!r}: init_lora_weights={chosen!r} needs the dense weight, which a compressed layer does not have; "
                f"expected one of {', '.join(map(repr, INITIALIZATIONS))}"
            )
        super().update_layer(adapter_name, r, *args, **kwargs)

    def resolve_lora_variant(self, **kwargs: Any) -> None:
        """None, for plain LoRA.

        Raises:
            CompressionError: for DoRA and the other variants.
        """
        variant = super().resolve_lora_variant(**kwargs)
        if variant is not None:
            raise CompressionError(
                f"{type(variant).__name__.removesuffix('LinearVariant')}: this variant of LoRA cannot be merged exactly into a compressed "
                "layer; use plain LoRA (use_dora=False and the like; use_rslora=True is fine), or name only dense layers in target_modules"
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
                f"{self.target_name}: another adapter ({type(layer).__name__}) lies between LoRA and the layer; unload that first"
            )
        return layer

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters (those that are active) into the compressed layer; `safe_merge` changes nothing, as it is always checked.

        Raises:
            CompressionError: if the layer cannot take them exactly; it is then as it was.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.lora_A:
                continue
            lora_a: Any = self.lora_A[adapter]
            lora_b: Any = self.lora_B[adapter]
            b = lora_b.weight.detach().double() * self.scaling[adapter]
            bias = None if lora_b.bias is None else lora_b.bias.detach().double() * self.scaling[adapter]
            self.additions.append(add_lowrank(self.compressed, lora_a.weight, b, bias, self.target_name))
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take all merged adapters out of the compressed layer."""
        while self.merged_adapters:
            self.merged_adapters.pop()
            remove_lowrank(self.compressed, self.additions.pop())
