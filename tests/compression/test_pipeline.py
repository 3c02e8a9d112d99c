"""compress(): the bytes asked for, the same every time, and a report that says what happened."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_lowrank import (
    CompressionConfig,
    CompressionError,
    NumericalError,
    SparseLowRankBinaryLinear,
    SparseLowRankLinear,
    compress,
)
from hf_lowrank.budget import Budget
from hf_lowrank.methods import Decomposition, Method, Statistics, method_class
from hf_lowrank.methods.spectral import factorize
from hf_lowrank.models.architectures import find_blocks, find_layers
from hf_lowrank.models.linears import permute_inputs, permute_outputs

from ..support import tiny_models

RECIPES: dict[str, dict[str, Any]] = {
    "svd": {},
    "svd-llm": {},
    "sola": {},
    "soco": {"steps": 6, "finish_steps": 2, "batch_tokens": 64},
    "slab": {"iterations": 2},
    "lowrank": {},
    "slab-gram": {},
    "auto": {},
}
MODELS = {"llama": tiny_models.llama, "gpt2": tiny_models.gpt2, "opt": tiny_models.opt}
IDS = tiny_models.token_ids(4, 24).tolist()
BITS = {"F64": 64, "F32": 32, "BF16": 16, "F16": 16, "U8": 8}


def config(method: str, ratio: float = 0.4, **changes: Any) -> CompressionConfig:
    fields = {"options": RECIPES.get(method, {}), "samples": 4, "sequence_length": 24, **changes}
    return CompressionConfig(method=method, ratio=ratio, **fields)


def block_bits(folder: Path, linears: list[str]) -> int:
    """Bits of everything that a checkpoint stores for the block linears."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (no mapping)
                if name.rpartition(".")[0] in linears:
                    entry = opened.get_slice(name)
                    total += BITS[entry.get_dtype()] * torch.Size(entry.get_shape()).numel()
    return total


def removed(dense: Path, compressed: Path, model: PreTrainedModel) -> float:
    """The ratio, from the safetensors files alone."""
    linears = [layer.name for layer in find_layers(find_blocks(model))]
    return 1 - block_bits(compressed, linears) / block_bits(dense, linears)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of a checkpoint."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_the_files_hold_what_was_asked_for_and_never_more(tmp_path: Path, name: str, method: str) -> None:
    for ratio, dtype in ((0.3, torch.float32), (0.45, torch.bfloat16)):
        dense, compressed = tmp_path / f"dense-{ratio}", tmp_path / f"compressed-{ratio}"
        model = MODELS[name](dtype=dtype)
        model.save_pretrained(dense)
        linears = MODELS[name]()
        compress(model, config(method, ratio), calibration=IDS).save_pretrained(compressed)
        found = removed(dense, compressed, linears)
        assert ratio <= found
        assert (
            found <= ratio + 0.005 or method == "auto"
        )  # which stores less where eight bits per weight are all it can use
        report = json.loads((compressed / "compression_report.json").read_text())
        assert report["ratio_stored"] == pytest.approx(removed(dense, compressed, linears), abs=1e-12)


OPTIONS = [
    ("sola", 0.3, {"allocation": "components"}),
    ("sola", 0.3, {"neuron_score": "output", "prime_share": 0.3}),
    ("sola", 0.3, {"skip_blocks": 0}),
    ("slab", 0.5, {"pattern": "2:4"}),
    ("slab", 0.5, {"pattern": "4:8"}),
    ("slab", 0.4, {"binary_rank": 2, "weighted": True}),
]


@pytest.mark.parametrize(("method", "ratio", "options"), OPTIONS)
def test_options_do_not_move_the_budget(method: str, ratio: float, options: dict[str, Any]) -> None:
    model = compress(tiny_models.llama(dtype=torch.bfloat16), config(method, ratio, options=options), calibration=IDS)
    assert ratio <= model.save_pretrained.report["ratio_stored"] <= ratio + 0.005


