"""Every command does its job."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_lowrank.cli.demo
from hf_lowrank import CompressedLinear, CompressionConfig
from hf_lowrank.methods import registered_methods

from ..support import tiny_models
from .calls import QUICK, run


def test_methods_lists_every_method_with_its_options() -> None:
    shown = run("methods").stdout
    assert all(name in shown for name in registered_methods())
    assert "iterations=20" in shown
    rows = json.loads(run("methods", "--json").stdout)
    assert [row["method"] for row in rows] == registered_methods()
    assert all(row["summary"] and row["source"] for row in rows)
    assert all(help_text for row in rows for _, help_text in row["options"].values())


@pytest.mark.parametrize("command", ["methods", "compress", "evaluate", "inspect", "dense", "demo"])
def test_every_command_explains_itself(command: str) -> None:
    assert command in run("--help").stdout
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_compress_writes_a_checkpoint_of_the_recipe(dense: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "er"
    result = run(
        "compress", dense, "--method", "svd-llm", "--ratio", 0.35, "--calibration", text, "--seed", 3,
        "--dtype", "bfloat16", "--skip", "down_proj", *QUICK, "-o", output,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"wrote {output}" in result.stdout
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    wanted = {
        "method": "svd-llm",
        "ratio": 0.35,
        "seed": 3,
        "samples": 4,
        "sequence_length": 16,
        "calibration": text.name,
    }
    assert {key: config[key] for key in wanted} == wanted
    assert len(config["layers"]) == 24
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == torch.bfloat16
    assert {path.name for path in tmp_path.iterdir()} == {"deep"}
    assert [path.name for path in output.parent.iterdir()] == ["er"]


def test_inspect_counts_what_is_stored(compressed: Path) -> None:
    found = json.loads(run("inspect", compressed, "--json").stdout)
    assert (found["method"], found["ratio_asked"]) == ("slab", 0.4)
    assert 0.4 <= found["ratio_stored"] <= 0.405
    assert sum(layer["bytes"] for layer in found["layers"]) == found["block_bytes"]
    assert found["disk_bytes"] == (compressed / "model.safetensors").stat().st_size >= found["model_bytes"]
    shown = run("inspect", compressed).stdout
    assert all(layer["name"] in shown for layer in found["layers"])
    assert "asked 40.0% removed" in shown


def test_inspect_sums_up_by_kind_of_layer_before_it_lists_all(compressed: Path) -> None:
    found = json.loads(run("inspect", compressed, "--json").stdout)
    kinds = {kind["layers"]: kind for kind in found["layer_kinds"]}
    assert [*kinds] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for name, kind in kinds.items():
        layers = [layer for layer in found["layers"] if layer["name"].endswith(name)]
        assert (kind["number"], kind["dense"]) == (len(layers), 0)
        assert kind["bytes"] == sum(layer["bytes"] for layer in layers)
        assert kind["bits_per_weight"] == pytest.approx(layers[0]["bits_per_weight"], rel=0.01)
    shown = run("inspect", compressed).stdout
    assert shown.index("by kind of layer") < shown.index("down_proj") < shown.index("every layer")
    assert shown.index("every layer") < shown.index("model.layers.0.self_attn.q_proj")


def test_evaluate_measures_against_a_reference(dense: Path, compressed: Path, text: Path) -> None:
    options = ["--text", text, "--window", 32, "--max-windows", 6]
    (alone,) = json.loads(run("evaluate", dense, *options, "--json").stdout)
    assert alone["kl"] is None
    assert alone["windows"] == 6
    (found,) = json.loads(run("evaluate", compressed, *options, "--reference", dense, "--json").stdout)
    assert found["reference_nll"] == alone["nll"]
    assert found["kl"] > 0
    shown = run("evaluate", compressed, *options, "--text", text, "--reference", dense).stdout
    assert shown.count(f"{found['perplexity']:.4g}") >= 2
    assert "top-1 agreement" in shown
    assert shown.index("by kind of layer") < shown.index("q_proj") < shown.index("perplexity")
    assert "by kind of layer" not in run("evaluate", dense, *options).stdout


def test_dense_writes_what_any_engine_opens(compressed: Path, tmp_path: Path) -> None:
    assert run("dense", compressed, "-o", tmp_path / "dense").exit_code == 0
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not list((tmp_path / "dense").glob("*.py"))
    ids = tiny_models.token_ids(2, 16)
    with torch.no_grad():
        opened = [AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "dense", compressed)]
        assert not any(isinstance(module, CompressedLinear) for module in opened[0].modules())
        logits = [model(ids).logits for model in opened]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "dense" / "tokenizer.json").exists()


def test_the_demo_compresses_reopens_measures_and_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduced to one recipe at few samples on the tiny model; the command itself runs four on the bundled one."""
    texts = tmp_path / "texts"
    texts.write_text("\n<|endoftext|>\n".join(tiny_models.text(20)), encoding="utf-8")
    dense = str(tiny_models.saved(tiny_models.llama(), tmp_path / "dense"))
    monkeypatch.setattr(hf_lowrank.cli.demo, "reference_model", lambda: dense)
    monkeypatch.setattr(hf_lowrank.cli.demo, "reference_text", lambda: str(texts))
    recipe = CompressionConfig(method="slab", ratio=0.5, samples=4, sequence_length=16, options={"iterations": 2})
    monkeypatch.setattr(hf_lowrank.cli.demo, "RECIPES", {"slab": recipe})
    result = run("demo", "-o", tmp_path / "kept")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if "dense" in line or "slab" in line]
    assert len(rows) == 2
    assert any("50%" in row for row in rows)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["slab"]


def test_the_demo_covers_the_three_systems_and_their_baseline() -> None:
    recipes = hf_lowrank.cli.demo.RECIPES
    assert {name: (recipe.method, recipe.ratio) for name, recipe in recipes.items()} == {
        "svd-llm": ("svd-llm", 0.3),
        "sola": ("sola", 0.3),
        "soco": ("soco", 0.3),
        "slab": ("slab", 0.5),
    }
    assert Path(hf_lowrank.reference_model()).is_dir()
    assert Path(hf_lowrank.reference_text()).is_file()
