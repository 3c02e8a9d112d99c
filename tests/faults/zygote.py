"""Runs command lines in forks of one process that has imported everything, each with a fault that strikes at a stage.

As a script, this file reads cases as JSON from standard input, one per line, and answers each with a line of JSON.
A case has these entries:
    command: the arguments of `hf-lowrank`.
    errors: the file that takes the command's standard error.
    stage, fault: where the fault strikes (a key of `STAGES`) and which one (see `strike`), or nothing.
    call: the call of the stage's function at which it strikes, 1 unless given.
    vanishing: the file that a fault of that name removes.
    kill_after: seconds after which the command is killed.
"""

import errno
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STAGES = {
    "loading": ("hf_lowrank.models.loading", "load_config"),
    "inspecting": ("hf_lowrank.checkpoints.inspect", "load_config"),
    "calibration": ("hf_lowrank.compression.pipeline", "capture"),
    "decomposition": ("hf_lowrank.compression.session", "Session.compressed_layer"),
    "training": ("hf_lowrank.compression.soco_training", "SoCoTraining.save"),
    "saving": ("hf_lowrank.runtime.saving", "CompleteSave.write_companions"),
    "saved": ("hf_lowrank.runtime.saving", "record_checksums"),
    "pushing": ("huggingface_hub", "HfApi.upload_folder"),
}
"""The module and the function that a fault strikes before. A vanishing file vanishes after it."""


def strike(fault: str, vanishing: str | None) -> None:
    """Let a fault happen to this process.

    Args:
        fault: a signal, a limit of the system, "MemoryError", "CUDA error", "vanishing", or the name of an errno.
        vanishing: the file that vanishes.
    """
    if fault in ("SIGINT", "SIGTERM", "SIGKILL"):
        os.kill(os.getpid(), getattr(signal, fault))
        time.sleep(0.5)  # the handler runs before this returns
    elif fault == "RLIMIT_FSIZE":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    elif fault == "RLIMIT_AS":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), resource.RLIM_INFINITY))
    elif fault == "MemoryError":
        raise MemoryError
    elif fault == "CUDA error":
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")
    elif fault == "vanishing":
        assert vanishing is not None
        Path(vanishing).unlink()
    else:
        number = getattr(errno, fault)
        raise OSError(number, os.strerror(number), "some/file")


def inject(case: dict[str, Any]) -> None:
    """Replace the stage's function by one that lets the fault happen."""
    module_name, path = STAGES[case["stage"]]
    owner: Any = sys.modules[module_name]
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def function_with_fault(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        is_due = calls == case.get("call", 1)
        if is_due and case["fault"] != "vanishing":
            strike(case["fault"], None)
        result = original(*arguments, **options)
        if is_due and case["fault"] == "vanishing":
            strike("vanishing", case["vanishing"])
        return result

    setattr(owner, name, function_with_fault)


def run(case: dict[str, Any], errors: str) -> int:
    """Run the command of a case in a fork and return its exit code, which is negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 70  # for errors that the command does not turn into an exit code
        try:
            descriptor = os.open(errors, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(descriptor, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            if case.get("stage"):
                inject(case)
            from hf_lowrank.cli import app

            app(case["command"])
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + case.get("kill_after", 120)
    while True:
        process, status = os.waitpid(child, os.WNOHANG)
        if process:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            deadline += 60  # so that the next rounds wait for its end
        time.sleep(0.01)


def main() -> None:
    """Import what commands use, and answer cases until standard input ends."""
    import torch

    torch.set_num_threads(1)
    import hf_lowrank.checkpoints.inspect
    import hf_lowrank.cli.demo
    import hf_lowrank.publishing.hub
    import hf_lowrank.publishing.model_card  # noqa: F401

    for line in sys.stdin:
        case = json.loads(line)
        code = run(case, case["errors"])
        print(json.dumps({"code": code, "stderr": Path(case["errors"]).read_text()}), flush=True)


if __name__ == "__main__":
    main()
