"""Laws that hold for every family of models, of which nothing is used but the structure."""

import copy
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoModelForTextEncoding,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
)

from hf_lowrank import CompressedLinear, CompressionConfig, CompressionError, compress
from hf_lowrank.budget import Budget
from hf_lowrank.calibration import block_statistics, calibration_batches, capture
from hf_lowrank.checkpoints.inspect import inspect
from hf_lowrank.methods import Decomposition, Statistics
from hf_lowrank.methods.svd_llm import SVDLLM
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
from ..support.model_families import FAMILIES, SIZES, Batches, pairs_of_texts, pictures, sounds_and_texts, table, text

FUSED = {"Phi-3", "ModernBERT"}
MIXTURES = {"Mixtral": 8, "Qwen2-MoE": 8, "Qwen3-MoE": 8, "OLMoE": 8, "DeepSeek-V2": 4, "DeepSeek-V3": 4}
"""Number of experts in all blocks by family."""
WITHOUT_NETWORKS = {"BitNet", "Mixtral", "Qwen3-MoE", "OLMoE", "GPT-OSS"}
"""Families that have no feed-forward networks beside those of experts."""
REPRESENTATIVE = ["Llama", "OPT", "GPT-2", "Phi-3", "BERT", "T5", "Whisper"]
OPTIONS = {"slab": {"iterations": 2}}


def recipe(method: str = "slab", ratio: float = 0.5, **options: Any) -> CompressionConfig:
    return CompressionConfig(
        method=method, ratio=ratio, samples=9, sequence_length=28, options=OPTIONS.get(method, {}) | options
    )


def answers(model: PreTrainedModel, batches: Batches) -> list[Tensor]:
    with torch.no_grad():
        return [model(**batch)[0] for batch in batches]


def generated(model: PreTrainedModel, batches: Batches) -> Tensor:
    inputs = {name: tensor for name, tensor in batches[0].items() if not name.startswith("decoder")}
    return model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)


def in_fresh_memory(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy whose weights do not lie in the mapped file any more.

    Products may round otherwise in the last bit where weights are not aligned in memory.
    """
    return copy.deepcopy(model)


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


def seen_by_layers(model: PreTrainedModel, layers: Iterable[str], batches: Batches) -> dict[str, list[Tensor]]:
    """Return the input of every layer, (..., n) per batch, in the model's own forward."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        model.get_submodule(layer).register_forward_pre_hook(
            lambda module, inputs, name=layer: seen.setdefault(name, []).append(inputs[0])
        )
        for layer in layers
    ]
    answers(model, batches)
    for handle in handles:
        handle.remove()
    return seen


