"""lm-eval's own command opens compressed checkpoints: by the installed plugin, which nobody imports, and by the code in the checkpoint."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_lowrank import CompressionConfig, compress
from tests import tiny_models
from tests.support.fresh_process import PROJECT

TASK = """
task: continuations
dataset_path: json
dataset_kwargs:
  data_files:
    test: {items}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{ctx}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""

WITHOUT_PACKAGE = """
import sys
sys.path.insert(0, {project!r})
from tests.support.fresh_process import WithoutPackage
sys.meta_path[:] = [WithoutPackage(finder) for finder in sys.meta_path]
import json
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
found = simple_evaluate("hf", "pretrained={folder},trust_remote_code=True", tasks=[{task!r}], device="cpu", batch_size=4,
                        task_manager=TaskManager(include_defaults=False), log_samples=False)
print(json.dumps(found["results"]["continuations"]["acc,none"]))
"""


@pytest.fixture(scope="module")
def autoload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that, on the path, is an installed package with this project's entry points for torch."""
    declared = re.search(r'\[project\.entry-points\."torch\.backends"\]\n((?:\w+ = .*\n)+)', (PROJECT / "pyproject.toml").read_text())
    assert declared is not None
    site = tmp_path_factory.mktemp("site")
    metadata = site / "hf_lowrank_in_tests-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: hf-lowrank-in-tests\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[torch.backends]\n{declared[1].replace(chr(34), '')}")
    return site


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "slab"
    config = CompressionConfig(ratio=0.5, samples=4, sequence_length=16, options={"iterations": 2})
    tokenizer = tiny_models.tokenizer()
    compress(tiny_models.llama(), config, tokenizer, tiny_models.text(8), progress=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    words = tiny_models.text(30)
    items = [
        {"ctx": words[i][:20].strip(), "choices": [words[i + 1][:9].strip(), words[i + 2][:14].strip()], "label": i % 2} for i in range(10)
    ]
    (folder / "items.jsonl").write_text("\n".join(json.dumps(item) for item in items))
    (folder / "task.yaml").write_text(TASK.format(items=folder / "items.jsonl"))
    return folder / "task.yaml"


def start(arguments: list[str], home: Path, path: list[Path]) -> subprocess.Popen[str]:
    environment = os.environ | {"HF_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, path))}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *arguments], cwd=home, env=environment, text=True, **pipes)


def output(process: subprocess.Popen[str]) -> str:
    shown, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return shown


def test_both_routes_give_the_same_accuracy(checkpoint: Path, task: Path, autoload: Path, tmp_path: Path) -> None:
    model = ["--model", "hf", "--model_args", f"pretrained={checkpoint}", "--device", "cpu", "--batch_size", "4"]
    command = start(["-m", "lm_eval", *model, "--tasks", str(task)], tmp_path, [PROJECT, autoload])
    code = WITHOUT_PACKAGE.format(project=str(PROJECT), folder=checkpoint, task=str(task))
    remote = start(["-c", code], tmp_path, [])
    shown = output(command)
    by_plugin = re.search(r"\|continuations.*\|acc\s*\|.\s*\|\s*([\d.]+)\|", shown)
    assert by_plugin is not None, shown
    by_remote_code = json.loads(output(remote).splitlines()[-1])
    assert float(by_plugin[1]) == pytest.approx(by_remote_code)


LOAD = (
    "from transformers import AutoModelForCausalLM\n"
    "model = AutoModelForCausalLM.from_pretrained({folder!r})\n"
    "assert type(model.model.layers[0].mlp.up_proj).__name__ == 'SparseLowRankBinaryLinear'"
)
PROGRAMS = {
    "torch alone": "import sys, torch\nassert 'hf_lowrank' not in sys.modules and 'transformers' not in sys.modules",
    "the quantizers first": f"import transformers.quantizers.auto\n{LOAD}",
    "a module that imports the quantizers, which import the configs": f"import torch, transformers.modeling_utils\n{LOAD}",
    "a trainer": f"from transformers import Trainer\n{LOAD}",
}


def test_programs_that_never_heard_of_the_package(checkpoint: Path, autoload: Path, tmp_path: Path) -> None:
    running = [start(["-c", code.format(folder=str(checkpoint))], tmp_path, [PROJECT, autoload]) for code in PROGRAMS.values()]
    for process in running:
        output(process)
