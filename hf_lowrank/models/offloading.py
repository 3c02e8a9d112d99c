"""Models whose blocks stay on disk.

Such a model is opened with its blocks on the meta device. One block at a time is read into memory, and it is saved in
shards, tensor by tensor.
"""

import ctypes
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import PrefixedDataset, set_module_tensor_to_device
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..runtime.configuration import CompressionConfig
from ..runtime.errors import CompressionError
from ..runtime.experts import ExpertBank
from ..runtime.quantizer import CompressionQuantizer
from .architectures import find_blocks, input_embeddings

SMALLEST_SHARD = 250_000_000
"""Minimum size of an output file in bytes, except for the last one."""

LARGEST_SHARD = 1_000_000_000
"""Maximum size of an output file in bytes. No more of the output is in memory at a time."""


def device_map(skeleton: PreTrainedModel) -> dict[str, str]:
    """Return the `device_map` with which `from_pretrained` leaves the blocks on disk.

    An output matrix of its own, not tied to the embeddings, stays on disk, too. All else is in memory.

    Args:
        skeleton: the model on the meta device.
    """
    places = dict.fromkeys(find_blocks(skeleton), "disk")
    output = skeleton.get_output_embeddings()
    if output is not None and output.weight is not _input_weight(skeleton):
        for name, module in skeleton.named_modules():
            if module is output:
                places[name] = "disk"
    on_disk = tuple(places)
    # Every tensor needs a place: the fewest entries are those of the outermost modules.
    parameters = skeleton.named_parameters(remove_duplicate=False)
    for name, _ in itertools.chain(parameters, skeleton.named_buffers()):
        places.setdefault(_outermost_module(name, on_disk), "cpu")
    return places


def _outermost_module(name: str, on_disk: tuple[str, ...]) -> str:
    """Return the outermost module around a tensor that has nothing inside it on disk, or the tensor itself.

    A tensor in a module on disk gives that module.
    """
    for prefix in itertools.accumulate(name.split("."), "{}.{}".format):
        if not any(place.startswith(f"{prefix}.") for place in on_disk):
            return prefix
    raise AssertionError("no module lies inside a tensor")


def shard_size(skeleton: PreTrainedModel) -> int:
    """Return the size of an output file in bytes: about what a block takes while it is compressed, within limits."""
    sizes = []
    for block in find_blocks(skeleton).values():
        sizes.append(sum(tensor.numel() * tensor.itemsize for tensor in block.parameters()))
    # A dense block and its compressed layers are in memory together.
    return min(max(2 * max(sizes), SMALLEST_SHARD), LARGEST_SHARD)


def _input_weight(model: PreTrainedModel) -> Tensor | None:
    embeddings = input_embeddings(model)
    return getattr(embeddings, "weight", None)


class OffloadedBlocks:
    """The blocks of a model that `from_pretrained` left on disk.

    Args:
        model: a model that was opened with a `device_map` that has blocks on disk.
        device: the device on which a block is while it is worked on.

    Attributes:
        weights: the tensors on disk by name. A tensor is read when it is taken out.

    Raises:
        CompressionError: if none of its weights are on disk.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.weights: Mapping[str, Tensor] = _weights_on_disk(model)

    def separate_experts(self, banks: Mapping[str, ExpertBank]) -> None:
        """Let the layers of banks, by name, read their weights from the fused tensors on disk."""
        slices: dict[str, tuple[str, int]] = {}
        for name, bank in banks.items():
            _remove_hooks(bank.fused)
            for weight, (fused, index) in bank.slices().items():
                slices[f"{name}.{weight}"] = (f"{name}.{fused}", index)
        self.weights = _WithSlices(self.weights, slices)
        # The layers of a bank are new modules, which accelerate knows nothing of.
        for weight in slices:
            layer = weight.rpartition(".")[0]
            hook = AlignDevicesHook("cpu", offload=True, weights_map=PrefixedDataset(self.weights, f"{layer}."))
            add_hook_to_module(self.model.get_submodule(layer), hook)

    def load(self, name: str) -> None:
        """Read a block's weights onto the device. It is then like any other block."""
        block = self.model.get_submodule(name)
        _remove_hooks(block)
        for key, tensor in block.state_dict().items():
            if tensor.device.type == "meta":
                # The tensor is copied: it is mapped from a file, whose pages would count as ours once they are read.
                value = self.weights[f"{name}.{key}"].clone().to(self.device)
                set_module_tensor_to_device(block, key, self.device, value=value)

    def unload(self, name: str) -> None:
        """Free the memory of a block's weights."""
        block = self.model.get_submodule(name)
        _remove_hooks(block)
        for key, tensor in block.state_dict().items():
            if tensor.device.type != "meta":
                set_module_tensor_to_device(block, key, "meta")

    def stop_running(self) -> None:
        """Take off what lets the model run from disk."""
        _remove_hooks(self.model)

    def release(self) -> None:
        """Take off what lets the model run from disk, once all blocks are done."""
        self.stop_running()
        # With this attribute transformers would save and move it as an offloaded model.
        del self.model.hf_device_map