def test_paper_accounting_leaves_the_mask_bits_out() -> None:
    model = compress(tiny_models.llama(), config("slab", 0.4, accounting="paper"), calibration=IDS)
    report = model.save_pretrained.report
    assert 0.4 <= report["ratio_paper"] <= 0.405
    masks = sum(module.weight_mask.numel() for module in model.modules() if isinstance(module, SparseLowRankLinear))
    dense = sum(entry["dense_bits"] for entry in report["layers"])
    assert report["ratio_paper"] - report["ratio_stored"] == pytest.approx(8 * masks / dense)


@pytest.mark.parametrize(
    "method", [method for method in RECIPES if method not in ("slab-gram", "auto")]
)  # those take minutes on it
def test_the_bundled_model_compresses_and_reopens(tmp_path: Path, method: str) -> None:
    dense = AutoModelForCausalLM.from_pretrained(tiny_models.BUNDLED)
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.BUNDLED)
    ratio = 0.5 if method == "slab" else 0.3
    recipe = config(method, ratio, sequence_length=64)
    text = [
        "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. "
    ] * 20
    model = compress(copy.deepcopy(dense), recipe, tokenizer, text)
    model.save_pretrained(tmp_path)
    assert ratio <= removed(tiny_models.BUNDLED, tmp_path, dense) <= ratio + 0.005
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(20, 52)[None]
    with torch.no_grad():
        assert torch.equal(reopened(ids).logits, model(ids).logits)


@pytest.mark.parametrize("method", RECIPES)
def test_same_seed_same_bytes(tmp_path: Path, method: str) -> None:
    for run in ("first", "second"):
        torch.manual_seed(17 if run == "first" else 18)  # the caller's random state has no say
        compress(tiny_models.llama(), config(method), tiny_models.tokenizer()).save_pretrained(
            tmp_path / run / "model"
        )
    assert digests(tmp_path / "first" / "model") == digests(tmp_path / "second" / "model")
    compress(tiny_models.llama(), config(method, seed=1), tiny_models.tokenizer()).save_pretrained(
        tmp_path / "third" / "model"
    )
    differs = {
        name
        for name, digest in digests(tmp_path / "third" / "model").items()
        if digest != digests(tmp_path / "first" / "model")[name]
    }
    assert "config.json" in differs
    assert ("model.safetensors" in differs) == (
        method != "svd"
    )  # the only one here that never looks at the calibration


@pytest.mark.parametrize("method", RECIPES)
def test_every_linear_is_compressed_or_listed_with_a_reason(method: str) -> None:
    model = compress(tiny_models.llama(), config(method), calibration=IDS)
    report = model.save_pretrained.report
    compressed, dense = {layer["name"] for layer in report["layers"]}, set(report["dense"])
    assert compressed | dense == {layer.name for layer in find_layers(find_blocks(tiny_models.llama()))}
    assert not compressed & dense
    assert all(report["dense"].values())
    for name in compressed:
        assert isinstance(model.get_submodule(name), SparseLowRankLinear)
    for name in dense:
        assert type(model.get_submodule(name)) is torch.nn.Linear
    assert set(model.config.quantization_config.layers) == compressed


@pytest.mark.parametrize("method", RECIPES)
def test_the_report_describes_what_is_stored(method: str) -> None:
    model = compress(tiny_models.llama(), config(method), calibration=IDS)
    report = model.save_pretrained.report
    assert (report["method"], report["ratio_asked"], report["accounting"], report["warnings"]) == (
        method,
        0.4,
        "bits",
        [],
    )
    for entry in report["layers"]:
        layer = model.get_submodule(entry["name"])
        fields = ("kind", "sparse", "kept", "rank", "binary_rank", "pivoted", "weight_bits", "lowrank_bits")
        assert {key: entry[key] for key in fields} == {key: getattr(layer.spec, key) for key in fields}
        tensors = [*layer.parameters(), *layer.buffers()]
        assert entry["stored_bits"] == sum(tensor.numel() * tensor.itemsize * 8 for tensor in tensors)
        assert entry["bits_per_weight"] * layer.in_features * layer.out_features == pytest.approx(entry["stored_bits"])
        assert entry["dense_bits"] == 32 * layer.in_features * layer.out_features
        assert entry["tokens"] == 4 * 24
        assert 0 < entry["relative_error"] < 1
    assert (report["curve"] is not None) == (method == "soco")
    if any(entry["sparse"] == "bitmask" for entry in report["layers"]):
        assert report["ratio_paper"] > report["ratio_stored"]
    else:
        assert report["ratio_paper"] == pytest.approx(report["ratio_stored"])
    if method == "slab":
        assert all(
            isinstance(model.get_submodule(entry["name"]), SparseLowRankBinaryLinear) for entry in report["layers"]
        )


