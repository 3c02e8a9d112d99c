"""Compressed checkpoints in vLLM: a quantization config and a linear method, which vLLM finds by the entry point `vllm.general_plugins`.

vLLM fuses layers that read the same input (q, k and v; gate and up) into one module and fills that shard by shard. What ours store
differs from shard to shard, in rank and in layout, so they are not fused: the module holds one compressed layer per shard, and their
outputs are laid side by side. That is the product of the stacked A and the block-diagonal B, without the zeros of the latter.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.utils import set_weight_attrs

from ..runtime.configuration import QUANT_METHOD, CompressionConfig, LayerSpec
from ..runtime.content_checks import check_contents
from ..runtime.errors import CheckpointError, CompressionError
from ..runtime.layers import CompressedLinear, build_layer

SHARDS = {"q": 0, "k": 1, "v": 2}
"""vLLM's names of the shards of an attention projection; those of other fused layers are numbers."""
DENSE = "hf-lowrank dense DIR -o OUT writes a checkpoint that vLLM serves by itself"


def register() -> None:
    """Teach vLLM the format; it calls this in each of its processes, in some more than once."""
    register_quantization_config(QUANT_METHOD)(CompressedCheckpoint)


class CompressedCheckpoint(QuantizationConfig):
    """What a checkpoint's config says, as vLLM asks for it.

    Attributes:
        layers: what each compressed layer stores, by vLLM's name of it before fusing.
    """

    def __init__(self, layers: dict[str, LayerSpec]) -> None:
        super().__init__()
        self.layers = layers

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU: the operations are torch's."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CompressedCheckpoint":
        return cls(CompressionConfig.from_dict(config).layers)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method of a linear layer, dense or compressed; None for modules of other kinds.

        Raises:
            CompressionError: if compressed layers are in a module that is not linear, such as a fused mixture of experts.
        """
        if not isinstance(layer, LinearBase):
            inside = next((name for name in self.layers if prefix and f"{name}.".startswith(f"{prefix}.")), None)
            if inside is not None:
                raise CompressionError(
                    f"{inside}: vLLM puts it into a {type(layer).__name__}, which takes no compressed layers; {DENSE}"
                )
            return None
        parent, _, own = prefix.rpartition(".")
        parts = (
            [prefix]
            if prefix in self.layers
            else [f"{parent}.{part}" for part in self.packed_modules_mapping.get(own, [own])]
        )
        if not any(part in self.layers for part in parts):
            return UnquantizedLinearMethod()
        return CompressedLinearMethod({part: self.layers.get(part) for part in parts})


class CompressedLinearMethod(LinearMethodBase):
    """One linear layer of vLLM, as one layer of ours per shard.

    Args:
        specs: what each shard stores, by name and in vLLM's order; None for a dense one.
    """

    def __init__(self, specs: dict[str, LayerSpec | None]) -> None:
        self.specs = specs

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Put the shards, still empty, into `layer.shards`, and an entry for each name of their tensors, by which vLLM fills them.

        Raises:
            CompressionError: if vLLM splits the layer over devices, or the layer has a bias that vLLM's model does not have.
        """
        names = list(self.specs)
        if (input_size_per_partition, sum(output_partition_sizes)) != (input_size, output_size):
            raise CompressionError(
                f"{names[0]}: compressed layers are not split over devices; use --tensor-parallel-size 1, or {DENSE}"
            )
        sizes = output_partition_sizes if len(names) > 1 else [output_size]
        if len(sizes) != len(names):
            raise CompressionError(
                f"{', '.join(names)}: vLLM fuses {len(sizes)} layers here, the checkpoint has {len(names)}; {DENSE}"
            )
        layer.shards = nn.ModuleList()
        for (name, spec), size in zip(self.specs.items(), sizes, strict=True):
            if spec is not None and spec.bias and not layer.has_bias:
                raise CompressionError(f"{name}: stores a bias, which vLLM's model has no place for; {DENSE}")
            layer.shards.append(
                nn.Linear(input_size, size, bias=False, dtype=params_dtype)
                if spec is None
                else build_layer(replace(spec, bias=False), input_size, size, dtype=params_dtype)
            )
        layer.shards.requires_grad_(False)
        self.missing = {(index, name) for index, shard in enumerate(layer.shards) for name in shard.state_dict()}
        self.entries = {name: tensor.dtype for shard in layer.shards for name, tensor in shard.state_dict().items()}
        for name, dtype in self.entries.items():
            entry = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            set_weight_attrs(entry, {"weight_loader": self._loader(layer, name)})
            layer.register_parameter(name, entry)

    def _loader(self, layer: Any, name: str) -> Any:
        def load(entry: nn.Parameter, loaded: Tensor, shard: Any = None) -> None:
            index = 0 if shard is None and len(layer.shards) == 1 else SHARDS.get(shard, shard)
            if (index, name) not in self.missing:
                raise CheckpointError(
                    f"{', '.join(self.specs)}: found {name} for shard {shard!r}, which stores none; {DENSE}"
                )
            place = layer.shards[index].state_dict()[name]
            if place.shape != loaded.shape or (place.dtype == torch.uint8) != (loaded.dtype == torch.uint8):
                raise CheckpointError(
                    f"{list(self.specs)[index]}.{name}: found {loaded.dtype} {tuple(loaded.shape)}, expected {place.dtype} "
                    f"{tuple(place.shape)}; download the checkpoint again, or {DENSE}"
                )
            place.copy_(loaded)
            self.missing.discard((index, name))

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Take the entries out again and check what the shards hold.

        Raises:
            CheckpointError: if a tensor was not in the checkpoint, or a mask does not say what it must.
        """
        for index, name in sorted(self.missing):
            raise CheckpointError(f"{list(self.specs)[index]}.{name}: not in the checkpoint; download it again")
        for name in self.entries:
            delattr(layer, name)
        self.entries = {}
        for name, shard in zip(self.specs, layer.shards, strict=True):
            if isinstance(shard, CompressedLinear):
                check_contents(name, shard.spec, shard.out_features, shard.in_features, shard.state_dict())

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y = [shard(x) for every shard] + bias; x (..., n), y (..., m)."""
        outputs = [shard(x) for shard in layer.shards]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return y if bias is None else y + bias
