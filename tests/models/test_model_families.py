"""Laws that hold for every family of models, of which nothing is used but the structure."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForTextEncoding, PreTrainedModel, T5Config, T5EncoderModel

from hf_lowrank import CompressedLinear, CompressionConfig, compress
from hf_lowrank.checkpoints.inspect import inspect
from hf_lowrank.models.architectures import (
    find_blocks,
    find_feed_forwards,
    find_layers,
    fused_experts,
    separate_experts,
)
from hf_lowrank.models.linears import dense_weight, permute_inputs, permute_outputs
from hf_lowrank.models.loading import load_model

from ..support.fresh_process import INPUT_IDS, open_elsewhere
from ..support.model_families import FAMILIES, Batches, table, text
from ..support.whole_models import answers, counted, in_fresh_memory, recipe, seen_by_layers, statistics_of_layers

FUSED = {"Phi-3", "ModernBERT"}
MIXTURES = {"Mixtral": 8, "Qwen2-MoE": 8, "Qwen3-MoE": 8, "OLMoE": 8, "DeepSeek-V2": 4, "DeepSeek-V3": 4}
"""Number of experts in all blocks by family."""
WITHOUT_NETWORKS = {"BitNet", "Mixtral", "Qwen3-MoE", "OLMoE", "GPT-OSS"}
"""Families that have no feed-forward networks beside those of experts."""
REPRESENTATIVE = ["Llama", "OPT", "GPT-2", "Phi-3", "BERT", "T5", "Whisper"]


def generated(model: PreTrainedModel, batches: Batches) -> Tensor:
    inputs = {name: tensor for name, tensor in batches[0].items() if not name.startswith("decoder")}
    return model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_it_is_compressed_saved_opened_and_runs(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    batches, model = family.batches(), family.make()
    dense = answers(model, batches)
    tied = (
        model.get_output_embeddings() is not None
        and model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    compress(model, recipe(), calibration=batches, progress=False)
    report = model.save_pretrained.report
    assert 0.5 <= report["ratio_stored"] <= 0.505
    model.save_pretrained(tmp_path)
    by_card = re.search(
        r"^model = (\w+)\.from_pretrained", (tmp_path / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert by_card is not None
    for loaded in (getattr(transformers, by_card[1]).from_pretrained(tmp_path), load_model(str(tmp_path))):
        opened = in_fresh_memory(loaded)
        assert type(opened) is type(model)
        assert sum(isinstance(module, CompressedLinear) for module in opened.modules()) == len(report["layers"])
        for answer, expected, before in zip(answers(opened, batches), answers(model, batches), dense, strict=True):
            assert torch.equal(answer, expected)
            assert not torch.equal(answer, before)
    if model.can_generate():
        assert torch.equal(generated(opened, batches), generated(model, batches))
    if tied:
        assert opened.get_output_embeddings().weight is opened.get_input_embeddings().weight
    inspection = inspect(tmp_path)
    assert inspection.ratio_stored == pytest.approx(report["ratio_stored"], abs=1e-12)


def test_every_weight_of_the_blocks_is_compressed_or_explained(name: str) -> None:
    family = FAMILIES[name]
    model = compress(family.make(), recipe(), calibration=family.batches(), progress=False)
    report = model.save_pretrained.report
    original = family.make()
    blocks = find_blocks(original)
    assert len(separate_experts(blocks)) == len(model.config.quantization_config.experts)
    experts = fused_experts(original, blocks)
    compressed = {entry["name"] for entry in report["layers"]}
    for block_name, block in blocks.items():
        for path, parameter in block.named_parameters():
            weight = f"{block_name}.{path}"
            layer = weight.rpartition(".")[0]
            if parameter.dim() > 1 and layer not in compressed | report["dense"].keys() and weight not in experts:
                assert weight.endswith(family.outside), weight
    assert set(report["dense"].values()) <= {"it routes tokens to experts or weighs them, and is tiny"}
    assert bool(experts) == (name == "GPT-OSS") == any("fused expert" in warning for warning in report["warnings"])
    assert all("expert" in warning for warning in report["warnings"])
    assert all(entry["tokens"] for entry in report["layers"])


def test_statistics_are_those_of_the_models_own_forward(name: str) -> None:
    family = FAMILIES[name]
    model, batches = family.make(), family.batches()
    layers = find_layers(find_blocks(model))  # those of separated experts are for tests/runtime/test_experts.py
    seen = seen_by_layers(model, [layer.name for layer in layers], batches)
    for layer, entry in statistics_of_layers(model, batches):
        if layer not in seen:  # the router of older versions of transformers, which is read and not called
            assert entry is None
            continue
        x = torch.cat([counted(layer, part, batch) for part, batch in zip(seen[layer], batches, strict=True)])
        assert entry is not None
        assert entry.tokens == len(x)
        assert entry.gram is not None
        # block by block rounds otherwise than the whole model
        torch.testing.assert_close(entry.gram, x.T @ x, rtol=1e-4, atol=1e-5)


def test_permuted_neurons_leave_the_function_unchanged(name: str) -> None:
    family = FAMILIES[name]
    model, batches = family.make(), family.batches()
    before = answers(model, batches)
    networks = 0
    blocks = find_blocks(model)
    banks = separate_experts(blocks)
    for block in blocks.values():
        for network in find_feed_forwards(block):
            output = block.get_submodule(network.output)
            order = torch.randperm(dense_weight(output).shape[1], generator=torch.Generator().manual_seed(1))
            for part in network.inputs:
                permute_outputs(
                    block.get_submodule(part), torch.cat([order, order + len(order)]) if network.fused else order
                )
            permute_inputs(output, order)
            networks += 1
            assert network.fused == (name in FUSED or ".experts." in network.output)
    for one, other in zip(before, answers(model, batches), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert sum(map(len, banks.values())) == MIXTURES.get(name, 0)
    assert networks == MIXTURES.get(name, 0) + (0 if name in WITHOUT_NETWORKS else len(blocks))


@pytest.mark.parametrize("method", ["sola", "svd-llm with update"])
@pytest.mark.parametrize("family", REPRESENTATIVE)
def test_low_rank_methods_work_on_representatives(family: str, method: str, tmp_path: Path) -> None:
    batches, model = FAMILIES[family].batches(), FAMILIES[family].make()
    name, _, update = method.partition(" with ")
    compress(model, recipe(name, 0.3, **({"update": True} if update else {})), calibration=batches, progress=False)
    report = model.save_pretrained.report
    assert 0.3 <= report["ratio_stored"] <= 0.305
    model.save_pretrained(tmp_path)
    opened = in_fresh_memory(type(model).from_pretrained(tmp_path))
    for found, expected in zip(answers(opened, batches), answers(model, batches), strict=True):
        assert torch.equal(found, expected)
    if method == "sola":
        layouts = {entry["sparse"] for entry in report["layers"]}
        assert layouts == ({"none", "columns"} if family in FUSED else {"none", "columns", "rows"})


def test_prime_neurons_of_a_fused_network_are_those_of_both_halves() -> None:
    dense, model = FAMILIES["Phi-3"].make(), FAMILIES["Phi-3"].make()
    config = CompressionConfig(
        method="sola", ratio=0.1, options={"skip_blocks": 0}, modules_to_not_convert=["gate_up_proj"]
    )
    compress(model, config, calibration=text(4).tolist(), progress=False)
    for before, after in zip(dense.model.layers, model.model.layers, strict=True):
        columns, kept = before.mlp.down_proj.weight, after.mlp.down_proj.weight
        neurons = [int((columns == column[:, None]).all(dim=0).nonzero()) for column in kept.T]
        assert len(neurons) == 12
        assert neurons == sorted(set(neurons))
        rows_before, rows_after = before.mlp.gate_up_proj.weight, after.mlp.gate_up_proj.weight
        for half in (0, 80):
            assert torch.equal(rows_after[half : half + 12], rows_before[half : half + 80][neurons])


def test_a_model_of_no_common_task_keeps_its_class(tmp_path: Path) -> None:
    """`AutoModel` would open another class: one with random weights in its decoder, and with other names of layers."""
    config = T5Config(vocab_size=64, d_model=24, d_kv=6, d_ff=40, num_layers=1, num_heads=4)
    compress(
        T5EncoderModel(config), recipe("magnitude"), calibration=text(2).tolist(), progress=False
    ).save_pretrained(tmp_path)
    assert type(load_model(str(tmp_path))) is T5EncoderModel
    assert 0.5 <= inspect(tmp_path).ratio_stored <= 0.505
    opened = AutoModelForTextEncoding.from_pretrained(tmp_path)
    assert type(opened) is T5EncoderModel
    assert "AutoModelForTextEncoding.from_pretrained" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForTextEncoding" in json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["auto_map"]


def test_checkpoints_open_without_the_package(tmp_path: Path) -> None:
    causal = ("Phi-3", "Falcon", "Mixtral", "Qwen3-MoE", "OLMoE", "DeepSeek-V2")
    classes = {**dict.fromkeys(causal, "AutoModelForCausalLM"), "BERT": "AutoModelForMaskedLM"}
    tasks, expected = [], []
    for name, auto_class in classes.items():
        family = FAMILIES[name]
        model = compress(family.make(), recipe(), calibration=family.batches(), progress=False)
        model.save_pretrained(tmp_path / name)
        tasks.append(
            {"folder": str(tmp_path / name), "auto_class": auto_class, "arguments": {"trust_remote_code": True}}
        )
        expected += answers(model, [{"input_ids": torch.tensor(INPUT_IDS)}])
    for name, logits, found in zip(
        classes, expected, open_elsewhere(tasks, tmp_path, installed=False, imported=False), strict=True
    ):
        assert "error" not in found, found
        assert found["class"].rpartition(".")[2] == FAMILIES[name].model
        assert all(module.startswith("transformers_modules.") for module in found["layers"])
        assert torch.equal(torch.tensor(found["logits"]), logits.flatten())


def test_the_page_about_models_is_current() -> None:
    pins = (Path(__file__).parents[2] / "constraints.txt").read_text(encoding="utf-8")
    if f"transformers=={transformers.__version__}\n" not in pins:
        pytest.skip("the page was made with another version of transformers")
    assert (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8") == table()
