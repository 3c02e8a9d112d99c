"""Models of which one block at a time is in memory: opened on the meta device, filled from their files, written by shards."""

import ctypes
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import PrefixedDataset, set_module_tensor_to_device
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..runtime.configuration import CompressionConfig
from ..runtime.errors import CompressionError
from ..runtime.experts import ExpertBank
from ..runtime.quantizer import CompressionQuantizer
from .architectures import find_blocks

SMALLEST_SHARD, LARGEST_SHARD = 250_000_000, 1_000_000_000
"""Bytes of a file of the output: no more of it is in memory at a time."""


def device_map(skeleton: PreTrainedModel) -> dict[str, str]:
    """Where `from_pretrained` puts what: the blocks and an output matrix of its own stay on disk, all else is in memory."""
    places = dict.fromkeys(find_blocks(skeleton), "disk")
    output = skeleton.get_output_embeddings()
    if output is not None and output.weight is not _input_weight(skeleton):
        places |= {name: "disk" for name, module in skeleton.named_modules() if module is output}
    on_disk = tuple(places)
    for name, _ in itertools.chain(skeleton.named_parameters(remove_duplicate=False), skeleton.named_buffers()):
        around = itertools.accumulate(name.split("."), "{}.{}".format)
        places.setdefault(
            next(each for each in around if not any(place.startswith(f"{each}.") for place in on_disk)), "cpu"
        )
    return places


def shard_size(skeleton: PreTrainedModel) -> int:
    """Bytes of a file of the output: about what a block takes while it is compressed, within limits."""
    blocks = find_blocks(skeleton).values()
    block = max(sum(tensor.numel() * tensor.itemsize for tensor in each.parameters()) for each in blocks)
    return min(max(2 * block, SMALLEST_SHARD), LARGEST_SHARD)


def _input_weight(model: PreTrainedModel) -> Tensor | None:
    embeddings = model.get_input_embeddings()
    return getattr(embeddings, "weight", None)


class OffloadedBlocks:
    """The blocks of a model that `from_pretrained` left on disk.

    Args:
        model: opened with a `device_map` that has blocks on disk.

    Raises:
        CompressionError: if none of its weights are on disk.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        maps = (
            hook.weights_map
            for module in model.modules()
            for hook in _hooks(module)
            if hook.offload and hook.weights_map is not None
        )
        found: Any = next(maps, None)
        if found is None:
            raise CompressionError(
                f"{type(model).__name__}: none of its weights are on disk; open it with a device_map that leaves them"
            )
        self.weights: Mapping[str, Tensor] = getattr(found, "dataset", found)

    def separate_experts(self, banks: Mapping[str, ExpertBank]) -> None:
        """The layers of banks, by name, read their weights from the fused tensors on disk."""
        slices: dict[str, tuple[str, int]] = {}
        for name, bank in banks.items():
            _without_hooks(bank.fused)
            slices |= {
                f"{name}.{weight}": (f"{name}.{fused}", index) for weight, (fused, index) in bank.slices().items()
            }
        self.weights = _WithSlices(self.weights, slices)
        for weight in slices:
            layer = weight.rpartition(".")[0]
            hook = AlignDevicesHook("cpu", offload=True, weights_map=PrefixedDataset(self.weights, f"{layer}."))
            add_hook_to_module(self.model.get_submodule(layer), hook)

    def load(self, name: str) -> None:
        """Bring a block's weights into memory; it is then like any other."""
        block = self.model.get_submodule(name)
        _without_hooks(block)
        for key, tensor in block.state_dict().items():
            if tensor.device.type == "meta":
                value = self.weights[f"{name}.{key}"].clone()  # to memory of its own, off the mapped file
                set_module_tensor_to_device(block, key, "cpu", value=value)

    def unload(self, name: str) -> None:
        """Let go of a block's weights."""
        block = self.model.get_submodule(name)
        _without_hooks(block)
        for key, tensor in block.state_dict().items():
            if tensor.device.type != "meta":
                set_module_tensor_to_device(block, key, "meta")

    def release(self) -> None:
        """All blocks are done: the model is no longer one that runs from the disk."""
        _without_hooks(self.model)
        del self.model.hf_device_map


