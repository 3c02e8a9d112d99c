"""Fused experts are compressed one by one: a bank computes what they compute, and checkpoints say which are apart."""

import copy
import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

import hf_lowrank
from hf_lowrank import CheckpointError, CompressionConfig, CompressionError, cli, compress
from hf_lowrank.calibration import block_statistics, calibration_batches, capture
from hf_lowrank.calibration.statistics import LayerInput, on_common_tokens
from hf_lowrank.compression import soco_training
from hf_lowrank.execution.work_folder import Record, WorkFolder
from hf_lowrank.models.architectures import find_blocks, separate_experts
from hf_lowrank.models.linears import dense_weight
from hf_lowrank.runtime.experts import ExpertBank, is_fused_experts

from ..support.model_families import FAMILIES, text

SEPARATED = ["Mixtral", "Qwen2-MoE", "Qwen3-MoE", "OLMoE", "DeepSeek-V2", "DeepSeek-V3"]
"""Families whose fused experts are separated into banks."""
BANK = "model.layers.1.mlp.experts"
EXPERTS = 4
"""Number of experts of a bank."""


def recipe(method: str = "slab", ratio: float = 0.4, **options: Any) -> CompressionConfig:
    options = options or {"slab": {"iterations": 2}, "sola": {"skip_blocks": 0}}.get(method, {})
    return CompressionConfig(method=method, ratio=ratio, samples=8, sequence_length=12, options=options)


def compressed(family: str, config: CompressionConfig | None = None) -> PreTrainedModel:
    """Return a compressed model of a family."""
    model, batches = FAMILIES[family].make(), FAMILIES[family].batches()
    return compress(model, config or recipe(), calibration=batches, progress=False)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(text(2)).logits


@pytest.mark.parametrize("family", SEPARATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bank_computes_what_the_fused_module_does(family: str, dtype: torch.dtype) -> None:
    fused = FAMILIES[family].make(dtype).get_submodule(BANK)
    bank = ExpertBank(fused)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, fused.down_proj.shape[1], generator=generator).to(dtype)
    indices = torch.rand(9, EXPERTS, generator=generator).argsort(dim=1)[:, :2]
    weights = torch.rand(9, 2, generator=generator)
    eager_forward = inspect.unwrap(type(fused).forward)  # without the choice between transformers' implementations
    with torch.no_grad():
        expected = eager_forward(fused, x, indices, weights)
        assert torch.equal(bank(x, indices, weights), expected)
        assert torch.equal(eager_forward(bank.fuse(), x, indices, weights), expected)
    assert storages(bank) == storages(fused)  # the weights of the bank are views of those of the module


def storages(module: nn.Module) -> set[int]:
    return {weight.untyped_storage().data_ptr() for weight in module.parameters()}


def test_experts_that_compute_something_else_stay_fused_and_are_reported() -> None:
    family = FAMILIES["Mixtral"]
    model = family.make()
    usual = type(model.get_submodule(BANK))

    class Clamped(usual):  # type: ignore[misc, valid-type]
        """Experts with the usual tensors, which compute something else where numbers are large."""

        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            eager = inspect.unwrap(usual.forward)
            return eager(self, hidden_states.clamp(-50, 50), top_k_index, top_k_weights)

    model.get_submodule(BANK).__class__ = Clamped
    assert not is_fused_experts(model.get_submodule(BANK))
    compress(model, recipe(), calibration=family.batches(), progress=False)
    report = model.compression_report
    assert type(model.get_submodule(BANK)) is Clamped
    assert model.config.quantization_config.experts == ["model.layers.0.mlp.experts"]
    assert report["warnings"][0].startswith("2 fused expert tensors (")
    assert BANK in report["warnings"][0]


def test_statistics_are_those_of_the_tokens_that_come_to_an_expert_and_are_no_padding() -> None:
    family = FAMILIES["Qwen3-MoE"]
    model, batches = family.make(), family.batches()
    blocks = find_blocks(model)
    bank = separate_experts(blocks)[BANK]
    calls: list[tuple[Tensor, ...]] = []
    handle = bank.register_forward_pre_hook(lambda module, arguments: calls.append(arguments))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    captured = capture(model, blocks, calibration_batches(model, recipe(), calibration=batches))
    layers = {f"{index}": bank[index].gate_up for index in range(EXPERTS)}
    for index, block in enumerate(blocks.values()):
        measured = block_statistics(block, index, captured, layers if index else {}, needs_gram=True, move=True)
    for index in range(EXPERTS):
        x = inputs_of_expert(index, calls, batches).double()
        statistics = measured[str(index)]
        assert statistics is not None and statistics.gram is not None
        assert statistics.tokens == len(x)
        torch.testing.assert_close(statistics.gram, x.T @ x, rtol=1e-4, atol=1e-5)


