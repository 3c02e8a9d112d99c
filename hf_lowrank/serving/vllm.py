"""Compressed checkpoints in vLLM: a quantization config and a linear method.

vLLM finds them by the entry point `vllm.general_plugins`. It fuses layers that read the same input (q, k and v; gate
and up) into one module, which it fills shard by shard. Compressed layers differ from shard to shard, in rank and in
layout, and therefore they are not fused: the module holds one compressed layer per shard, and their outputs are laid
side by side. For low-rank layers that is the product of the stacked A and the block-diagonal B, without the zeros of
the latter.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.utils import set_weight_attrs

from ..registration import attempt
from ..runtime.configuration import QUANT_METHOD, CompressionConfig, LayerSpec
from ..runtime.content_checks import check_contents
from ..runtime.errors import CheckpointError, CompressionError
from ..runtime.layers import CompressedLinear, build_layer
from .sharding import part_of, plain_linear

LOSS = "vLLM serves no compressed checkpoints"
"""What does not work where the format cannot be registered."""
SHARDS = {"q": 0, "k": 1, "v": 2}
"""vLLM's names of the shards of an attention projection, with their positions. It names other shards by position."""
TRANSPOSED = "gpt2"
"""Model type whose weights vLLM transposes when it loads them."""
DENSE = "hf-lowrank dense DIR -o OUT writes a checkpoint that vLLM serves by itself"
"""The cure that ends every error about a checkpoint that cannot be served."""


def register() -> None:
    """Register the format with vLLM, which calls this in each of its processes, and in some of them more than once.

    vLLM would not start with what is raised here, so whatever goes wrong is a warning.
    """
    attempt(lambda: register_quantization_config(QUANT_METHOD)(CompressedCheckpoint), LOSS)


class CompressedCheckpoint(QuantizationConfig):
    """The quantization config of a checkpoint, in the form in which vLLM asks for it.

    Attributes:
        layers: the spec of each compressed layer, by the name that vLLM gives the layer before fusing.

    Raises:
        CompressionError: without layers, as vLLM makes the config of a dense model that `--quantization` is given for.
    """

    def __init__(self, layers: dict[str, LayerSpec] | None = None) -> None:
        super().__init__()
        if layers is None:
            raise CompressionError(
                f"--quantization {QUANT_METHOD}: the model is dense, its config.json has no quantization_config; "
                "leave the option out, or name a compressed checkpoint, for which it is not needed either"
            )
        self.layers = layers

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the least compute capability, which is that of any GPU, as the operations are those of torch."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CompressedCheckpoint":
        """Read the config of a checkpoint.

        Raises:
            CheckpointError: if it is damaged.
            CompressionError: if the checkpoint stores experts one by one.
        """
        compression = CompressionConfig.from_dict(config)
        for name in compression.experts:
            raise CompressionError(
                f"{name}: vLLM fuses the experts of a mixture and takes no compressed ones; {DENSE}"
            )
        return cls(compression.layers)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, **_: Any) -> None:
        """Refuse a model whose weights vLLM transposes, which it would do to packed ones, too.

        Raises:
            CompressionError: for GPT-2, the one model of vLLM that has `Conv1D` layers in Transformers.
        """
        if getattr(hf_config, "model_type", None) == TRANSPOSED:
            raise CompressionError(f"{model_name}: vLLM transposes the weights of {TRANSPOSED}; {DENSE}")

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Return the method of a linear layer, dense or compressed, or None for modules of other kinds.

        Raises:
            CompressionError: if compressed layers are in a module that is not linear, such as a fused mixture of
                experts.
        """
        if not isinstance(layer, LinearBase):
            self._check_no_layer_within(layer, prefix)
            return None
        shards = self._shard_names(prefix)
        if not any(name in self.layers for name in shards):
            return UnquantizedLinearMethod()
        return CompressedLinearMethod({name: self.layers.get(name) for name in shards})

    def _check_no_layer_within(self, module: nn.Module, prefix: str) -> None:
        """Raise CompressionError if a compressed layer is in `module`, which is not linear."""
        for name in self.layers:
            if prefix and f"{name}.".startswith(f"{prefix}."):
                raise CompressionError(
                    f"{name}: vLLM puts it into a {type(module).__name__}, which takes no compressed layers; {DENSE}"
                )

    def _shard_names(self, prefix: str) -> list[str]:
        """Return the checkpoint's names of the layers that vLLM fuses into the one at `prefix`, or its own name."""
        if prefix in self.layers:
            return [prefix]
        parent, _, own_name = prefix.rpartition(".")
        return [f"{parent}.{shard}" for shard in self.packed_modules_mapping.get(own_name, [own_name])]


