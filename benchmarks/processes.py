"""Measures how much faster several processes compress than one.

`python benchmarks/processes.py slab svd-llm --processes 1 2`

It compresses the bundled model, calibrated on the bundled text. Each process has a core and a thread of its own. Only
`compress()` is timed, not the start of Python. CPU seconds are those of the busiest process, which say more than wall
seconds where a machine is shared. The wall seconds of the first process are split: calibration (forward passes and
their sums), solving, other processes (sending and waiting), and all else.
"""

import argparse
import functools
import json
import os
import socket
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hf_lowrank import CompressionConfig, compress, data
from hf_lowrank.calibration import block_inputs
from hf_lowrank.compression.strategies import layerwise
from hf_lowrank.execution.process_group import TorchProcessGroup
from hf_lowrank.models.loading import load_model, load_tokenizer

PARTS = ("calibration", "solving", "other processes", "all else")
DATA = Path(data.__path__[0])


class Clock:
    """Seconds by part, each without the seconds of the parts within it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._part = "all else"
        self._since = time.perf_counter()

    def enter(self, part: str) -> str:
        """Begin a part, and return the one before it."""
        now = time.perf_counter()
        before = self._part
        self.seconds[before] += now - self._since
        self._since = now
        self._part = part
        return before

    def time_calls(self, owner: Any, name: str, part: str) -> None:
        """Have the calls of a function of a module or a class counted for a part."""
        function: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            before = self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.enter(before)

        setattr(owner, name, timed)

    def time_communication(self) -> None:
        """Have the time that the process group sends and waits counted for "other processes"."""
        talking = TorchProcessGroup._one_line_errors
        enter = self.enter

        @contextmanager
        def timed_talking(self: TorchProcessGroup) -> Iterator[None]:
            before = enter("other processes")
            with talking(self):
                yield
            enter(before)

        TorchProcessGroup._one_line_errors = timed_talking  # type: ignore[method-assign]


def measure(rank: int, size: int, method: str, port: int, folder: Path) -> None:
    """Compress as one process of a run, and write the seconds by part to a file of `folder` named by the rank."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1 - rank]})
    torch.set_num_threads(1)
    model, tokenizer = load_model(str(DATA / "reference-7m")), load_tokenizer(str(DATA / "reference-7m"))
    clock = Clock()
    clock.time_calls(block_inputs, "_capture_batch", part="calibration")
    clock.time_calls(layerwise, "collect_statistics", part="calibration")
    clock.time_calls(layerwise, "run_block", part="calibration")
    clock.time_calls(layerwise._Decompose, "_build", part="solving")
    if size > 1:
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        dist.init_process_group("gloo")
        clock.time_communication()
        dist.barrier()
    clock.enter("all else")
    clock.seconds.clear()
    started, cpu = time.perf_counter(), time.process_time()
    compress(model, CompressionConfig(method=method), tokenizer, calibration=str(DATA / "demo.txt"), progress=False)
    clock.enter("all else")
    totals = {"total": time.perf_counter() - started, "cpu": time.process_time() - cpu}
    (folder / str(rank)).write_text(json.dumps(totals | clock.seconds))


def run(size: int, method: str) -> dict[str, float]:
    """Compress in several processes. Return the first one's seconds by part, and the CPU seconds of the busiest."""
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
        seconds: list[dict[str, float]] = []
        for rank in range(size):
            seconds.append(json.loads((Path(folder) / str(rank)).read_text()))
        return seconds[0] | {"cpu": max(of_process["cpu"] for of_process in seconds)}


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
        fastest = {size: min(of_size, key=itemgetter("total")) for size, of_size in runs.items()}
        reference = fastest[options.processes[0]]
        for size, seconds in fastest.items():
            columns = []
            for kind in ("total", "cpu"):
                columns.append(f"{seconds[kind]:.1f} | {seconds[kind] / reference[kind]:.2f}")
            for part in PARTS:
                columns.append(f"{seconds.get(part, 0):.1f}")
            print(f"| {method} | {size} |", " | ".join(columns), "|", flush=True)


if __name__ == "__main__":
    main()
