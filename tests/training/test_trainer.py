"""`transformers.Trainer` trains compressed checkpoints without a change.

The tests say what is trained, what stays, and what is on disk afterwards.
"""

import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import prepare_model_for_kbit_training
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer

from hf_lowrank import CompressedLinear, CompressionConfig, CompressionError, compress
from hf_lowrank.checkpoints.inspect import read_checked_report
from hf_lowrank.publishing.hub import check_complete
from hf_lowrank.publishing.model_card import make_card, record
from hf_lowrank.runtime.checksums import LOADING_CODE
from hf_lowrank.runtime.reports import OTHER_WEIGHTS
from hf_lowrank.runtime.saving import CompleteSave
from tests.support import tiny_models

from .conftest import LAYOUTS, Windows, pattern, same, settings, weights

SLAB = "bitmask and signs"


def opened(folder: Path, **arguments: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **arguments)


def trained(folder: Path, output: Path, **changes: Any) -> tuple[PreTrainedModel, list[float]]:
    """Return the model of a folder after training, and its losses."""
    trainer = Trainer(opened(folder), settings(output, **changes), train_dataset=Windows(), eval_dataset=Windows(4))
    trainer.train()
    return trainer.model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_float_moves_and_the_pattern_stays(layout: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Users combine all of it: gradient checkpointing, accumulation, evaluation, the best checkpoint, weight decay."""
    before = opened(checkpoints[layout])
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    model, _ = trained(
        checkpoints[layout],
        tmp_path,
        gradient_checkpointing=True,
        gradient_accumulation_steps=2,
        weight_decay=0.1,
        **evaluation,
    )
    assert same(pattern(model), pattern(before))
    start = weights(before)
    assert [name for name, tensor in weights(model).items() if torch.equal(tensor, start[name])] == []
    for checkpoint in ("checkpoint-1", "checkpoint-2"):
        check_complete(tmp_path / checkpoint)
        again = opened(tmp_path / checkpoint)
        assert same(pattern(again), pattern(before))
    assert same(weights(again), weights(model))


def test_the_ways_to_save_memory_change_nothing(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    plain, losses = trained(checkpoints[SLAB], tmp_path, save_strategy="no")
    ways: list[dict[str, Any]] = [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ]
    for way in ways:
        model, found = trained(checkpoints[SLAB], tmp_path, save_strategy="no", **way)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=0, atol=1e-5)
        for key, tensor in weights(model).items():
            torch.testing.assert_close(tensor, weights(plain)[key], rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_autocast_follows_float32(layout: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    common = {"learning_rate": 1e-4, "save_strategy": "no"}
    _, losses = trained(checkpoints[layout], tmp_path, **common)
    model, found = trained(checkpoints[layout], tmp_path, bf16=True, **common)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=0, atol=0.02)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_compiled_training_is_training(tmp_path: Path) -> None:
    """Forward and backward are traced whole. The code generator behind that is for torch to test."""
    config = CompressionConfig(method="slab", ratio=0.4, samples=4, sequence_length=32)
    model = compress(
        tiny_models.llama(num_hidden_layers=1),
        config,
        calibration=tiny_models.token_ids(4, 32).tolist(),
        progress=False,
    )
    model.save_pretrained(tmp_path / "compressed")
    _, losses = trained(tmp_path / "compressed", tmp_path, save_strategy="no")
    model, found = trained(tmp_path / "compressed", tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=0, atol=1e-5)
    assert same(weights(opened(tmp_path / "checkpoint-2")), weights(model))


def test_a_loss_of_the_users_own(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    arguments = settings(tmp_path, save_strategy="no")
    trainer = Trainer(opened(checkpoints[SLAB]), arguments, train_dataset=Windows(), compute_loss_func=loss)
    trainer.train()
    plain, _ = trained(checkpoints[SLAB], tmp_path, save_strategy="no")
    for key, tensor in weights(trainer.model).items():
        torch.testing.assert_close(tensor, weights(plain)[key], rtol=0, atol=1e-4)


def test_a_trainer_leaves_the_runtime_in_its_own_folder(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """The trainer pushes this folder while it trains, with the config and the weights that it copies there itself."""
    trained(checkpoints[SLAB], tmp_path, max_steps=1, save_only_model=True, save_total_limit=1)
    assert (tmp_path / LOADING_CODE).is_file()


@pytest.mark.parametrize("package", [True, False], ids=["package", "runtime alone"])
def test_figures_of_other_weights_are_not_kept(
    package: bool, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save of the same weights keeps what was measured on them, in however many shards.

    A save after training says that the figures are of other weights.
    """
    folder = shutil.copytree(checkpoints[SLAB], tmp_path / "measured")
    figure = {"metric": "perplexity", "dataset": "text", "compressed": 61.53}
    record(folder, quality=[figure], license="mit")
    if not package:
        monkeypatch.setattr(CompleteSave, "publisher", None)
    opened(folder).save_pretrained(tmp_path / "again", max_shard_size="40KB")
    model, _ = trained(folder, tmp_path / "run", max_steps=1)
    model.save_pretrained(tmp_path / "trained")
    again, *changed = (
        ModelCard.load(tmp_path / name / "README.md") for name in ("again", "run/checkpoint-1", "trained")
    )
    assert again.data.eval_results is not None and "61.53" in again.text
    for card in changed:
        assert card.data.eval_results is None and card.data.license == "mit"
        assert "61.53" not in card.text if package else "Written before the weights were changed" in card.text
    reports = [read_checked_report(tmp_path / name) for name in ("measured", "again", "trained")]
    assert [report.get("quality") for report in reports] == [[figure], [figure], None]
    assert [OTHER_WEIGHTS in report["warnings"] for report in reports] == [False, False, True]
    record(tmp_path / "trained", quality=[{**figure, "compressed": 50.25}])
    assert "50.25" in ModelCard.load(tmp_path / "trained" / "README.md").text
    shutil.copyfile(folder / "model.safetensors", tmp_path / "trained" / "model.safetensors")
    assert "50.25" not in make_card(tmp_path / "trained").text


def test_a_save_writes_the_state_dict_that_it_is_given(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Transformers would write the model's own state dict, which when sharded holds only a part of every tensor."""
    model = opened(checkpoints[SLAB])
    given = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=dict(given))
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() <= given.keys()
    assert all(torch.equal(tensor, given[name]) for name, tensor in stored.items())
    model.save_pretrained(tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["model.norm.weight"], model.model.norm.weight)


def test_a_save_that_cannot_be_opened_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for option in ({"distributed_checkpoint": True}, {"variant": "fp16"}):
        with pytest.raises(CompressionError, match=next(iter(option))):
            opened(checkpoints[SLAB]).save_pretrained(tmp_path, **option)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_casts_after_loading(layout: str, checkpoints: dict[str, Path]) -> None:
    """`float`, `half` and `to` do what they do on a dense model, also on copies and pickles."""
    model = opened(checkpoints[layout])
    tokens, masks = Windows(2)[0]["input_ids"][None], pattern(model)
    expected = model(tokens).logits
    for made in (
        model.half(),
        copy.deepcopy(model).float().to(torch.bfloat16),
        pickle.loads(pickle.dumps(model)).float(),
    ):
        assert same(pattern(made), masks)
        torch.testing.assert_close(made(tokens).logits.float(), expected, rtol=0, atol=0.1)
    assert model.dtype == torch.float16
    assert {module.dtype for module in model.modules() if isinstance(module, CompressedLinear)} == {torch.float16}
    assert made.dtype == torch.float32
    dense = copy.deepcopy(model).dequantize()
    assert dense.float().dtype == torch.float32 and model.dtype == torch.float16


def test_preparing_for_kbit_training_freezes_and_widens(checkpoints: dict[str, Path]) -> None:
    """PEFT's helper is harmless, which scripts call on every quantized model."""
    model = opened(checkpoints["quantized"], dtype=torch.bfloat16)
    masks = pattern(model)
    prepared = prepare_model_for_kbit_training(model)
    assert {(parameter.dtype, parameter.requires_grad) for parameter in prepared.parameters()} == {
        (torch.float32, False)
    }
    assert same(pattern(prepared), masks)
