"""Stock PEFT on compressed models: adapters train, travel and merge as on a dense model, and the merge is exact."""

import shutil
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_lowrank import CompressedLinear, CompressionError
from hf_lowrank.peft.lora import CompressedLoraLinear
from tests.runtime.conftest import tiny_llama
from tests.support.compressed import Compressed, logits
from tests.support.fresh_process import INPUT_IDS, open_elsewhere

from .conftest import RANK, adapted, assert_stored, lora, specs, stored

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest accepted |merged − unmerged| / |unmerged|, relative to the largest logit: a few roundings of the dtype."""


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def train(model: PeftModel, steps: int = 3, autocast: bool = False) -> list[float]:
    ids, losses = torch.tensor(INPUT_IDS), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    model.train()
    for _ in range(steps):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


# --- merging ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_a_merge_is_exact(compressed: Compressed, dtype: torch.dtype) -> None:
    model = adapted(compressed).to(dtype)
    before, ranks, unmerged = stored(model), specs(compressed.saved), logits(model)
    assert relative(logits(compressed.model().to(dtype)), unmerged) > 0.1  # the adapter does something
    merged = model.merge_and_unload()
    assert not any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in merged.modules())
    assert relative(logits(merged), unmerged) < ROUNDING[dtype]
    for name, spec in specs(merged).items():
        assert spec.rank == ranks[name].rank + RANK
        assert (spec.sparse, spec.kept, spec.binary_rank) == (
            ranks[name].sparse,
            ranks[name].kept,
            ranks[name].binary_rank,
        )
    now = stored(merged)
    for name, tensor in before.items():
        assert torch.equal(now[name][tuple(slice(side) for side in tensor.shape)], tensor), name


def test_a_merged_model_is_saved_and_opened(compressed: Compressed, tmp_path: Path) -> None:
    merged = adapted(compressed).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(again) is type(merged)
    assert specs(again) == specs(merged) == again.config.quantization_config.layers
    assert torch.equal(logits(again), logits(merged))


def test_unmerging_gives_every_bit_back(compressed: Compressed) -> None:
    model = adapted(compressed)
    before, ranks, unmerged = stored(model), specs(model), logits(model)
    model.merge_adapter()
    assert relative(logits(model), unmerged) < ROUNDING[torch.float32]
    model.unmerge_adapter()
    assert specs(model) == ranks
    assert_stored(model, before)
    assert torch.equal(logits(model), unmerged)


def test_several_adapters_merge_one_after_the_other(compressed: Compressed) -> None:
    model = adapted(compressed)
    model.add_adapter("second", lora(compressed, r=2, use_rslora=True))
    model.base_model.set_adapter(["default", "second"])
    both, before, ranks = logits(model), stored(model), specs(compressed.saved)
    model.merge_adapter(["second"])
    model.merge_adapter(["default"])
    assert relative(logits(model), both) < ROUNDING[torch.float32]
    model.unmerge_adapter()
    assert_stored(model, before)
    merged = model.merge_and_unload()
    assert relative(logits(merged), both) < ROUNDING[torch.float32]
    assert {spec.rank - ranks[name].rank for name, spec in specs(merged).items()} == {RANK + 2}


@pytest.mark.parametrize(("combination", "rank"), [("linear", RANK), ("cat", 2 * RANK), ("svd", RANK)])
def test_weighted_adapters_merge(sola: Compressed, combination: str, rank: int) -> None:
    model = adapted(sola)
    torch.manual_seed(1)
    model.add_adapter("second", lora(sola))
    model.add_weighted_adapter(["default", "second"], [0.7, 0.3], "mixed", combination_type=combination)
    model.set_adapter("mixed")
    unmerged, ranks = logits(model), specs(sola.saved)
    merged = model.merge_and_unload()
    assert relative(logits(merged), unmerged) < ROUNDING[torch.float32]
    assert {spec.rank - ranks[name].rank for name, spec in specs(merged).items()} == {rank}


def test_merge_again_after_training_on_a_merged_model(slab: Compressed) -> None:
    model = get_peft_model(adapted(slab).merge_and_unload(), lora(slab, init_lora_weights=True, r=2))
    losses = train(model)
    assert losses[-1] < losses[0]
    unmerged = logits(model)
    assert relative(logits(model.merge_and_unload(safe_merge=True)), unmerged) < ROUNDING[torch.float32]


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_a_bias_of_the_adapter_becomes_one_of_the_layer(compressed: Compressed, tmp_path: Path) -> None:
    model = adapted(compressed, lora_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.default.bias"):
                parameter.uniform_()
    before, unmerged = stored(model), logits(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert_stored(model, before)
    merged = model.merge_and_unload()
    assert relative(logits(merged), unmerged) < ROUNDING[torch.float32]
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged))


# --- training and travelling ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "down_proj", "c_attn", "c_proj"]], ids=["all-linear", "names"]
)
def test_only_the_adapter_trains(compressed: Compressed, targets: str | list[str]) -> None:
    config = LoraConfig(target_modules=targets, r=RANK, lora_dropout=0.1, use_rslora=True, task_type="CAUSAL_LM")
    model = get_peft_model(compressed.model(), config)
    assert torch.equal(logits(model.eval()), logits(compressed.saved))  # B starts at zero
    assert any(isinstance(module, CompressedLoraLinear) for module in model.modules())
    before = stored(model)
    losses = train(model, steps=5)
    assert losses[-1] < losses[0]
    assert_stored(model, before)
    assert all(".lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_adapters_and_merged_models_open_in_another_process(
    sola: Compressed, slab: Compressed, tmp_path: Path
) -> None:
    """This holds with the package, and by remote code without it.

    Transformers itself opens the folder of an adapter on its base model.
    """
    tasks, expected = [], []
    for compressed in (sola, slab):
        model = adapted(compressed)
        model.peft_config["default"].base_model_name_or_path = str(compressed.folder)
        model.save_pretrained(tmp_path / compressed.name)
        expected.append(logits(model).flatten())
        merged = model.merge_and_unload()
        merged.save_pretrained(tmp_path / f"{compressed.name}-merged")
        expected.append(logits(merged).flatten())
        folders = (tmp_path / compressed.name, tmp_path / f"{compressed.name}-merged")
        tasks += [{"folder": str(folder), "arguments": {"trust_remote_code": True}} for folder in folders]
    for task, adapter in zip(tasks[1::2], ("LoraConfig", "IA3Config"), strict=True):
        task["merge"] = adapter
    for installed in (True, False):
        home = tmp_path / str(installed)
        home.mkdir()
        answers = open_elsewhere(tasks, home, installed=installed, imported=installed)
        for found, wanted in zip(answers, expected, strict=True):
            assert "logits" in found, found
            assert torch.equal(torch.tensor(found["logits"]), wanted)
        assert "pip install hf_lowrank" in answers[1]["merge"] if not installed else not answers[1]["merge"]
        assert ("pip install hf_lowrank" if not installed else "cannot be merged exactly") in answers[3]["merge"]


def test_an_adapter_is_saved_and_loaded(compressed: Compressed, tmp_path: Path) -> None:
    model = get_peft_model(compressed.model(), LoraConfig(target_modules="all-linear", r=RANK))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(compressed.model(), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    assert relative(logits(again.merge_and_unload()), logits(model)) < ROUNDING[torch.float32]


def test_adapters_side_by_side(slab: Compressed) -> None:
    model = adapted(slab)
    first = logits(model)
    torch.manual_seed(1)
    model.add_adapter("second", lora(slab, r=2))
    model.set_adapter("second")
    second = logits(model)
    assert not torch.equal(first, second)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(slab.saved))
    mixed = model(torch.tensor(INPUT_IDS), adapter_names=["default", "second"])[0]
    torch.testing.assert_close(mixed, torch.stack([first[0], second[1]]), rtol=1e-5, atol=1e-6)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(slab.saved))
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert torch.equal(logits(model.unload()), logits(slab.saved))


@pytest.mark.parametrize("whole", ["lm_head", "norm", "v_proj"])
def test_modules_trained_whole(slab: Compressed, whole: str, tmp_path: Path) -> None:
    """`v_proj` is a compressed layer itself. Its float tensors train, its signs and masks stay."""
    config = LoraConfig(target_modules=["q_proj", "down_proj"], modules_to_save=[whole])
    model = get_peft_model(slab.model(), config)
    losses = train(model)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(slab.model(), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    merged = again.merge_and_unload()
    assert relative(logits(merged), logits(model)) < ROUNDING[torch.float32]
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged))


def test_gradient_checkpointing_and_autocast(sola: Compressed) -> None:
    model = get_peft_model(sola.model(), LoraConfig(target_modules="all-linear"))
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    losses = train(model, steps=5, autocast=True)
    assert losses[-1] < losses[0]


def test_the_adapters_of_transformers_itself(slab: Compressed, tmp_path: Path) -> None:
    model = slab.model()
    torch.manual_seed(0)
    model.add_adapter(lora(slab))
    model.save_pretrained(tmp_path / "adapter")  # the adapter and nothing else
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "adapter" / "config.json").exists()
    again = slab.model()
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(again), logits(model))
    assert isinstance(again.model.layers[0].self_attn.q_proj, CompressedLoraLinear)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"use_dora": True, "init_lora_weights": True},
            r"Dora: this variant of LoRA cannot be merged exactly .*; use plain LoRA",
        ),
        (
            {"init_lora_weights": "pissa"},
            r"init_lora_weights='pissa' needs the dense weight, .*; expected one of True, ",
        ),
        ({"init_lora_weights": "olora"}, r"init_lora_weights='olora' needs the dense weight"),
        ({"init_lora_weights": "orthogonal"}, r"init_lora_weights='orthogonal' needs the dense weight"),
    ],
)
def test_variants_that_need_the_dense_weight_are_refused(sola: Compressed, changes: dict, message: str) -> None:
    before = stored(sola.saved)
    model = sola.model()
    with pytest.raises(CompressionError, match=message):
        get_peft_model(model, lora(sola, **changes))
    assert_stored(model, before)


def test_the_same_variants_are_welcome_on_dense_layers(sola: Compressed) -> None:
    modules = sola.saved.named_modules()
    dense = next(
        name for name, module in modules if name.endswith("v_proj") and not isinstance(module, CompressedLinear)
    )
    get_peft_model(sola.model(), LoraConfig(target_modules=[dense], use_dora=True))


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(
            target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
        ),
        peft.VeraConfig(target_modules=["q_proj"], r=2),
        peft.AdaLoraConfig(target_modules=["q_proj", "down_proj"], total_step=10),
        peft.RoadConfig(target_modules=["q_proj"], group_size=4, init_weights=False),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_adapters_work_beside_a_layer_and_refuse_to_merge(slab: Compressed, config: peft.PeftConfig) -> None:
    torch.manual_seed(0)
    model = get_peft_model(slab.model(), config).eval()
    torch.manual_seed(0)
    dense = get_peft_model(slab.model().dequantize(), config).eval()
    assert relative(logits(model), logits(dense)) < ROUNDING[torch.float32]
    before = stored(model)
    with pytest.raises(CompressionError, match=rf"{config.peft_type.value} cannot be merged exactly .* train a LoRA"):
        model.merge_and_unload()
    with pytest.raises(CompressionError, match="cannot be merged exactly"):
        model.merge_adapter()
    assert_stored(model, before)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoHaConfig(target_modules=["q_proj"], r=2),
        peft.LoKrConfig(target_modules=["q_proj"], r=2),
        peft.HRAConfig(target_modules=["q_proj"], r=2),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_adapters_on_the_weight_are_refused(slab: Compressed, config: peft.PeftConfig) -> None:
    with pytest.raises(
        CompressionError, match=rf"{config.peft_type.value} adapters work on the dense weight .*; use LoRA"
    ):
        get_peft_model(slab.model(), config)


def test_a_model_under_an_adapter_is_not_saved_as_if_it_were_whole(slab: Compressed, tmp_path: Path) -> None:
    model = adapted(slab)
    model.merge_adapter()
    with pytest.raises(CompressionError, match=r"layers\.0.*: found CompressedLoraLinear, .*merge_and_unload"):
        model.get_base_model().save_pretrained(tmp_path / "model")


def test_an_offloaded_model_refuses_to_merge(sola: Compressed, tmp_path: Path) -> None:
    places = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers": "disk",
    }
    model = AutoModelForCausalLM.from_pretrained(sola.folder, device_map=places, offload_folder=tmp_path / "offload")
    model = get_peft_model(model, lora(sola))
    with pytest.raises(CompressionError, match="offloaded"):
        model.merge_and_unload()


def test_an_untested_version_is_refused(slab: Compressed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft, "__version__", "0.17.1")
    with pytest.raises(CompressionError, match=r"peft 0\.17\.1: .* tested with 0\.18 to 0\.21"):
        adapted(slab)


# --- without the package, and without compressed layers -------------------------------------------------------------


def test_dense_models_do_not_notice() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear", use_dora=True))
    assert {type(module) for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)} == {
        peft.tuners.lora.Linear
    }
    assert model.peft_config["default"]._custom_modules is None


def test_the_recipe_of_an_adapter_is_stock(slab: Compressed, tmp_path: Path) -> None:
    adapted(slab).save_pretrained(tmp_path / "compressed")
    dense = get_peft_model(slab.model().dequantize(), lora(slab))
    dense.save_pretrained(tmp_path / "dense")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "compressed" / name).stat().st_size == (tmp_path / "dense" / name).stat().st_size
    shutil.rmtree(tmp_path / "dense")
    loaded = PeftModel.from_pretrained(slab.model().dequantize(), tmp_path / "compressed")
    assert relative(logits(loaded), logits(adapted(slab))) < ROUNDING[torch.float32]