def counted(name: str, x: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Return the tokens of a layer's input that are no padding.

    It looks at the names of layers, which the package does not.
    """
    mask = batch.get("attention_mask")
    cross = any(part in name for part in ("EncDecAttention", "encoder_attn"))
    if (
        "decoder" in name
        and "decoder_input_ids" in batch
        and not (cross and name.endswith(("k", "v", "k_proj", "v_proj")))
    ):
        mask = batch.get("decoder_attention_mask")
    x = x.double()
    return x.flatten(0, -2) if mask is None else x.reshape(*mask.shape, -1)[mask.bool()]


def test_statistics_are_those_of_the_models_own_forward(name: str) -> None:
    family = FAMILIES[name]
    model, batches = family.make(), family.batches()
    blocks = find_blocks(model)
    layers = find_layers(blocks)  # those of separated experts are for tests/runtime/test_experts.py
    seen = seen_by_layers(model, [layer.name for layer in layers], batches)
    captured = capture(model, blocks, calibration_batches(model, recipe(), calibration=batches))
    for index, block in enumerate(blocks.values()):
        for batch in captured:
            batch.enter_block_list(index)
        modules = {layer.name: model.get_submodule(layer.name) for layer in layers if layer.block == index}
        statistics = block_statistics(block, index, captured, modules, needs_gram=True, move=True)
        for layer, entry in statistics.items():
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


@pytest.mark.parametrize("method", ["sola", "svd-llm", "svd-llm with update"])
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


@pytest.mark.parametrize("family", ["T5", "BART", "Whisper"])
def test_a_decoder_is_calibrated_on_the_compressed_encoder(family: str) -> None:
    """A sequential method measures keys and values on the encoder of the model that it makes."""
    batches, original, model = FAMILIES[family].batches(), FAMILIES[family].make(), FAMILIES[family].make()
    compress(model, recipe(), calibration=batches, progress=False)
    reported = {entry["name"]: entry["relative_error"] for entry in model.save_pretrained.report["layers"]}
    keys = [name for name in reported if name.endswith(("EncDecAttention.k", "encoder_attn.k_proj"))]
    assert len(keys) == 2
    now, before = seen_by_layers(model, keys, batches), seen_by_layers(original, keys, batches)
    for key in keys:
        weight = original.get_submodule(key).weight.double()
        lost = weight - model.get_submodule(key).to_dense(weight.dtype)
        errors = []
        for seen in (now, before):
            norms = torch.cat([counted(key, x, batch) for x, batch in zip(seen[key], batches, strict=True)]).norm(
                dim=0
            )
            errors.append(float((lost * norms).norm() / (weight * norms).norm()))
        assert reported[key] == pytest.approx(errors[0], rel=1e-5)
        assert reported[key] != pytest.approx(errors[1], rel=1e-5)


def test_compressed_inputs_of_a_decoder_are_those_of_the_compressed_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[Tensor, Statistics]] = []
    decompose = SVDLLM.decompose

    def spy(self: SVDLLM, weight: Tensor, statistics: Statistics, budget: Budget) -> Decomposition:
        measured.append((weight, statistics))
        return decompose(self, weight, statistics, budget)

    monkeypatch.setattr(SVDLLM, "decompose", spy)
    batches, original, model = FAMILIES["T5"].batches(), FAMILIES["T5"].make(), FAMILIES["T5"].make()
    compress(model, recipe("svd-llm", 0.3, update=True), calibration=batches, progress=False)
    keys = [f"decoder.block.{index}.layer.1.EncDecAttention.k" for index in range(2)]
    now, before = seen_by_layers(model, keys, batches), seen_by_layers(original, keys, batches)
    for key in keys:
        weight = original.get_submodule(key).weight.double()
        (statistics,) = (entry for dense, entry in measured if torch.equal(dense, weight))
        x_hat = counted(key, now[key][0], batches[0])
        x = counted(key, before[key][0], batches[0])
        for gram, expected in (
            (statistics.gram, x.T @ x),
            (statistics.compressed_input_gram, x_hat.T @ x_hat),
            (statistics.cross_gram, x.T @ x_hat),
        ):
            torch.testing.assert_close(gram, expected, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(statistics.gram, statistics.compressed_input_gram, rtol=1e-2)


@pytest.mark.parametrize("batch", [{}, {"labels": text(4, seed=1)}], ids=["text", "labels"])
def test_a_decoder_without_inputs_reads_labels_or_the_text_one_token_late(batch: dict[str, Tensor]) -> None:
    family = FAMILIES["T5"]
    written = batch.get("labels", text(4))
    late = torch.cat([torch.zeros(4, 1, dtype=torch.long), written[:, :-1]], dim=1)
    given: list[Any] = [[{"input_ids": text(4), **batch}], [{"input_ids": text(4), "decoder_input_ids": late}]]
    if not batch:
        given.append(text(4).tolist())
    states = [compress(family.make(), recipe(), calibration=each, progress=False).state_dict() for each in given]
    for state in states[1:]:
        assert all(torch.equal(state[name], tensor) for name, tensor in states[0].items())


def test_labels_that_do_not_count_are_padding_for_the_decoder() -> None:
    labels = text(4, seed=1)
    labels[2, 5:] = -100
    (batch,) = calibration_batches(
        FAMILIES["T5"].make(), recipe(), calibration=[{"input_ids": text(4), "labels": labels}]
    )
    ids, mask = batch.others["decoder_input_ids"], batch.others["decoder_attention_mask"]
    assert torch.equal(ids[:2, 1:], labels[:2, :-1])
    assert mask.sum(dim=1).tolist() == [12, 12, 6, 12]
    assert bool((ids >= 0).all())
    assert "labels" not in batch.others


def test_a_vision_tower_that_calibration_never_reaches_stays_dense_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    family = FAMILIES["LLaVA"]
    model = compress(family.make(), recipe(ratio=0.3), calibration=text(4).tolist(), progress=False)
    report = model.save_pretrained.report
    assert len(report["dense"]) == 12
    assert all(layer.startswith("model.vision_tower.") for layer in report["dense"])
    assert all("no calibration batch comes through its block" in reason for reason in report["dense"].values())
    assert any("stay dense" in record.getMessage() for record in caplog.records)
    assert 0.3 <= report["ratio_stored"] <= 0.305
    with pytest.raises(CompressionError, match="out of reach"):
        compress(family.make(), recipe(ratio=0.8), calibration=text(4).tolist(), progress=False)


def test_batches_with_and_without_pictures_mix() -> None:
    family = FAMILIES["LLaVA"]
    batches = [{"input_ids": text(2)}, *family.batches(), {"input_ids": text(3)}]
    report = compress(family.make(), recipe(), calibration=batches, progress=False).save_pretrained.report
    tokens = {entry["name"].split(".")[1]: entry["tokens"] for entry in report["layers"]}
    assert tokens == {"vision_tower": 3 * 17, "language_model": 3 * 28 + 5 * 12}
    assert report["dense"] == {}


class Weightless(nn.Module):
    """Uses the weight of a layer without calling the layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.extra = inner, nn.Linear(32, 32)

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        return self.inner(hidden_states + 0.1 * hidden_states @ self.extra.weight, **arguments)


def test_a_layer_that_is_never_called_stays_dense_and_says_so() -> None:
    model = FAMILIES["Llama"].make()
    model.model.layers[0] = Weightless(model.model.layers[0])
    compress(model, recipe(), calibration=text(4).tolist(), progress=False)
    report = model.save_pretrained.report
    assert list(report["dense"]) == ["model.layers.0.extra"]
    assert "never calls it" in report["dense"]["model.layers.0.extra"]
    assert 0.5 <= report["ratio_stored"] <= 0.505
    answers(model, [{"input_ids": text(2)}])


class Gain(nn.Linear):
    """Has the weight of a linear layer, and computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_subclasses_of_linear_stay_dense_with_a_warning() -> None:
    model = FAMILIES["Llama"].make()
    model.model.layers[1].mlp.up_proj = Gain(32, 80, bias=False)
    report = compress(model, recipe(), calibration=text(4).tolist(), progress=False).save_pretrained.report
    assert type(model.model.layers[1].mlp.up_proj) is Gain
    assert report["warnings"] == [
        "model.layers.1.mlp.up_proj stays dense: Gain may compute something else than nn.Linear"
    ]


def refusals() -> Iterator[tuple[str, str, Any, str, str]]:
    yield "T5", "slab", "self", "cannot calibrate on itself", "reads one text"
    yield "BERT", "slab", "self", "cannot generate text", "calibrate on itself"
    yield "ViT", "slab", "self", "cannot generate text", "calibrate on itself"
    yield "Whisper", "slab", "self", "cannot calibrate on itself", "give calibration="
    yield "ViT", "slab", text(2).tolist(), "reads pixel_values", "found input_ids"
    yield (
        "Whisper",
        "slab",
        [{"input_features": sounds_and_texts()[0]["input_features"]}],
        "decoder_input_ids or labels",
        "Whisper",
    )
    yield "Llama", "slab", pictures(), "reads, such as input_ids", "fields pixel_values"
    yield "T5", "soco", pairs_of_texts(), "loss of the next token", "T5ForConditionalGeneration"
    yield "BERT", "fwsvd", text(2).tolist(), "loss of the next token", "BertForMaskedLM"


@pytest.mark.parametrize(("family", "method", "calibration", "what", "where"), refusals())
def test_what_cannot_be_is_refused_before_any_work(
    family: str, method: str, calibration: Any, what: str, where: str
) -> None:
    model, untouched = FAMILIES[family].make(), FAMILIES[family].make().state_dict()
    with pytest.raises(CompressionError, match=what) as raised:
        compress(model, recipe(method, 0.3), calibration=calibration, progress=False)
    assert where in str(raised.value)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in model.state_dict().items())


def test_a_block_that_runs_more_than_once_is_refused_by_name() -> None:
    model = AlbertForMaskedLM(AlbertConfig(vocab_size=64, embedding_size=16, **SIZES))
    with pytest.raises(CompressionError, match=r"AlbertForMaskedLM: .*albert_layer_groups\.0 twice"):
        compress(model, recipe(), calibration=text(2).tolist(), progress=False)


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
    assert (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8") == table()
