"""lm-eval's own command and other programs open compressed checkpoints by a plugin that is installed, not imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_lowrank import CompressionConfig, compress
from tests.support import tiny_models
from tests.support.assets import PROJECT
from tests.support.lm_eval_task import accuracy, write_task


@pytest.fixture(scope="module")
def autoload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that, on the path, looks like an installed package with this project's entry points for torch."""
    entry_points = r'\[project\.entry-points\."torch\.backends"\]\n((?:\w+ = .*\n)+)'
    declared = re.search(entry_points, (PROJECT / "pyproject.toml").read_text())
    assert declared is not None
    site = tmp_path_factory.mktemp("site")
    # Another name than the package's own, which may be installed too.
    metadata = site / "hf_lowrank_in_tests-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: hf-lowrank-in-tests\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[torch.backends]\n{declared[1].replace(chr(34), '')}")
    return site


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "slab"
    config = CompressionConfig("slab", ratio=0.5, samples=4, sequence_length=16, options={"iterations": 2})
    tokenizer = tiny_models.tokenizer()
    compress(tiny_models.llama(), config, tokenizer, tiny_models.text(8), progress=False).save_pretrained(folder)
    return folder


def start(arguments: list[str], home: Path, path: list[Path]) -> subprocess.Popen[str]:
    """Start a Python process.

    Args:
        arguments: what stands behind `python`.
        home: the Hugging Face home and working directory of the process.
        path: the folders from which it imports, besides those of its environment.
    """
    environment = os.environ | {
        "HF_HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, path)),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *arguments], cwd=home, env=environment, text=True, **pipes)


def output(process: subprocess.Popen[str]) -> str:
    """Return what a process prints, once it has ended without an error."""
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return printed


def test_the_command_measures_what_the_library_measures(checkpoint: Path, autoload: Path, tmp_path: Path) -> None:
    """`tests/training/test_run_clm.py` has the law for checkpoints that open by remote code."""
    task = write_task(tmp_path)
    model = ["--model", "hf", "--model_args", f"pretrained={checkpoint}", "--device", "cpu", "--batch_size", "4"]
    printed = output(start(["-m", "lm_eval", *model, "--tasks", str(task)], tmp_path, [PROJECT, autoload]))
    row = re.search(r"\|continuations.*\|acc\s*\|.\s*\|\s*([\d.]+)\|", printed)
    assert row is not None, printed
    assert float(row[1]) == pytest.approx(accuracy(f"pretrained={checkpoint}", task))


LOAD = (
    "from transformers import AutoModelForCausalLM\n"
    "model = AutoModelForCausalLM.from_pretrained({folder!r})\n"
    "assert type(model.model.layers[0].mlp.up_proj).__name__ == 'SparseLowRankBinaryLinear'"
)
PROGRAMS = {
    "the quantizers first": f"import transformers.quantizers.auto\n{LOAD}",
    "torch alone, then a module that imports the quantizers, which import the configs": "import sys, torch\n"
    "assert 'hf_lowrank' not in sys.modules and 'transformers' not in sys.modules\n"
    f"import transformers.modeling_utils\n{LOAD}",
    "a trainer": f"from transformers import Trainer\n{LOAD}",
}
"""Programs by what they import before they open a compressed checkpoint."""


def test_programs_that_never_heard_of_the_package_open_it(checkpoint: Path, autoload: Path, tmp_path: Path) -> None:
    running = []
    for code in PROGRAMS.values():
        running.append(start(["-c", code.format(folder=str(checkpoint))], tmp_path, [PROJECT, autoload]))
    for process in running:  # all of them run at the same time
        output(process)
