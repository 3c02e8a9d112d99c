"""Opens checkpoints in a new Python process, with or without `hf_lowrank` in it; run as a script it is that process.

A request names what is opened, in order; the answer says for each which class came back and which logits it gives, or which error.
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

PROJECT = Path(__file__).resolve().parents[2]
INPUT_IDS = [[1, 5, 9, 2, 60, 33, 7, 4], [3, 3, 8, 41, 12, 0, 63, 11]]


def open_elsewhere(
    tasks: Sequence[dict[str, Any]], home: Path, *, installed: bool, imported: bool
) -> list[dict[str, Any]]:
    """What a new process answers to each task.

    Args:
        tasks: "folder", and optionally "auto_class", "arguments" of `from_pretrained`, a folder to "save_to", and the config class of an
            adapter to "merge".
        home: the new process's Hugging Face home and working directory.
        installed: whether `hf_lowrank` can be imported there at all.
        imported: whether it is, before the first task.
    """
    request = json.dumps({"tasks": list(tasks), "installed": installed, "imported": imported})
    environment = os.environ | {
        "HF_HOME": str(home),
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": str(PROJECT) if installed else "",
    }
    done = subprocess.run(
        [sys.executable, __file__, request],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers


class WithoutPackage:
    """A finder of modules that does not find `hf_lowrank`."""

    def __init__(self, finder: Any) -> None:
        self.finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)

    def find_spec(self, name: str, *arguments: Any) -> Any:
        return None if name.partition(".")[0] == "hf_lowrank" else self.finder.find_spec(name, *arguments)


def _answer(task: dict[str, Any]) -> dict[str, Any]:
    import torch
    import transformers

    arguments = dict(task.get("arguments", {}))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        opened = getattr(transformers, task.get("auto_class", "AutoModelForCausalLM")).from_pretrained(
            task["folder"], **arguments
        )
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    answer = {
        "class": f"{type(opened).__module__}.{type(opened).__qualname__}",
        "memory": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024,
    }
    if isinstance(opened, transformers.PreTrainedModel):
        answer["layers"] = sorted(
            {type(module).__module__ for module in opened.modules() if "SparseLowRank" in type(module).__name__}
        )
        with torch.no_grad():
            output = opened(torch.tensor(INPUT_IDS))
        answer["logits"] = output[0].float().flatten().tolist()
        answer["report"] = getattr(opened, "compression_report", None)
        if "save_to" in task:
            opened.save_pretrained(task["save_to"])
        if "merge" in task:
            answer["merge"] = _merge_error(opened, task["merge"])
    return answer


def _merge_error(model: Any, adapter: str) -> str:
    """What PEFT says when a new adapter of a kind is merged into the model; nothing if it does."""
    import peft

    config = getattr(peft, adapter)(
        target_modules=["q_proj"], **({"feedforward_modules": []} if adapter == "IA3Config" else {})
    )
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
