"""The tables of the papers fill themselves, here with tiny models of the same architectures and with local texts."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from benchmarks.papers import run as papers
from hf_lowrank import CompressionConfig
from hf_lowrank.methods import make_method
from hf_lowrank.models.architectures import find_blocks, find_layers

from ..support import tiny_models

TABLES = ("sola", "soco", "slab")
SHAPE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
SHAPE |= {"max_position_embeddings": 64, "vocab_size": tiny_models.VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
"""Sizes that all tiny models share."""
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def tiny(name: str) -> PreTrainedModel:
    """Build a tiny model like one in the tables, with grouped-query attention and tied embeddings if that has them."""
    torch.manual_seed(0)
    if "Mistral" in name:
        return MistralForCausalLM(MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=None))
    changes: dict[str, Any] = {"num_key_value_heads": 2 if "Llama-3" in name or "70B" in name else 4}
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **changes, tie_word_embeddings="3.2" in name))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and an lm-eval task."""
    folder = tmp_path_factory.mktemp("papers")
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(tiny_models.text(20)), encoding="utf-8")
    items = []
    for number in range(1, 8):
        items.append({"question": "the cat " * number, "choices": [" sat", " ran"], "label": number % 2})
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
    (folder / "tiny.yaml").write_text(TASK.format(name="tiny_choice", data=folder / "items.jsonl"), encoding="utf-8")
    return folder


def rehearsal(name: str, home: Path) -> papers.Table:
    """Load a paper's table, and put tiny models, local texts, one task and short training in the place of its own."""
    table = papers.load_table(name)
    for model, entry in table["models"].items():
        entry |= {"id": str(tiny_models.saved(tiny(model), home / name / model)), "window": 32}
    table["texts"] = {text: {"source": str(home / "text.txt"), "max_windows": 4} for text in table["texts"]}
    table["calibration"] |= {"source": str(home / "text.txt"), "samples": 4, "sequence_length": 32}
    table["tasks"] = {task: {**entry, "task": "tiny_choice"} for task, entry in table["tasks"].items()}
    if name == "soco":
        table["methods"]["soco"] = {"steps": 6, "finish_steps": 2, "batch_tokens": 64}
    return table


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_consistent(name: str) -> None:
    """Every published figure belongs to a row and a column and has a source. Every method and option exists."""
    table = papers.load_table(name)
    columns = {*table["texts"], *table["tasks"], "mean"}
    for figure in table["published"]:
        assert figure["model"] in table["models"]
        assert figure["setting"] in {"dense", *table["settings"]}
        assert figure["metric"] in columns
        assert figure["source"] in {"paper", "second-hand", "SVD-LLM paper"}
    assert set(table["mean_of"]) <= set(table["tasks"])
    for method, options in table["methods"].items():
        make_method(method, options)
        for setting in table["settings"].values():
            if table["method"] == "slab":
                make_method(method, {**options, **setting.get("options", {})})


@pytest.mark.parametrize("name", TABLES)
def test_a_table_fills_itself_and_does_nothing_twice(
    name: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own_tasks_only = partial(lm_eval.tasks.TaskManager, include_defaults=False)  # listing lm-eval's tasks is slow
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", own_tasks_only)
    table = rehearsal(name, home)
    model, setting = list(table["models"])[-1], list(table["settings"])[0 if name != "slab" else -1]
    arguments: dict[str, Any] = {"device": "cpu", "batch_size": 4, "task_folder": home}
    text = papers.fill(table, tmp_path, [model], [setting], [table["method"]], **arguments).read_text(encoding="utf-8")

    record = json.loads(papers.cell_file(tmp_path, model, setting, table["method"]).read_text(encoding="utf-8"))
    assert set(record["measured"]) == {*table["texts"], *table["tasks"], *(["mean"] if table["tasks"] else [])}
    row = next(line for line in text.splitlines() if line.startswith(f"| {model} | {setting} | {table['method']} |"))
    for value in record["measured"].values():
        assert f"· {value:.4g} |" in row
    for figure in table["published"]:
        mark = "" if figure["source"] == "paper" else "†"  # for figures that are second-hand
        assert f" {figure['value']}{mark} · " in text

    # A table that is filled already costs nothing: no file is written again, and no cell is run.
    finished = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}
    capsys.readouterr()
    papers.fill(table, tmp_path, [model], [setting], [table["method"]], **arguments)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")} == finished
    assert capsys.readouterr().err == ""


def test_a_ratio_of_the_whole_model_is_met(home: Path, tmp_path: Path) -> None:
    """SoLA's ratios are shares of all parameters. That much of the model is gone, whatever the share of its blocks."""
    table = rehearsal("sola", home)
    record = papers.run_cell(
        table, "LLaMA-2-7B", "20 %", "sola", tmp_path, tasks=False, device="cpu", batch_size=1, task_folder=None
    )  # fmt: skip
    assert record["model_ratio"] == pytest.approx(0.2, abs=0.005)
    assert record["ratio_stored"] > 0.21


@pytest.mark.parametrize(("setting", "kept", "group"), [("50 %", 0, 0), ("4:8", 4, 8), ("2:4", 2, 4)])
def test_settings_of_slab_follow_the_paper(setting: str, kept: int, group: int, home: Path) -> None:
    """The ratio leaves out mask bits, and N:M holds in every group."""
    table = rehearsal("slab", home)
    config = papers.recipe(table, "Llama-2-7B", setting, "slab")
    assert isinstance(config, CompressionConfig)
    assert (config.ratio, config.accounting) == (0.5, "paper")
    assert config.options.get("pattern", "unstructured") == (f"{kept}:{group}" if group else "unstructured")


def test_every_architecture_is_in_reach_of_every_setting(home: Path) -> None:
    """The paper's ratio is a share that the block linears have, for each model of each table."""
    for name in TABLES:
        table = rehearsal(name, home)
        for model, entry in table["models"].items():
            dense = AutoModelForCausalLM.from_pretrained(entry["id"])
            weights = sum(layer.out_features * layer.in_features for layer in find_layers(find_blocks(dense)))
            everything = sum(parameter.numel() for parameter in dense.parameters())
            for setting, chosen in table["settings"].items():
                ratio = papers.recipe(table, model, setting, table["method"]).ratio
                share = everything if table["removed_share_of"] == "model" else weights
                assert ratio * weights == pytest.approx(chosen["ratio"] * share)
