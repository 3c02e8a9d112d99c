"""Compresses models in one process, in two, and with one of the two killed (`tests/execution/test_process_group.py`).

It runs as `python -m tests.support.processes FOLDER`. The processes are forks of this one, which has imported
everything, with the variables that torchrun sets.
"""

import os
import signal
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
from tests.support.torchrun import torchrun_variables

RECIPES: dict[str, dict[str, Any]] = {
    "slab": {"iterations": 2},
    "svd-llm": {"update": True},
    "fwsvd": {},
    "sola": {"skip_blocks": 0},
    "soco": {"steps": 6, "finish_steps": 2, "batch_tokens": 96},
    "auto": {},
}
"""The options of methods that together use every strategy and every kind of statistics."""
IDS = tiny_models.token_ids(10, 24).tolist()


def recipe(method: str, **changes: Any) -> CompressionConfig:
    fields: dict[str, Any] = {"ratio": 0.4, "options": RECIPES[method], "samples": 10, "sequence_length": 24}
    return CompressionConfig(method=method, **fields | changes)


def models() -> dict[str, dict[str, Tensor]]:
    """Return the weights of compressed models.

    They are a Llama by every recipe, one that is refined, one with layers that fail, and a T5 with a single batch,
    whose decoder is calibrated anew after its encoder.
    """
    weights = {method: compressed_llama(recipe(method)) for method in RECIPES}
    weights["refined"] = compressed_llama(recipe("slab", refinement_steps=4))
    with pytest.MonkeyPatch.context() as patch:
        breaking(patch, 100, "model.layers.0.self_attn.q_proj")  # fails until it is kept dense
        breaking(patch, 1, "model.layers.1.self_attn.q_proj")  # is built at the second attempt
        weights["broken"] = compressed_llama(recipe("svd-llm"))
    family = FAMILIES["T5"]
    t5 = compress(family.make(), recipe("slab", sequence_length=12), calibration=family.batches())
    weights["T5"] = t5.state_dict()
    return weights


def compressed_llama(config: CompressionConfig) -> dict[str, Tensor]:
    return compress(tiny_models.llama(num_hidden_layers=2), config, calibration=IDS).state_dict()


def breaking(patch: pytest.MonkeyPatch, attempts: int, name: str) -> None:
    """Let the first attempts at a layer fail as they do when its factors overflow.

    Args:
        attempts: how many of them fail.
        name: name of the layer.
    """
    usual, failed = Session.compressed_layer, []

    def compressed_layer(self: Session, layer: Layer, decomposition: Decomposition) -> CompressedLinear:
        if layer.name == name and len(failed) < attempts:
            failed.append(layer.name)
            raise NumericalError("a lowrank_a that is not finite in torch.float16")
        return usual(self, layer, decomposition)

    patch.setattr(Session, "compressed_layer", compressed_layer)


def refusals() -> dict[str, str]:
    """Return the messages that this process gets where the processes cannot go on together.

    In one case the second process has other calibration data, in the other its method raises an error.
    """
    is_second = dist.get_rank() == 1

    def fails(self: SLaB, *arguments: Any) -> None:
        raise CompressionError(f"process {dist.get_rank()} fails")

    def message(change: Callable[[pytest.MonkeyPatch], None] = lambda patch: None, seed: int = 0) -> str:
        ids = tiny_models.token_ids(10, 24, seed=seed).tolist()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(CompressionError) as refused:
            change(patch)
            compress(tiny_models.llama(num_hidden_layers=2), recipe("slab"), calibration=ids)
        return str(refused.value)

    def break_slab(patch: pytest.MonkeyPatch) -> None:
        if is_second:
            patch.setattr(SLaB, "decompose", fails)

    return {"calibration": message(seed=int(is_second)), "error": message(change=break_slab)}


def work(folder: Path) -> None:
    """Compress all models as one process of a group, and save what comes of it under the process's rank."""
    dist.init_process_group("gloo")
    torch.save({"models": models(), "refusals": refusals()}, folder / f"process-{dist.get_rank()}.pt")
    dist.destroy_process_group()


def command(folder: Path, dies: bool = False) -> None:
    """Run `hf-lowrank compress` with its standard error in a file.

    Args:
        folder: the working directory.
        dies: whether the second process is killed in the middle.
    """
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
    """Call a function in several processes, or in one that no launcher started, and return their exit codes."""
    variables: list[dict[str, str]] = torchrun_variables(size) if size > 1 else [{}]
    processes = []
    for of_rank in variables:
        process = os.fork()
        if process == 0:
            os.environ |= of_rank
            # A fork must not return into the code of its parent, whatever happens.
            try:
                act()
            except SystemExit as end:
                os._exit(int(end.code or 0))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        processes.append(process)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def main(folder: Path) -> None:
    """Run everything, and leave in the folder what the tests look at."""
    batches.TOKENS_PER_BATCH = 48  # the tokens of two sequences, so that there are five batches
    statuses = {"work": run(lambda: work(folder))}
    tiny_models.saved(tiny_models.llama(), folder / "dense")
    (folder / "words.txt").write_text("\n".join(tiny_models.text(40)))
    statuses["alone"] = run(lambda: command(folder / "alone"), size=1)
    statuses["whole"] = run(lambda: command(folder / "whole"))
    statuses["killed"] = run(lambda: command(folder / "killed", dies=True))
    # What the killed run has left, before the next run goes on with it.
    torch.save(sorted(file.name for file in (folder / "killed" / "work").iterdir()), folder / "left.pt")
    statuses["resumed"] = run(lambda: command(folder / "killed"))
    torch.save({"models": models(), "statuses": statuses}, folder / "alone.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
