"""`hf-lowrank distill` comes nearer to the teacher, keeps the sparsity, survives a kill, and names mistakes."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback
from typer.testing import CliRunner, Result

from hf_lowrank import cli
from hf_lowrank.training import distillation as module
from tests.support import tiny_models


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    tiny_models.saved(tiny_models.llama(num_hidden_layers=2), folder / "dense")
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(tiny_models.text(40)), encoding="utf-8")
    arguments = [
        "compress",
        str(folder / "dense"),
        "--method",
        "slab",
        "-o",
        str(folder / "small"),
        "--samples",
        "4",
        "--sequence-length",
        "16",
    ]
    assert CliRunner().invoke(cli.app, [*arguments, "--dtype", "bfloat16"]).exit_code == 0
    return folder


def run(home: Path, output: Path, *more: str) -> Result:
    named = [
        "--teacher",
        str(home / "dense"),
        "--text",
        str(home / "text.txt"),
        "--steps",
        "10",
        "--sequence-length",
        "16",
    ]
    return CliRunner().invoke(cli.app, ["distill", str(home / "small"), "-o", str(output), *named, *more])


def divergence(home: Path, folder: Path) -> float:
    dense, model = (
        AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32) for each in (home / "dense", folder)
    )
    ids = tiny_models.token_ids(8, 16, seed=5)
    with torch.no_grad():
        p, q = (each(ids).logits.log_softmax(dim=-1) for each in (dense, model))
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:
    """What a run that nobody disturbed leaves."""
    result = run(home, home / "whole")
    assert result.exit_code == 0, result.output
    assert "KL per token" in result.output
    return home / "whole"


def test_it_comes_nearer_and_keeps_masks_signs_and_dtype(home: Path, whole: Path) -> None:
    assert divergence(home, whole) < divergence(home, home / "small")
    before, after = (load_file(folder / "model.safetensors") for folder in (home / "small", whole))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert tensor.dtype != torch.uint8 or torch.equal(after[name], tensor)


def test_a_killed_training_goes_on_to_the_same_bytes(
    home: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Kill(TrainerCallback):
        def on_step_end(self, args: object, state: object, control: object, **others: object) -> None:
            if state.global_step == 7:  # type: ignore[attr-defined]
                raise SystemExit(9)

    trained = module.DistillationTrainer.__init__

    def dying(self: module.DistillationTrainer, *arguments: object, **named: object) -> None:
        trained(self, *arguments, **named)  # type: ignore[arg-type]
        self.add_callback(Kill)

    work = ["--work-dir", str(tmp_path / "work")]
    with monkeypatch.context() as patch:
        patch.setattr(module.DistillationTrainer, "__init__", dying)
        assert run(home, tmp_path / "out", *work).exit_code == 9
    assert not (tmp_path / "out").exists()
    assert run(home, tmp_path / "out", *work).exit_code == 0
    first, second = (
        hashlib.sha256((folder / "model.safetensors").read_bytes()).digest() for folder in (whole, tmp_path / "out")
    )
    assert first == second
    other = run(home, tmp_path / "other", *work, "--seed", "1")
    assert other.exit_code == 1
    assert "settings.seed (then 0, now 1)" in other.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "0"], "both must be above zero"),
        (["--text", "no/such/text"], "no such text file"),
        (["--teacher", "no/such/model"], "no/such/model"),
    ],
)
def test_mistakes_are_one_line(more: list[str], message: str, home: Path, tmp_path: Path) -> None:
    result = run(home, tmp_path / "out", *more)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_dense_model_is_refused(home: Path, tmp_path: Path) -> None:
    arguments = [
        "distill",
        str(home / "dense"),
        "-o",
        str(tmp_path / "out"),
        "--teacher",
        str(home / "dense"),
        "--text",
        str(home / "text.txt"),
    ]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 1
    assert "is not compressed by hf_lowrank" in result.stderr
