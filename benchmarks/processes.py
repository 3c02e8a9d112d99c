"""How much faster several processes compress than one: `python benchmarks/processes.py slab svd-llm --processes 1 2`.

Compresses the bundled model, calibrated on the bundled text, each process on a core and a thread of its own. Only `compress()` is timed,
not the start of Python. CPU seconds are those of the busiest process, which say more than wall seconds where a machine is shared. The
split of the wall seconds is of the first process: what it computes for calibration (forward passes and their sums), what it solves, what
it spends on the others (sending and waiting), and all else.
"""

import argparse
import functools
import json
import os
import socket
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hf_lowrank import CompressionConfig, compress, data
from hf_lowrank.calibration import blocks
from hf_lowrank.compression.run import Run
from hf_lowrank.compression.strategies import layerwise
from hf_lowrank.execution.process_group import TorchProcessGroup
from hf_lowrank.models.loading import load_model, load_tokenizer

PARTS = ("calibration", "solving", "other processes", "all else")
DATA = Path(data.__path__[0])


class Clock:
    """Seconds by part, each without those of the parts within it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._since, self._part = time.perf_counter(), "all else"

    def enter(self, part: str) -> str:
        """Begin a part; the one that was before it."""
        now, before = time.perf_counter(), self._part
        self.seconds[before] += now - self._since
        self._since, self._part = now, part
        return before

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            before = self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.enter(before)

        return run


def measure(rank: int, size: int, method: str, port: int, folder: Path) -> None:
    """One process's part of a run; it writes what it took."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1 - rank]})
    torch.set_num_threads(1)
    model, tokenizer = load_model(str(DATA / "reference-7m")), load_tokenizer(str(DATA / "reference-7m"))
    clock, walking = Clock(), sys.modules[layerwise.__module__]
    for place, name, part in ((blocks, "_capture_batch", "calibration"), (Run, "gather", "calibration"),
                              (walking, "run_block", "calibration"), (Run, "build", "solving")):  # fmt: skip
        setattr(place, name, clock.timed(part, getattr(place, name)))
    if size > 1:
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        dist.init_process_group("gloo")
        talking = TorchProcessGroup._talking

        @contextmanager
        def timed_talking(self: TorchProcessGroup) -> Iterator[None]:
            before = clock.enter("other processes")
            with talking(self):
                yield
            clock.enter(before)

        TorchProcessGroup._talking = timed_talking  # type: ignore[method-assign]
        dist.barrier()
    clock.enter("all else")
    clock.seconds.clear()
    started, cpu = time.perf_counter(), time.process_time()
    compress(model, CompressionConfig(method=method), tokenizer, calibration=str(DATA / "demo.txt"), progress=False)
    clock.enter("all else")
    took = {"total": time.perf_counter() - started, "cpu": time.process_time() - cpu}
    (folder / str(rank)).write_text(json.dumps(took | clock.seconds))


def run(size: int, method: str) -> dict[str, float]:
    """What a run in several processes took."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        processes = []
        for rank in range(size):
            processes.append(os.fork())
            if processes[-1] == 0:
                measure(rank, size, method, port, Path(folder))
                os._exit(0)
        for process in processes:
            assert os.waitpid(process, 0)[1] == 0
        found: list[dict[str, float]] = [json.loads((Path(folder) / str(rank)).read_text()) for rank in range(size)]
        return found[0] | {"cpu": max(each["cpu"] for each in found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print("| method | processes | wall s | against one | CPU s | against one |", " | ".join(PARTS), "|")
    print("|---" * 10 + "|")
    for method in options.methods:
        runs: dict[int, list[dict[str, float]]] = {size: [] for size in options.processes}
        for _ in range(options.repeats):  # in turn, so that what else runs on the machine strikes all alike
            for size in options.processes:
                runs[size].append(run(size, method))
        best = {size: min(each, key=lambda one: one["total"]) for size, each in runs.items()}
        one = best[options.processes[0]]
        for size, took in best.items():
            columns = [f"{took[kind]:.1f} | {took[kind] / one[kind]:.2f}" for kind in ("total", "cpu")]
            columns += [f"{took.get(part, 0):.1f}" for part in PARTS]
            print(f"| {method} | {size} |", " | ".join(columns), "|", flush=True)


if __name__ == "__main__":
    main()