def inputs_of_expert(index: int, calls: list[tuple[Tensor, ...]], batches: list[dict[str, Tensor]]) -> Tensor:
    """Return the inputs of the tokens that the router sends to an expert and that are no padding, (T, n).

    Args:
        index: number of the expert.
        calls: for every batch, the arguments of the bank: inputs, indices of the chosen experts, and their weights.
        batches: the batches, which may have an attention mask.
    """
    inputs = []
    for (states, experts, _), batch in zip(calls, batches, strict=True):
        counts = batch.get("attention_mask", torch.ones(states.shape[0])).flatten().bool()
        inputs.append(states[(experts == index).any(dim=1) & counts])
    return torch.cat(inputs)


def test_two_passes_are_compared_token_by_token() -> None:
    """An expert may see other tokens, in another order, once the layers before it are compressed."""
    first = LayerInput(torch.tensor([[4.0], [1.0], [7.0]]), torch.tensor([4, 1, 7]))
    second = LayerInput(torch.tensor([[70.0], [20.0], [40.0]]), torch.tensor([7, 2, 4]))
    one, other = on_common_tokens(first, second)
    assert one.x.flatten().tolist() == [4, 7]
    assert other.x.flatten().tolist() == [40, 70]
    assert one.tokens is other.tokens
    assert not len(on_common_tokens(first, LayerInput(torch.ones(1, 1), torch.tensor([3])))[0].x)


@pytest.mark.parametrize("method", ["slab", "svd-llm", "sola", "auto", "fwsvd"])
def test_experts_that_see_no_token_are_compressed_without_data_and_counted(method: str) -> None:
    options = {"update": True} if method == "svd-llm" else {}
    config = recipe(method, 0.5 if method == "auto" else 0.4, **options)
    # A single token goes to two of the four experts of every block. What learns from the next token needs two.
    tokens = [5, 5] if method == "fwsvd" else [5]
    model = compress(FAMILIES["Qwen3-MoE"].make(), config, calibration=[tokens], progress=False)
    report = model.compression_report
    unseen = [entry["name"] for entry in report["layers"] if not entry["tokens"]]
    expected = []
    if unseen:
        names = f"{len(unseen)} layers saw no calibration token, such as {unseen[0]}"
        expected = [f"{names}; they are compressed without data"]
    # `sola` and `auto` leave such layers dense: those that have data are cheap to describe with so few tokens.
    assert unseen or method in ("sola", "auto")
    assert all(".experts." in name for name in unseen)
    assert report["warnings"][:-1] == expected
    assert "expert layers saw fewer calibration tokens than they have inputs" in report["warnings"][-1]
    assert bool(logits(model).isfinite().all())


def test_prime_neurons_of_an_expert_are_its_own() -> None:
    dense = FAMILIES["Mixtral"].make()
    separate_experts(find_blocks(dense))
    config = CompressionConfig(
        method="sola", ratio=0.1, options={"skip_blocks": 0}, modules_to_not_convert=["gate_up"]
    )
    model = compressed("Mixtral", config)
    orders = set()
    for before, after in zip(dense.get_submodule(BANK), model.get_submodule(BANK), strict=True):
        # The prime neurons are known by the columns that the output matrix keeps.
        columns = before.down.weight
        neurons = [int((columns == kept[:, None]).all(dim=0).nonzero()) for kept in after.down.weight.T]
        assert len(neurons) == 12  # 15 % of 80, SoLA's default
        orders.add(tuple(neurons))
        for half in (0, 80):  # the first rows of gate and of up
            kept = after.gate_up.weight[half : half + 12]
            assert torch.equal(kept, before.gate_up.weight[half : half + 80][neurons])
    assert len(orders) == EXPERTS


def test_a_compression_that_fails_leaves_the_model_as_it_was() -> None:
    model, untouched = FAMILIES["Mixtral"].make(), FAMILIES["Mixtral"].make()
    with pytest.raises(CompressionError, match="out of reach"):
        compress(model, recipe("gptq", 0.1), calibration=text(2).tolist(), progress=False)
    assert module_types(model) == module_types(untouched)
    assert all(torch.equal(tensor, untouched.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), logits(untouched))


