"""With `device`, one block at a time is on an accelerator, and what comes of it is what the CPU gives."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lowrank import CompressionConfig, CompressionError, compress
from hf_lowrank.compression.estimate import estimate
from hf_lowrank.compression.from_disk import compress_checkpoint
from hf_lowrank.methods import make_method, registered_methods
from hf_lowrank.models.loading import load_config, skeleton

from ..support import tiny_models
from ..support.files import digests
from ..support.stand_in_device import DEVICE, StandInDevice, stand_in_device

RATIOS = {"rtn": 0.75, "gptq": 0.75}
METHODS = [name for name in registered_methods() if not make_method(name, {}).trains]
OPTIONS: dict[str, dict[str, Any]] = {"slab": {"iterations": 2}, "oats": {"iterations": 2}}


@contextmanager
def device() -> Iterator[StandInDevice]:
    """Have the stand-in device, and nothing left on it afterwards."""
    with stand_in_device() as there:
        yield there
    if there.bytes:  # objects that refer to each other wait for the collector
        gc.collect()
    assert there.bytes == 0, "nothing is left behind"


def recipe(method: str, **changes: Any) -> CompressionConfig:
    fields = {"ratio": RATIOS.get(method, 0.5), "samples": 4, "sequence_length": 16, **changes}
    fields.setdefault("options", OPTIONS.get(method, {}))
    return CompressionConfig(method=method, **fields)


@pytest.mark.parametrize("method", METHODS)
def test_from_disk_one_block_at_a_time_gives_the_bytes_of_the_cpu(tmp_path: Path, method: str) -> None:
    words = tmp_path / "words.txt"
    words.write_text("\n".join(tiny_models.text(40)))
    dense = str(
        tiny_models.saved(
            tiny_models.llama(hidden_size=16, intermediate_size=32, num_hidden_layers=2), tmp_path / "dense"
        )
    )
    config, tokenizer = recipe(method, calibration=str(words)), tiny_models.tokenizer()
    compress_checkpoint(dense, tmp_path / "cpu" / "model", config, tokenizer)
    with device() as there:
        compress_checkpoint(dense, tmp_path / "device" / "model", config, tokenizer, device=str(DEVICE))
    assert 0 < there.peak <= estimate(skeleton(load_config(dense)), config).device
    assert digests(tmp_path / "device") == digests(tmp_path / "cpu")


@pytest.mark.parametrize("method", ["svd-llm", "lowrank"])
@pytest.mark.parametrize("make", [tiny_models.gpt2, tiny_models.mixtral], ids=lambda make: make.__name__)
def test_a_model_in_memory_goes_there_and_back_block_by_block(make: Any, method: str) -> None:
    config, text = recipe(method), tiny_models.text(40)
    expected = compress(make(), config, tiny_models.tokenizer(), text)
    with device() as there:
        found = compress(make(), config, tiny_models.tokenizer(), text, device=DEVICE)
    assert there.peak > 0
    for name, tensor in found.state_dict().items():
        assert tensor.device.type == "cpu"
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=0, atol=0)


@pytest.mark.parametrize("changes", [{"method": "soco"}, {"method": "slab", "refinement_steps": 2}], ids=str)
def test_what_needs_the_whole_model_says_so(changes: dict[str, Any]) -> None:
    message = "move the LlamaForCausalLM to ipu:0 instead"
    with device(), pytest.raises(CompressionError, match=message):
        compress(tiny_models.llama(), recipe(**changes), tiny_models.tokenizer(), tiny_models.text(9), device=DEVICE)


def test_the_stand_in_refuses_what_an_accelerator_refuses() -> None:
    with device() as there:
        tensor = torch.ones(3, 4).to(DEVICE)
        assert tensor.device == DEVICE and there.bytes == 48
        with pytest.raises(RuntimeError, match="same device"):
            tensor + torch.ones(3, 4)
        with pytest.raises(RuntimeError, match="same device"):
            torch.nn.functional.linear(tensor, torch.ones(2, 4))
        assert (tensor + torch.tensor(1.0)).device == DEVICE  # a single number goes along
        assert tensor.t().contiguous().cpu().equal(torch.ones(4, 3))
        del tensor


@pytest.mark.parametrize("name", ["abacus", str(DEVICE)])
def test_a_device_that_torch_cannot_use_is_one_line(name: str) -> None:
    with pytest.raises(CompressionError, match=f"device: '{name}' cannot be used on this machine"):
        compress(tiny_models.llama(), recipe("slab"), tiny_models.tokenizer(), tiny_models.text(9), device=name)