def _weights_on_disk(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Return the weights on disk to which accelerate's hooks of the model refer.

    Raises:
        CompressionError: if there are none.
    """
    for module in model.modules():
        for hook in _align_hooks(module):
            if hook.offload and hook.weights_map is not None:
                weights: Any = hook.weights_map
                # A hook sees the names within its module through a `PrefixedDataset` over the names in the model.
                return getattr(weights, "dataset", weights)
    raise CompressionError(
        f"{type(model).__name__}: none of its weights are on disk; open it with a device_map that leaves them"
    )


class _WithSlices(Mapping[str, Tensor]):
    """Weights on disk by name, and slices of them under names of their own.

    Args:
        weights: the weights on disk.
        slices: by the name of the slice, the name of the whole tensor and the index into its first dimension.
    """

    def __init__(self, weights: Mapping[str, Tensor], slices: Mapping[str, tuple[str, int]]) -> None:
        self.weights = weights
        self.slices = slices

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
    """Copy the tensors in memory off the files from which they are mapped.

    All pages of these files that were read in order to convert other tensors would else count as memory in use.
    """
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.device.type != "meta":
            tensor.data = tensor.data.clone()


def return_memory() -> None:
    """Give freed memory back to the system, where the C library has a call for that.

    Without it the heaps keep the memory that was freed between living objects.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:  # glibc
        trim(0)


def is_offloaded(model: nn.Module) -> bool:
    """Return whether `from_pretrained` left weights of the model on disk."""
    return "disk" in getattr(model, "hf_device_map", {}).values()


def every_weight(model: nn.Module, blocks: OffloadedBlocks | None) -> Iterable[tuple[str, Tensor]]:
    """Iterate over all parameters and buffers by name. Those on disk are read one at a time."""
    for named in (model.named_parameters(), model.named_buffers()):
        for name, tensor in named:
            if blocks is not None and tensor.device.type == "meta":
                yield name, blocks.weights[name]
            else:
                yield name, tensor.detach()


class StoredWeights(dict[str, Tensor]):
    """A state dict for `save_pretrained` whose tensors are read from disk when they are taken out to be written.

    Args:
        model: the model, whose finished blocks are on the meta device.
        blocks: the source of weights that were never in memory.
        files: by the name of a finished block, the safetensors file with its weights, under their names in the block.
    """

    def __init__(self, model: PreTrainedModel, blocks: OffloadedBlocks, files: dict[str, Path]) -> None:
        # Tensors on the meta device stand for those on disk, so that names, shapes and dtypes are complete.
        super().__init__(model.state_dict())
        self._blocks = blocks
        self._files = files

    def pop(self, name: str, *default: Any) -> Any:
        """Take a tensor out, read from disk if it is on the meta device."""
        tensor = super().pop(name, *default)
        if not isinstance(tensor, Tensor) or tensor.device.type != "meta":
            return tensor
        # A finished block has compressed weights in its record, the other weights are those of the dense model.
        for block, file in self._files.items():
            if name.startswith(f"{block}."):
                with safe_open(file, "pt") as opened:
                    return opened.get_tensor(name.removeprefix(f"{block}.")).clone()
        return self._blocks.weights[name].clone()


class OffloadedQuantizer(CompressionQuantizer):
    """The quantizer of a model whose finished blocks are on disk: it saves them from there.

    Args:
        quantization_config: the recipe, with the layers of the model.
        blocks: as for `StoredWeights`.
        files: as for `StoredWeights`.
    """

    def __init__(
        self, quantization_config: CompressionConfig, blocks: OffloadedBlocks, files: dict[str, Path]
    ) -> None:
        super().__init__(quantization_config, pre_quantized=True)
        self.blocks = blocks
        self.files = files

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[StoredWeights, dict[str, str]]:
        # Older versions of transformers take every tensor on the meta device for a parameter when they save
        # on the instance, so that the class stays as it is.
        vars(model)["get_parameter"] = partial(_parameter_or_buffer, model)
        return StoredWeights(model, self.blocks, self.files), {}


def _parameter_or_buffer(model: PreTrainedModel, name: str) -> Tensor:
    try:
        return type(model).get_parameter(model, name)
    except AttributeError:
        return model.get_buffer(name)


def _remove_hooks(module: nn.Module) -> None:
    """Remove accelerate's hooks, and the bound `forward` that they leave on each module.

    That method would keep replaced layers alive.
    """
    # This is noted before: accelerate takes its mark off together with the hook.
    hooked = [part for part in module.modules() if hasattr(part, "_hf_hook")]
    remove_hook_from_module(module, recurse=True)
    for part in hooked:
        vars(part).pop("forward", None)


def _align_hooks(module: nn.Module) -> list[AlignDevicesHook]:
    """Return accelerate's hooks on a module that move its weights."""
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return [hook for hook in hooks if isinstance(hook, AlignDevicesHook)]