def module_types(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("method", ["sola", "soco"])
def test_a_killed_run_goes_on_to_the_same_weights(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"steps": 4, "finish_steps": 2, "batch_tokens": 12} if method == "soco" else {}
    config = recipe(method, **options)
    monkeypatch.setattr(soco_training, "STEPS_BETWEEN_STATES", 3)
    family, expected, written = FAMILIES["Mixtral"], compressed("Mixtral", config).state_dict(), []
    usual = WorkFolder.write

    def write(self: WorkFolder, name: str, record: Record) -> None:
        usual(self, name, record)
        written.append(name)
        if name in ("measured-00000", soco_training.STATE, "built-00000") and written.count(name) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(WorkFolder, "write", write)
    kills = 3 if method == "soco" else 2
    for _ in range(kills):
        with pytest.raises(KeyboardInterrupt):
            compress(family.make(), config, calibration=family.batches(), work_dir=tmp_path, progress=False)
    model = compress(family.make(), config, calibration=family.batches(), work_dir=tmp_path, progress=False)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed mixture of experts, one of which is dense."""
    folder = tmp_path_factory.mktemp("mixture") / "model"
    config = recipe()
    config.modules_to_not_convert = ["layers.1.mlp.experts.2"]
    compressed("Mixtral", config).save_pretrained(folder)
    return folder


def test_a_dense_expert_among_compressed_ones_is_stored_by_itself(saved: Path) -> None:
    weight = FAMILIES["Mixtral"].make().get_submodule(BANK).down_proj[2]
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor(f"{BANK}.2.down.weight"), weight)
    model = AutoModelForCausalLM.from_pretrained(saved)
    expert = model.get_submodule(f"{BANK}.2")
    assert torch.equal(expert.down.weight, weight)
    # Its storage is its own, and not a view of a tensor for all experts.
    assert expert.down.weight.untyped_storage().nbytes() == weight.numel() * weight.itemsize
    assert hf_lowrank.inspect(saved).ratio_stored == pytest.approx(
        json.loads((saved / "compression_report.json").read_text())["ratio_stored"]
    )
    assert hf_lowrank.verify(saved).sound


def test_a_mixture_opens_as_its_base_model_and_is_saved_from_there(saved: Path, tmp_path: Path) -> None:
    base, whole = AutoModel.from_pretrained(saved), AutoModelForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        assert torch.equal(base(text(2))[0], whole.model(text(2))[0])
    base.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).config.quantization_config.experts == [
        "layers.0.mlp.experts",
        "layers.1.mlp.experts",
    ]


def test_a_dense_mixture_has_the_names_of_its_family(saved: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["dense", str(saved), "-o", str(tmp_path / "dense")])
    assert done.exit_code == 0, done.output
    FAMILIES["Mixtral"].make().save_pretrained(tmp_path / "original")
    names = []
    for folder in ("dense", "original"):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            names.append(set(file.keys()))
    assert names[0] == names[1]
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(saved)
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-4, atol=1e-5)
    fused, expected = dense.get_submodule(BANK), copy.deepcopy(model).dequantize().get_submodule(BANK)
    assert type(fused) is type(expected)
    assert torch.equal(fused.gate_up_proj, expected.gate_up_proj)


def name_expert_99(values: dict[str, Any]) -> None:
    layers = values["quantization_config"]["layers"]
    layers[f"{BANK}.99.down"] = layers.pop(f"{BANK}.1.down")


def name_attention(values: dict[str, Any]) -> None:
    values["quantization_config"]["experts"].append("model.layers.0.self_attn")


def name_missing_module(values: dict[str, Any]) -> None:
    values["quantization_config"]["experts"][0] = "model.layers.7.mlp.experts"


def leave_one_bank_out(values: dict[str, Any]) -> None:
    values["quantization_config"]["experts"].pop()


def give_no_list(values: dict[str, Any]) -> None:
    values["quantization_config"]["experts"] = {"model.layers.0.mlp.experts": 4}


def ask_for_too_many(values: dict[str, Any]) -> None:
    values["num_local_experts"] = 90_000


def have_fewer_experts(values: dict[str, Any]) -> None:
    values["num_local_experts"] = 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (name_expert_99, r"experts\.99\.down: found no such module in MixtralForCausalLM, expected a linear layer"),
        (name_attention, "self_attn: found MixtralAttention in MixtralForCausalLM, expected fused experts"),
        (name_missing_module, r"layers\.7\.mlp\.experts: found no such module"),
        (leave_one_bank_out, r"layers\.1\.mlp\.experts\.0\.down: found no such module"),
        (give_no_list, "experts: found .* expected a list of module names"),
        (ask_for_too_many, "asks for more than [0-9]+ modules"),
        (have_fewer_experts, r"experts\.3\.down: found no such module"),
    ],
)
def test_a_config_that_names_other_experts_is_refused(
    saved: Path, tmp_path: Path, damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    values = json.loads((folder / "config.json").read_text())
    damage(values)
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message) as raised:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "\n" not in str(raised.value)


def test_an_expert_of_another_shape_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    values = json.loads((folder / "config.json").read_text())
    values["intermediate_size"] = 72
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="experts"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_copy_of_a_bank_belongs_to_the_copy_of_the_model(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    copied = copy.deepcopy(model)
    assert copied.get_submodule(BANK).fused.config is copied.config
    assert isinstance(copied.dequantize().get_submodule(BANK).gate_up_proj, nn.Parameter)
    assert isinstance(model.get_submodule(BANK), ExpertBank)
    assert dense_weight(model.get_submodule(f"{BANK}.2.down")).shape == (32, 80)