def test_the_config_records_the_recipe_and_where_it_came_from() -> None:
    model = compress(tiny_models.llama(), config("slab", seed=5), calibration=IDS)
    recorded = model.config.quantization_config
    assert (recorded.method, recorded.ratio, recorded.seed, recorded.samples, recorded.sequence_length) == (
        "slab",
        0.4,
        5,
        4,
        24,
    )
    assert recorded.options["iterations"] == 2
    assert recorded.options["binary_rank"] == 1  # defaults too: a later version may have others
    assert recorded.provenance["calibration_tokens"] == 96
    assert len(recorded.provenance["calibration_sha256"]) == 64
    assert set(recorded.provenance["versions"]) == {"hf_lowrank", "torch", "transformers"}


@pytest.mark.parametrize(
    "pattern", ["model.layers.1.mlp.down_proj", "down_proj", "self_attn", "model.layers.2", "*.layers.[03].*"]
)
def test_modules_to_not_convert_stay_as_they_are(pattern: str) -> None:
    dense = tiny_models.llama()
    model = compress(tiny_models.llama(), config("svd", 0.3, modules_to_not_convert=[pattern]), calibration=IDS)
    listed = {
        name for name, reason in model.save_pretrained.report["dense"].items() if "modules_to_not_convert" in reason
    }
    counts = {
        "model.layers.1.mlp.down_proj": 1,
        "down_proj": 4,
        "self_attn": 16,
        "model.layers.2": 7,
        "*.layers.[03].*": 14,
    }
    assert len(listed) == counts[pattern]
    for name in listed:
        assert torch.equal(model.get_submodule(name).weight, dense.get_submodule(name).weight)
    assert 0.3 <= model.save_pretrained.report["ratio_stored"] <= 0.305  # the others pay for them


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(CompressionError, match="modules_to_not_convert: 'dwon_proj' matches no linear layer"):
        compress(tiny_models.llama(), config("svd", modules_to_not_convert=["dwon_proj"]), calibration=IDS)


def test_tied_layers_stay_dense() -> None:
    model = tiny_models.llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    report = compress(model, config("svd"), calibration=IDS).save_pretrained.report
    assert report["dense"] == {f"model.layers.{i}.mlp.up_proj": "its weight is tied to another module" for i in (0, 1)}


def test_a_compressed_model_is_not_compressed_again() -> None:
    model = compress(tiny_models.llama(), config("svd"), calibration=IDS)
    with pytest.raises(CompressionError, match="compressed already"):
        compress(model, config("svd"), calibration=IDS)


def test_what_is_no_model_or_no_recipe_is_refused() -> None:
    model = tiny_models.llama()
    with pytest.raises(CompressionError, match="config: found dict, expected a CompressionConfig"):
        compress(model, {"method": "svd"}, calibration=IDS)  # type: ignore[arg-type]
    with pytest.raises(CompressionError, match="model: found Sequential, expected a plain model of transformers"):
        compress(torch.nn.Sequential(model), config("svd"), calibration=IDS)  # type: ignore[arg-type]
    with pytest.raises(CompressionError, match="tokenizer: found list, expected a tokenizer; .* calibration="):
        compress(model, config("svd"), ["a text"])
    with pytest.raises(CompressionError, match="has no values"):
        compress(model.to("meta"), config("svd"), calibration=IDS)


@pytest.mark.parametrize("method", RECIPES)
def test_a_ratio_out_of_reach_is_an_error_that_leaves_the_model_as_it_was(method: str) -> None:
    model = tiny_models.llama()
    with pytest.raises(
        CompressionError,
        match=rf"ratio 0.99 is out of reach of {method} .*can remove [\d.]+ to [\d.]+ of the stored bits",
    ):
        compress(model, config(method, 0.99), calibration=IDS)
    assert all(
        torch.equal(value, model.state_dict()[name]) for name, value in tiny_models.llama().state_dict().items()
    )