class _WithSlices(Mapping[str, Tensor]):
    """Weights on disk by name, and some more that are slices of them: name → name of the whole, index of its first dimension."""

    def __init__(self, weights: Mapping[str, Tensor], slices: Mapping[str, tuple[str, int]]) -> None:
        self.weights, self.slices = weights, slices

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.slices:
            return self.weights[name]
        whole, index = self.slices[name]
        return self.weights[whole][index]

    def __iter__(self) -> Iterator[str]:
        return itertools.chain(self.weights, self.slices)

    def __len__(self) -> int:
        return len(self.weights) + len(self.slices)


def copy_off_mapped_files(model: PreTrainedModel) -> None:
    """Move what is in memory off the files that it is mapped from: all that was read of these to be converted counts as ours."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.device.type != "meta":
            tensor.data = tensor.data.clone()


def return_memory() -> None:
    """Give what was freed back to the system, where the C library has a call for that: its heaps keep what lies between living objects."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def is_offloaded(model: nn.Module) -> bool:
    """Whether `from_pretrained` left weights of the model on disk."""
    return "disk" in getattr(model, "hf_device_map", {}).values()


def every_weight(model: nn.Module, blocks: OffloadedBlocks | None) -> Iterable[tuple[str, Tensor]]:
    """All parameters and buffers by name, one at a time where they are on disk."""
    for named in (model.named_parameters(), model.named_buffers()):
        for name, tensor in named:
            yield (
                name,
                blocks.weights[name] if blocks is not None and tensor.device.type == "meta" else tensor.detach(),
            )


class StoredWeights(dict[str, Tensor]):
    """A state dict for `save_pretrained` whose values are read when it takes them out to write them.

    Args:
        model: with finished blocks on the meta device.
        blocks: of weights that were never in memory.
        files: by block name, the file that holds its weights under their names within it.
    """

    def __init__(self, model: PreTrainedModel, blocks: OffloadedBlocks, files: dict[str, Path]) -> None:
        super().__init__(model.state_dict())
        self._blocks, self._files = blocks, files

    def pop(self, name: str, *default: Any) -> Any:
        tensor = super().pop(name, *default)
        if not isinstance(tensor, Tensor) or tensor.device.type != "meta":
            return tensor
        for block, file in self._files.items():
            if name.startswith(f"{block}."):
                with safe_open(file, "pt") as opened:
                    return opened.get_tensor(name.removeprefix(f"{block}.")).clone()
        return self._blocks.weights[name].clone()


class OffloadedQuantizer(CompressionQuantizer):
    """That of a model whose finished blocks are on disk: saves read them from there."""

    def __init__(
        self, quantization_config: CompressionConfig, blocks: OffloadedBlocks, files: dict[str, Path]
    ) -> None:
        super().__init__(quantization_config, pre_quantized=True)
        self.blocks, self.files = blocks, files

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[StoredWeights, dict[str, str]]:
        vars(model)["get_parameter"] = partial(
            _parameter_or_buffer, model
        )  # older transformers take all on meta for parameters
        return StoredWeights(model, self.blocks, self.files), {}


def _parameter_or_buffer(model: PreTrainedModel, name: str) -> Tensor:
    try:
        return type(model).get_parameter(model, name)
    except AttributeError:
        return model.get_buffer(name)


def _without_hooks(module: nn.Module) -> None:
    """Take accelerate's hooks off, and the bound `forward` that they leave on each module: it would keep replaced layers alive."""
    hooked = [each for each in module.modules() if hasattr(each, "_hf_hook")]
    remove_hook_from_module(module, recurse=True)
    for each in hooked:
        each.__dict__.pop("forward", None)


def _hooks(module: nn.Module) -> list[AlignDevicesHook]:
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return [each for each in hooks if isinstance(each, AlignDevicesHook)]
