"""The logits are the same wherever the weights lie: in device maps, in memory, on disk, and in copies of the model."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, init_empty_weights, load_checkpoint_and_dispatch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from hf_lowrank import CompressedLinear
from tests.support.compressed import Compressed, logits


def assert_same(model: PreTrainedModel, compressed: Compressed) -> None:
    assert torch.equal(logits(model), logits(compressed.saved))


def blocks_on_disk(model: PreTrainedModel) -> dict[str, str]:
    """Return a device map that has all blocks but the first on disk."""
    blocks = next(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    parent, _, child = blocks.rpartition(".")
    device_map = {name: "cpu" for name, _ in model.named_children() if name != parent}
    for name, _ in model.get_submodule(parent).named_children():
        if name != child:
            device_map[f"{parent}.{name}"] = "cpu"
    for number in range(len(model.get_submodule(blocks))):
        device_map[f"{blocks}.{number}"] = "disk" if number else "cpu"
    return device_map


def test_a_model_with_blocks_on_disk_answers_and_saves_itself(compressed: Compressed, tmp_path: Path) -> None:
    placement = {"device_map": blocks_on_disk(compressed.saved), "offload_folder": tmp_path / "offload"}
    model = AutoModelForCausalLM.from_pretrained(compressed.folder, **placement)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert_same(model, compressed)
    model.save_pretrained(tmp_path / "saved")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), compressed)


def test_accelerate_finds_a_device_map_for_little_memory(compressed: Compressed, tmp_path: Path) -> None:
    # Half of the model fits, so the other half must go to disk.
    size = sum(tensor.nbytes for tensor in compressed.saved.state_dict().values())
    limits = {"device_map": "auto", "max_memory": {"cpu": size // 2}, "offload_folder": tmp_path}
    model = AutoModelForCausalLM.from_pretrained(compressed.folder, **limits)
    assert "disk" in model.hf_device_map.values()
    assert_same(model, compressed)


def test_accelerates_hooks_load_every_part_of_a_layer(compressed: Compressed, tmp_path: Path) -> None:
    model = compressed.model()
    cpu_offload(model, torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert_same(model, compressed)
    model = compressed.model()
    disk_offload(model, tmp_path, torch.device("cpu"))
    assert_same(model, compressed)


@pytest.mark.parametrize("on_disk", [False, True])
def test_an_empty_model_is_filled_by_accelerate(compressed: Compressed, on_disk: bool, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(compressed.folder)
    quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
        quantizer.preprocess_model(model)
    model.tie_weights()
    assert all(parameter.is_meta for parameter in model.parameters())  # nothing has been allocated yet
    places = blocks_on_disk(model) if on_disk else {"": "cpu"}
    offload = {"offload_folder": str(tmp_path / "offload"), "offload_buffers": on_disk}  # masks and signs are buffers
    model = load_checkpoint_and_dispatch(model.eval(), str(compressed.folder), device_map=places, **offload)
    assert_same(model, compressed)
    if not on_disk:
        quantizer.postprocess_model(model)
        model.save_pretrained(tmp_path / "saved")
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), compressed)


def test_a_dense_skeleton_is_not_filled_with_packed_values(compressed: Compressed) -> None:
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(compressed.folder))
    with pytest.raises(ValueError, match="Trying to set a tensor of shape"):
        load_checkpoint_and_dispatch(model, str(compressed.folder), device_map={"": "cpu"})


def test_another_dtype_is_that_of_the_values_and_not_of_the_bits(compressed: Compressed) -> None:
    for name in ("dtype", "torch_dtype"):
        assert AutoModelForCausalLM.from_pretrained(compressed.folder, **{name: "auto"}).dtype == torch.float32
        half = AutoModelForCausalLM.from_pretrained(compressed.folder, **{name: torch.bfloat16})
        layers = [module for module in half.modules() if isinstance(module, CompressedLinear)]
        assert {layer.dtype for layer in layers} == {torch.bfloat16} == {half.dtype}
        assert {buffer.dtype for layer in layers for buffer in layer.buffers() if buffer.numel()} <= {torch.uint8}
    assert_same(AutoModelForCausalLM.from_pretrained(compressed.folder, low_cpu_mem_usage=True), compressed)


def pickled(model: PreTrainedModel) -> PreTrainedModel:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copy_answers_alike_and_shares_nothing(
    compressed: Compressed, copied: Callable[[PreTrainedModel], PreTrainedModel]
) -> None:
    twin = copied(compressed.saved)
    assert_same(twin, compressed)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not torch.equal(logits(twin), logits(compressed.saved))
