"""The program of the two processes in `test_fsdp2.py`, which run `python -m tests.training.fsdp2 OUTPUT FOLDER`.

Accelerate shards on accelerators only, and would silently fall back to DDP on a CPU. Its code for FSDP2 needs no
accelerator. So its one check for an accelerator is answered for it here.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer

import hf_lowrank  # noqa: F401

from .conftest import Windows, same, settings

STEPS = 4
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
FSDP = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


def allow_fsdp_on_cpus() -> None:
    initialize = AcceleratorState.__init__

    def patched(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = patched


def with_trainer(folder: str, output: Path, **changes: Any) -> list[float]:
    """Train by the plain `Trainer` under accelerate's FSDP2, save the full state dict, and return the losses."""
    arguments = settings(
        output, max_steps=STEPS, save_steps=2, per_device_train_batch_size=4, fsdp=True, fsdp_config=dict(FSDP)
    )
    trainer = Trainer(AutoModelForCausalLM.from_pretrained(folder), arguments, train_dataset=Windows())
    trainer.train(**changes)
    trainer.save_model()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def sharded(folder: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder)
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def emptied(model: nn.Module) -> nn.Module:
    """Return the model with zeros in everything that a checkpoint must bring back."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *(buffer for buffer in model.buffers() if buffer.dtype == torch.uint8)):
            tensor.zero_()
    return model


def by_hand(folder: str, output: Path) -> dict[str, bool]:
    """Train in a loop of one's own with `fully_shard`, and return which ways to save and load give the same model."""
    model, rank = sharded(folder), dist.get_rank()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.stack([Windows()[4 * rank + row]["input_ids"] for row in range(4)])
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected: dict[str, Tensor] = get_model_state_dict(model, options=FULL)
    model.save_pretrained(output / "full", state_dict=dict(expected), is_main_process=rank == 0)
    dcp.save(get_model_state_dict(model), checkpoint_id=output / "sharded")
    again = emptied(sharded(folder))
    state = get_model_state_dict(again)
    dcp.load(state, checkpoint_id=output / "sharded")
    set_model_state_dict(again, state)
    found = {"sharded": same(get_model_state_dict(again, options=FULL), expected)}
    broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(emptied(again), dict(expected), options=broadcast)
    found["broadcast"] = same(get_model_state_dict(again, options=FULL), expected)
    found["full"] = rank > 0 or same(AutoModelForCausalLM.from_pretrained(output / "full").state_dict(), expected)
    return found


def main(output: Path, folder: str) -> None:
    allow_fsdp_on_cpus()
    losses = with_trainer(folder, output)
    resumed = with_trainer(folder, output, resume_from_checkpoint=str(output / "checkpoint-2"))
    found = by_hand(folder, output)
    if dist.get_rank() == 0:
        (output / "found.json").write_text(json.dumps({"losses": losses, "resumed": resumed, "same": found}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