@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize("calibration", ["ids", "self"])
@pytest.mark.parametrize(
    "damaged", ["model.layers.1.self_attn.k_proj", "model.layers.2.mlp.down_proj", "model.layers.0.input_layernorm"]
)
def test_a_weight_that_is_not_finite_is_named(method: str, calibration: str, damaged: str) -> None:
    model = tiny_models.llama()
    with torch.no_grad():
        model.get_submodule(damaged).weight.view(-1)[7] = float("nan")
    with pytest.raises(NumericalError, match=damaged.replace(".", r"\.")):
        compress(model, config(method), calibration=IDS if calibration == "ids" else "self")


def test_activations_that_overflow_are_an_error_in_self_calibration_too() -> None:
    model = tiny_models.llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
        model.lm_head.weight.mul_(1e5)
    with pytest.raises(NumericalError, match="not finite"):
        compress(model, config("svd"), calibration="self")


@pytest.mark.parametrize("method", RECIPES)
def test_modes_and_gradients_of_the_caller_survive(method: str) -> None:
    model = tiny_models.llama().train()
    model.model.embed_tokens.weight.requires_grad_(False)
    compress(model, config(method), calibration=IDS)
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(
        parameter.requires_grad == (name != "model.embed_tokens.weight")
        for name, parameter in model.named_parameters()
    )
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("method", ["svd", "svd-llm", "slab"])
@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_biases_are_kept_bit_for_bit(name: str, method: str) -> None:
    dense = MODELS[name]()
    model = compress(MODELS[name](), config(method), calibration=IDS)
    for entry in model.save_pretrained.report["layers"]:
        assert torch.equal(model.get_submodule(entry["name"]).bias, dense.get_submodule(entry["name"]).bias)


def first_block_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """The inputs (T, n), float64, of the linears of the first block for the calibration ids."""
    seen: dict[str, Tensor] = {}
    for layer in find_layers(find_blocks(model)):
        if layer.block == 0:
            model.get_submodule(layer.name).register_forward_pre_hook(
                lambda module, inputs, name=layer.name: seen.update({name: inputs[0].flatten(0, -2).double()})
            )
    with torch.no_grad():
        model(torch.tensor(IDS))
    return seen


@pytest.mark.parametrize("method", ["svd", "svd-llm"])
@pytest.mark.parametrize("name", MODELS)
def test_the_reported_error_is_the_error_on_the_calibration_tokens(name: str, method: str) -> None:
    """Inputs of the first block, which no compression changes; for whitened truncation it is the tail energy of the spectrum."""
    dense = MODELS[name](dtype=torch.float64)
    inputs = first_block_inputs(dense)
    model = compress(MODELS[name](dtype=torch.float64), config(method), calibration=IDS)
    report = {entry["name"]: entry for entry in model.save_pretrained.report["layers"]}
    for layer, x in inputs.items():
        module, made = dense.get_submodule(layer), model.get_submodule(layer)
        weight = (module.weight.T if name == "gpt2" else module.weight).detach().double()
        if method == "svd-llm":
            found = float(((weight - made.to_dense()) @ x.T).norm() / (weight @ x.T).norm())
            assert report[layer]["metric"] == "gram"
            energies = factorize(weight, x.T @ x).sigma.square()
            assert found**2 == pytest.approx(float(energies[made.spec.rank :].sum() / energies.sum()), rel=1e-6)
        else:
            assert report[layer]["metric"] == "column_norms"
            found = float(((weight - made.to_dense()) * x.norm(dim=0)).norm() / (weight * x.norm(dim=0)).norm())
        assert report[layer]["relative_error"] == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_permuted_neurons_leave_the_function_unchanged(name: str) -> None:
    model = MODELS[name](dtype=torch.float64)
    ids = torch.tensor(IDS)
    with torch.no_grad():
        before = model(ids).logits
        for block in find_blocks(model).values():
            ffn = {
                "llama": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
                "gpt2": ("mlp.c_fc", "mlp.c_proj"),
                "opt": ("fc1", "fc2"),
            }[name]
            modules = [block.get_submodule(part) for part in ffn]
            neurons = modules[-1].in_features if name != "gpt2" else modules[-1].weight.shape[0]
            order = torch.randperm(neurons, generator=torch.Generator().manual_seed(3))
            for module in modules[:-1]:
                permute_outputs(module, order)
            permute_inputs(modules[-1], order)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-12, atol=1e-12)


