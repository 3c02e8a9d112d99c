"""What two processes do in `tests/execution/test_process_group.py`: run as `python -m tests.support.processes FOLDER`.

They are forks of this process, which has imported everything, with the variables that torchrun sets.
"""

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hf_lowrank import CompressionConfig, CompressionError, compress
from hf_lowrank.budget import Layer
from hf_lowrank.calibration import batches
from hf_lowrank.cli import app
from hf_lowrank.compression.session import Session
from hf_lowrank.methods import Decomposition
from hf_lowrank.methods.slab import SLaB
from hf_lowrank.runtime.errors import NumericalError
from hf_lowrank.runtime.layers import CompressedLinear
from tests.support import tiny_models
from tests.support.model_families import FAMILIES

RECIPES: dict[str, dict[str, Any]] = {
    "slab": {"iterations": 2},
    "svd-llm": {"update": True},
    "fwsvd": {},
    "sola": {"skip_blocks": 0},
    "soco": {"steps": 6, "finish_steps": 2, "batch_tokens": 96},
    "auto": {},
}
"""One method of every strategy and of every kind of statistics, with its options."""
IDS = tiny_models.token_ids(10, 24).tolist()


def recipe(method: str, **changes: Any) -> CompressionConfig:
    fields: dict[str, Any] = {"ratio": 0.4, "options": RECIPES[method], "samples": 10, "sequence_length": 24}
    return CompressionConfig(method=method, **fields | changes)


def models() -> dict[str, dict[str, Tensor]]:
    """The weights of compressed models; of T5, whose decoder starts anew, with a single batch."""
    found = {
        method: compress(tiny_models.llama(num_hidden_layers=2), recipe(method), calibration=IDS).state_dict()
        for method in RECIPES
    }
    found["refined"] = compress(
        tiny_models.llama(num_hidden_layers=2), recipe("slab", refinement_steps=4), calibration=IDS
    ).state_dict()
    family = FAMILIES["T5"]
    with pytest.MonkeyPatch.context() as patch:  # a layer that never comes out, one that does the second time
        breaking(patch, 100, "model.layers.0.self_attn.q_proj")
        breaking(patch, 1, "model.layers.1.self_attn.q_proj")
        found["broken"] = compress(
            tiny_models.llama(num_hidden_layers=2), recipe("svd-llm"), calibration=IDS
        ).state_dict()
    found["T5"] = compress(
        family.make(), recipe("slab", sequence_length=12), calibration=family.batches()
    ).state_dict()
    return found


def breaking(patch: pytest.MonkeyPatch, attempts: int, name: str) -> None:
    """Let so many attempts at a layer fail as those do whose factors overflow."""
    usual, failed = Session.compressed_layer, []

    def compressed_layer(self: Session, layer: Layer, decomposition: Decomposition) -> CompressedLinear:
        if layer.name == name and len(failed) < attempts:
            failed.append(layer.name)
            raise NumericalError("a lowrank_a that is not finite in torch.float16")
        return usual(self, layer, decomposition)

    patch.setattr(Session, "compressed_layer", compressed_layer)


def refusals() -> dict[str, str]:
    """What this process is told where the processes cannot go on together."""
    second = dist.get_rank() == 1

    def fails(self: SLaB, *arguments: Any) -> None:
        raise CompressionError(f"process {dist.get_rank()} fails")

    def told(change: Callable[[pytest.MonkeyPatch], None] = lambda patch: None, seed: int = 0, **changes: Any) -> str:
        ids = tiny_models.token_ids(10, 24, seed=seed).tolist()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(CompressionError) as refused:
            change(patch)
            compress(tiny_models.llama(num_hidden_layers=2), recipe("slab", **changes), calibration=ids)
        return str(refused.value)

    return {
        "calibration": told(seed=int(second)),
        "error": told(lambda patch: patch.setattr(SLaB, "decompose", fails) if second else None),
    }


def work(folder: Path) -> None:
    dist.init_process_group("gloo")
    torch.save({"models": models(), "refusals": refusals()}, folder / f"process-{dist.get_rank()}.pt")
    dist.destroy_process_group()


def command(folder: Path, dies: bool = False) -> None:
    """The command line, in the middle of which the second process may be killed; its standard error goes to a file."""
    rank = os.environ.get("RANK")
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    with open(f"errors-{rank}-{'killed' if dies else 'whole'}", "w") as errors:
        os.dup2(errors.fileno(), 2)
    usual, calls = Session.compressed_layer, []

    def compressed_layer(self: Session, *arguments: Any) -> Any:
        calls.append(arguments)
        if dies and rank == "1" and len(calls) == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return usual(self, *arguments)

    Session.compressed_layer = compressed_layer  # type: ignore[method-assign]
    options = ["--calibration", "../words.txt", "--samples", "10", "--sequence-length", "24", "--work-dir", "work"]
    app(["compress", "../dense", "-o", "result", *options])


def run(act: Callable[[], None], size: int = 2) -> list[int]:
    """Session this in several processes, or in one that no launcher started; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in map(str, range(size)):
        processes.append(os.fork())
        if processes[-1] == 0:
            if size > 1:
                os.environ |= {
                    "RANK": rank,
                    "LOCAL_RANK": rank,
                    "WORLD_SIZE": str(size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                }
            try:
                act()
            except SystemExit as end:
                os._exit(int(end.code or 0))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def main(folder: Path) -> None:
    batches.TOKENS_PER_BATCH = 48  # two of the sequences, so that there are five batches
    statuses = {"work": run(lambda: work(folder))}
    tiny_models.saved(tiny_models.llama(), folder / "dense")
    (folder / "words.txt").write_text("\n".join(tiny_models.text(40)))
    statuses["alone"] = run(lambda: command(folder / "alone"), size=1)
    statuses["whole"] = run(lambda: command(folder / "whole"))
    statuses["killed"] = run(lambda: command(folder / "killed", dies=True))
    torch.save(sorted(file.name for file in (folder / "killed" / "work").iterdir()), folder / "left.pt")
    statuses["resumed"] = run(lambda: command(folder / "killed"))
    torch.save({"models": models(), "statuses": statuses}, folder / "alone.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
