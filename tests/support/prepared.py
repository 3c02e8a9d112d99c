"""Runs Python programs in forks of a process that has imported transformers' and TRL's trainers once.

Importing them takes longer than the programs that the tests run. As a script, this file is that process. It reads jobs
as JSON from standard input, one per line, and answers a job with the exit codes of its processes.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

from .assets import PROJECT
from .torchrun import torchrun_variables


class Prepared:
    """The prepared process as a test sees it. Leaving it as a context ends the process."""

    def __init__(self, home: Path) -> None:
        self.errors = home / "errors"
        environment = os.environ | {"HF_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__], cwd=PROJECT, env=environment, text=True, **pipes
        )  # type: ignore[call-overload]

    def __enter__(self) -> "Prepared":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()

    def codes(self, program: list[Any], folder: Path, processes: int = 1) -> list[int]:
        """Run a program and return the exit codes of its processes, which are negative for signals.

        Args:
            program: what stands behind `python`: a file or `-m` and a module, and its arguments.
            folder: the working directory.
            processes: how many run it together, with the variables that torchrun sets.
        """
        job = {
            "program": [str(part) for part in program],
            "folder": str(folder),
            "processes": processes,
            "errors": str(self.errors),
        }
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"{program}: the process that was to run it has ended"
        codes: list[int] = json.loads(answer)
        return codes

    def run(self, program: list[Any], folder: Path, processes: int = 1) -> None:
        """Run a program that must succeed.

        Several processes get three attempts when gloo aborts one of them. About once in 200,000 calls of
        `torch.distributed._functional_collectives.all_gather_tensor`, gloo (torch 2.13) frees a buffer twice. Two
        processes that do nothing but call it in a loop show that. Nothing else that ends a process is forgiven.
        """
        codes: list[int] = []
        attempts = 3 if processes > 1 else 1
        for _ in range(attempts):
            codes, errors = self.codes(program, folder, processes), self.errors.read_text()
            if -signal.SIGABRT not in codes or "double free or corruption" not in errors:
                break
        assert codes == [0] * processes, f"{program}\n{errors[-5000:]}"


def _run(program: list[str], folder: str) -> None:
    """Run a program in this process as `python` would run it in that folder."""
    os.chdir(folder)
    sys.path[0] = folder
    if program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(sys.argv[0], run_name="__main__")
    else:
        sys.argv = program
        runpy.run_path(sys.argv[0], run_name="__main__")


def _fork(job: dict[str, Any], variables: dict[str, str]) -> int:
    """Run a job's program in a fork, with more environment variables, and return the fork's process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ |= variables
        for descriptor, name in ((1, os.devnull), (2, job["errors"])):
            os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
        _run(job["program"], job["folder"])
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _wait(children: list[int]) -> list[int]:
    """Wait for processes and return their exit codes.

    When one fails, the others are killed, as they would wait for it.
    """
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child] != 0:
            for running in set(children) - codes.keys():
                os.kill(running, signal.SIGKILL)
    return [codes[child] for child in children]


def _main() -> None:
    import torch

    # Answers go to what was standard output. What imports and programs print goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    import datasets
    import transformers
    import trl

    import hf_lowrank  # noqa: F401

    # These packages import their parts when a name is first used.
    for package, names in (
        (transformers, ("LlamaForCausalLM", "AutoTokenizer", "Trainer")),
        (trl, ("SFTTrainer",)),
        (datasets, ("load_dataset",)),
    ):
        for name in names:
            getattr(package, name)
    for line in sys.stdin:
        job = json.loads(line)
        Path(job["errors"]).write_text("")
        variables: list[dict[str, str]] = [{}]
        if job["processes"] > 1:
            variables = torchrun_variables(job["processes"])
        codes = _wait([_fork(job, of_rank) for of_rank in variables])
        print(json.dumps(codes), file=answers, flush=True)


if __name__ == "__main__":
    _main()