def test_prime_neurons_of_sola_are_kept_bit_for_bit() -> None:
    dense, model = tiny_models.llama(), compress(tiny_models.llama(), config("sola", 0.3), calibration=IDS)
    checked = 0
    for block in range(4):
        gate, up, down = (
            model.get_submodule(f"model.layers.{block}.mlp.{name}_proj") for name in ("gate", "up", "down")
        )
        if not isinstance(down, SparseLowRankLinear):
            continue
        columns = dense.get_submodule(f"model.layers.{block}.mlp.down_proj").weight
        neurons = [int((columns == kept[:, None]).all(dim=0).nonzero()) for kept in down.weight.T]
        assert neurons == sorted(set(neurons))
        assert len(neurons) == int(0.15 * 80)
        for layer, name in ((gate, "gate"), (up, "up")):
            if isinstance(layer, SparseLowRankLinear):
                assert torch.equal(
                    layer.weight, dense.get_submodule(f"model.layers.{block}.mlp.{name}_proj").weight[neurons]
                )
        checked += 1
    assert checked


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_neurons_prime_reproduce_the_dense_network(dtype: torch.dtype) -> None:
    make = lambda: tiny_models.llama(dtype=dtype, num_key_value_heads=4)  # noqa: E731
    dense = make()
    recipe = config("sola", 0.05, options={"prime_share": 1.0, "skip_blocks": 0})
    model = compress(make(), recipe, calibration=IDS)
    x = torch.randn(5, 7, 32, dtype=dtype, generator=torch.Generator().manual_seed(0))
    tolerance = {"rtol": 0, "atol": 1e-6 if dtype == torch.float32 else 1e-14}
    with torch.no_grad():
        for block in range(4):
            torch.testing.assert_close(model.model.layers[block].mlp(x), dense.model.layers[block].mlp(x), **tolerance)


@pytest.mark.parametrize("method", ["slab", "svd-llm"])
def test_sequential_methods_see_the_compressed_blocks_before_them(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The query projection of a block reads what the blocks before it give: compressed ones in `slab`, dense ones in `svd-llm`."""
    seen: list[Statistics] = []
    usual = method_class(method).decompose

    def recording(self: Method, weight: Tensor, statistics: Statistics, budget: Budget) -> Decomposition:
        seen.append(statistics)
        return usual(self, weight, statistics, budget)

    monkeypatch.setattr(method_class(method), "decompose", recording)
    monkeypatch.setattr(
        "hf_lowrank.compression.solving.parallel_slots", lambda working_memory: 1
    )  # layer after layer, in order
    model = compress(tiny_models.llama(), config(method), calibration=IDS)
    queries = seen[::7]
    source = model if method == "slab" else tiny_models.llama()
    norms: list[Tensor] = []
    for block in source.model.layers:
        block.self_attn.q_proj.register_forward_pre_hook(
            lambda module, inputs: norms.append(inputs[0].detach().flatten(0, -2).double().norm(dim=0))
        )
    with torch.no_grad():
        source(torch.tensor(IDS))
    for statistics, norm in zip(queries, norms, strict=True):
        torch.testing.assert_close(statistics.column_norms, norm, rtol=1e-5, atol=1e-5)


def test_loading_with_a_config_compresses_as_compress_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_models.llama().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config("svd-llm"))
    assert "calibrating on text sampled from the model itself" in caplog.text
    made = compress(tiny_models.llama(), config("svd-llm"), calibration="self")
    assert loaded.state_dict().keys() == made.state_dict().keys()
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in loaded.state_dict().items())