class CompressedLinearMethod(LinearMethodBase):
    """The method of one linear layer of vLLM, which holds one of our layers per shard.

    Args:
        specs: the spec of each shard, by name and in vLLM's order. It is None for a dense shard.
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
        """Put the shards, still empty, into `layer.shards`.

        vLLM fills a parameter of the module by its name. So the module gets an empty parameter, an entry, for each
        name of the shards' tensors, whose loader passes what is loaded on to the shard.

        Raises:
            CompressionError: if the layer has a bias that vLLM's model does not have.
        """
        self.inputs_per_rank = input_size_per_partition if input_size_per_partition != input_size else 0
        self.output_ranges = _output_ranges(layer, output_partition_sizes, output_size)
        sizes = self._shard_sizes([whole for whole, _, _ in self.output_ranges])
        layer.shards = nn.ModuleList()
        for (name, spec), size in zip(self.specs.items(), sizes, strict=True):
            if spec is not None and spec.bias and not layer.has_bias:
                raise CompressionError(f"{name}: stores a bias, which vLLM's model has no place for; {DENSE}")
            layer.shards.append(_empty_shard(spec, input_size, size, params_dtype))
        layer.shards.requires_grad_(False)
        self.missing: set[tuple[int, str]] = set()
        self.entries: dict[str, torch.dtype] = {}
        for index, shard in enumerate(layer.shards):
            for name, tensor in shard.state_dict().items():
                self.missing.add((index, name))
                self.entries[name] = tensor.dtype
        for name, dtype in self.entries.items():
            entry = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            set_weight_attrs(entry, {"weight_loader": self._loader(layer, name)})
            layer.register_parameter(name, entry)

    def _shard_sizes(self, whole_sizes: list[int]) -> list[int]:
        """Return the outputs of each shard.

        A single layer of the checkpoint may be all of a layer that vLLM divides, such as a fused query, key and value.

        Raises:
            CompressionError: if vLLM fuses another number of layers than the checkpoint has.
        """
        names = list(self.specs)
        if len(names) == 1:
            return [sum(whole_sizes)]
        if len(whole_sizes) != len(names):
            raise CompressionError(
                f"{', '.join(names)}: vLLM fuses {len(whole_sizes)} layers here, "
                f"the checkpoint has {len(names)}; {DENSE}"
            )
        return whole_sizes

    def _loader(self, layer: Any, name: str) -> Any:
        """Return the function by which vLLM loads the tensors of one name, with the shard that each belongs to."""

        def load(entry: nn.Parameter, loaded: Tensor, shard: Any = None) -> None:
            index = SHARDS.get(shard, shard)
            if shard is None and len(layer.shards) == 1:
                index = 0
            if (index, name) not in self.missing:
                raise CheckpointError(
                    f"{', '.join(self.specs)}: found {name} for shard {shard!r}, which stores none; {DENSE}"
                )
            target = layer.shards[index].state_dict()[name]
            # Values are converted to the dtype that vLLM serves in. Bits and codes are bytes and must stay bytes.
            if target.shape != loaded.shape or (target.dtype == torch.uint8) != (loaded.dtype == torch.uint8):
                raise CheckpointError(
                    f"{list(self.specs)[index]}.{name}: found {loaded.dtype} {tuple(loaded.shape)}, "
                    f"expected {target.dtype} {tuple(target.shape)}; download the checkpoint again, or {DENSE}"
                )
            target.copy_(loaded)
            self.missing.discard((index, name))

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Take the entries out again and check what the shards hold.

        Raises:
            CheckpointError: if a tensor was not in the checkpoint, or a mask has another number of bits set than it
                must.
        """
        for index, name in sorted(self.missing):
            raise CheckpointError(f"{list(self.specs)[index]}.{name}: not in the checkpoint; download it again")
        for name in self.entries:
            delattr(layer, name)
        self.entries = {}
        # By a tensor of this name, vLLM's LoRA layers find the device of a quantized layer.
        device = next(layer.shards.parameters()).device
        layer.register_buffer("qweight", torch.empty(0, device=device), persistent=False)
        for name, shard in zip(self.specs, layer.shards, strict=True):
            if isinstance(shard, CompressedLinear):
                check_contents(name, shard.spec, shard.out_features, shard.in_features, shard.state_dict())
        layer.shards = nn.ModuleList(self._parts(layer))

    def _parts(self, layer: Any) -> list[nn.Module]:
        """Return what this process computes of the shards, which were loaded whole: the shards, if it is the only one.

        Tensor parallelism divides the inputs, or the outputs of every layer that vLLM fuses. These may be rows of one
        layer of the checkpoint, such as a fused query, key and value.
        """
        if self.inputs_per_rank:
            start = layer.tp_rank * self.inputs_per_rank
            return [_part(shard, 1, start, start + self.inputs_per_rank) for shard in layer.shards]
        if all(stop - start == whole for whole, start, stop in self.output_ranges):
            return list(layer.shards)
        if len(layer.shards) > 1:
            pairs = zip(layer.shards, self.output_ranges, strict=True)
            return [_part(shard, 0, start, stop) for shard, (_, start, stop) in pairs]
        parts, offset = [], 0
        for whole, start, stop in self.output_ranges:
            parts.append(_part(layer.shards[0], 0, offset + start, offset + stop))
            offset += whole
        return parts

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return y (..., m): the outputs of all shards for x (..., n), side by side, plus the bias."""
        outputs = [shard(x) for shard in layer.shards]
        # One output is not copied.
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return y if bias is None else y + bias


def _output_ranges(layer: Any, per_rank: list[int], total: int) -> list[tuple[int, int, int]]:
    """Return all outputs of each layer that vLLM fuses into one, and from where to where this process has them."""
    if sum(per_rank) == total:
        return [(size, 0, size) for size in per_rank]
    ranges = []
    for index, size in enumerate(per_rank):
        # With more processes than heads of keys and values, several have the same head.
        replicas = layer.num_kv_head_replicas if index and hasattr(layer, "num_kv_head_replicas") else 1
        start = layer.tp_rank // replicas * size
        ranges.append((size * layer.tp_size // replicas, start, start + size))
    return ranges


def _part(shard: nn.Module, dim: int, start: int, stop: int) -> nn.Module:
    """Return a part of a shard, compressed or dense, see `part_of`."""
    if isinstance(shard, CompressedLinear):
        return part_of(shard, dim, start, stop)
    weight = shard.get_parameter("weight").detach()
    return plain_linear(weight.narrow(dim, start, stop - start), None)


def _empty_shard(spec: LayerSpec | None, in_features: int, out_features: int, dtype: torch.dtype) -> nn.Module:
    """Return a compressed layer, or a dense one if there is no spec. It has no bias, as vLLM's module adds that."""
    if spec is None:
        return nn.Linear(in_features, out_features, bias=False, dtype=dtype)
    return build_layer(replace(spec, bias=False), in_features, out_features, dtype=dtype)
