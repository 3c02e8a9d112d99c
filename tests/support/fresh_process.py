"""Opens checkpoints in a new Python process that may or may not have `hf_lowrank`.

Run as a script, this file is that process.
A request names what is opened, in order. The answer says for each checkpoint which class came back and which logits it
gives, or which error was raised.
"""

import importlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# This file imports nothing from the project: where the package is not installed, neither can the tests be imported.
PROJECT = Path(__file__).resolve().parents[2]
INPUT_IDS = [[1, 5, 9, 2, 60, 33, 7, 4], [3, 3, 8, 41, 12, 0, 63, 11]]


def open_elsewhere(
    tasks: Sequence[dict[str, Any]], home: Path, *, installed: bool, imported: bool
) -> list[dict[str, Any]]:
    """Return what a new process answers to every task.

    Args:
        tasks: "folder", and optionally "auto_class", "arguments" of `from_pretrained`, a folder to "save_to", and the
            config class of an adapter to "merge".
        home: the new process's Hugging Face home and working directory.
        installed: whether `hf_lowrank` can be imported there at all.
        imported: whether the process imports it before the first task.
    """
    request = json.dumps({"tasks": list(tasks), "installed": installed, "imported": imported})
    environment = os.environ | {
        "HF_HOME": str(home),
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": str(PROJECT) if installed else "",
    }
    if not installed:
        # The package may still be registered as installed, without being found.
        environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    finished = subprocess.run(
        [sys.executable, __file__, request],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    answers: list[dict[str, Any]] = json.loads(finished.stdout.splitlines()[-1])
    return answers


class WithoutPackage:
    """Finds the modules that another finder finds, except `hf_lowrank`."""

    def __init__(self, finder: Any) -> None:
        self.finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)

    def find_spec(self, name: str, *arguments: Any) -> Any:
        if name.partition(".")[0] == "hf_lowrank":
            return None
        return self.finder.find_spec(name, *arguments)


def _answer(task: dict[str, Any]) -> dict[str, Any]:
    import torch
    import transformers

    arguments = dict(task.get("arguments", {}))
    auto_class = getattr(transformers, task.get("auto_class", "AutoModelForCausalLM"))
    memory = _peak_memory()
    try:
        opened = auto_class.from_pretrained(task["folder"], **arguments)
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    answer = {
        "class": f"{type(opened).__module__}.{type(opened).__qualname__}",
        "memory": _peak_memory() - memory,
    }
    if isinstance(opened, transformers.PreTrainedModel):
        compressed = [type(module) for module in opened.modules() if "SparseLowRank" in type(module).__name__]
        answer["layers"] = sorted({layer_class.__module__ for layer_class in compressed})
        with torch.no_grad():
            output = opened(torch.tensor(INPUT_IDS))
        answer["logits"] = output[0].float().flatten().tolist()
        answer["report"] = getattr(opened, "compression_report", None)
        if "save_to" in task:
            opened.save_pretrained(task["save_to"])
        if "merge" in task:
            answer["merge"] = _merge_error(opened, task["merge"])
    return answer


def _peak_memory() -> int:
    """Return the largest number of bytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _merge_error(model: Any, adapter: str) -> str:
    """Return PEFT's message when a new adapter cannot be merged into the model, or an empty string if it merges."""
    import peft

    fields: dict[str, Any] = {"target_modules": ["q_proj"]}
    if adapter == "IA3Config":
        fields["feedforward_modules"] = []
    config = getattr(peft, adapter)(**fields)
    try:
        peft.get_peft_model(model, config).merge_and_unload()
    except Exception as error:
        return str(error)
    return ""


def _main() -> None:
    request = json.loads(sys.argv[1])
    if not request["installed"]:
        sys.meta_path[:] = [WithoutPackage(finder) for finder in sys.meta_path]
    import torch

    torch.set_num_threads(2)
    if request["imported"]:
        importlib.import_module("hf_lowrank")
    print(json.dumps([_answer(task) for task in request["tasks"]]))


if __name__ == "__main__":
    _main()
