"""The ratio of a run: what a message offers is accepted, options that say the size say the ratio, and no ratio ends in
an error of the interpreter."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel
from typer.testing import CliRunner

from hf_lowrank import CompressionConfig, CompressionError, compress
from hf_lowrank.cli import app
from hf_lowrank.compression.planning import Plan, make_plan
from hf_lowrank.evaluation.candidates import candidates
from hf_lowrank.methods import make_method, registered_methods
from hf_lowrank.models.architectures import find_blocks

from ..support import tiny_models
from .recipes import RECIPES

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "rtn": [{}, {"bits": 3}, {"bits": 8, "group_size": 5}],
    "gptq": [{}, {"bits": 4}],
    "wanda": [{}, {"pattern": "1:4"}],
    "slab": [{}, {"binary_rank": 2}, {"pattern": "2:4"}],
    "sola": [{}, {"prime_share": 0.0}, {"prime_share": 0.7}, {"skip_blocks": 1}, {"allocation": "components"}],
    "oats": [{}, {"rank_share": 0.0}, {"pattern": "2:4"}],
    "soco": [{}, {"deviation": False}],
    "auto": [{}, {"quantised": False}],
}
"""Options that change what a method can reach."""
VARIANTS = [(method, options) for method in registered_methods() for options in OPTIONS.get(method, [{}])]
QUICK = {**RECIPES, "soco": {"steps": 2, "finish_steps": 0, "batch_tokens": 64}, "oats": {"iterations": 2}}
HAIR = 1e-4
"""The step in which messages name ratios."""

every_variant = pytest.mark.parametrize(
    ("method", "options"), VARIANTS, ids=lambda value: value if isinstance(value, str) else str(value)
)


def plan(model: PreTrainedModel, config: CompressionConfig) -> Plan:
    """Return the plan of a run, which is made before any work."""
    return make_plan(model, config, make_method(config.method, config.options), find_blocks(model), {})


def refusal(model: PreTrainedModel, config: CompressionConfig) -> str | None:
    """Return why a recipe is refused, in one line, or None if it is not."""
    try:
        plan(model, config)
    except CompressionError as error:
        assert "\n" not in str(error)
        return str(error)
    return None


def offered(message: str | None) -> list[float]:
    """Return the ratios that a message names as within reach."""
    assert message is not None
    match = re.search(r"can remove ([\d.]+) to ([\d.]+) of the stored bits", message)
    return [float(bound) for bound in match.groups()] if match else []


MODELS: list[tuple[dict[str, Any], list[str], str]] = [
    ({}, [], "bits"),
    ({"dtype": torch.bfloat16, "num_hidden_layers": 1, "attention_bias": True}, ["q_proj"], "paper"),
    ({"hidden_size": 24, "intermediate_size": 7, "num_key_value_heads": 4}, ["*.layers.0.*", "v_proj"], "bits"),
]
"""Changes to the model, the layers that stay dense, and the accounting."""


@pytest.fixture(scope="module")
def models() -> list[PreTrainedModel]:
    return [tiny_models.llama(**changes) for changes, _, _ in MODELS]


@every_variant
def test_the_ratios_that_a_message_offers_are_accepted(
    method: str, options: dict[str, Any], models: list[PreTrainedModel]
) -> None:
    for model, (_, left_dense, accounting) in zip(models, MODELS, strict=True):

        def recipe(ratio: float, left: list[str] = left_dense, accounting: str = accounting) -> CompressionConfig:
            return CompressionConfig(
                method, ratio, options=options, modules_to_not_convert=left, accounting=accounting
            )

        refused = [message for ratio in (0.99999, 0.0001) if (message := refusal(model, recipe(ratio)))]
        for message in refused:
            if "nothing to compress" in message:
                continue
            least, most = offered(message)
            assert refusal(model, recipe(least)) is None and refusal(model, recipe(most)) is None
            # SoLA compresses other layers at another ratio, with which it may be within reach.
            if method != "sola":
                assert most + HAIR >= 1 or "out of reach" in (refusal(model, recipe(most + HAIR)) or "")
                assert least == HAIR or "out of reach" in (refusal(model, recipe(least - HAIR)) or "")


@every_variant
def test_a_ratio_that_nobody_gave_is_never_held_against_the_options(method: str, options: dict[str, Any]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_models.llama(dtype=dtype)
        recipe = CompressionConfig(method, options=options)
        reachable = refusal(model, CompressionConfig(method, 0.5, options=options)) is None
        if make_method(method, options).size_is_set:
            made = plan(model, recipe)
            assert refusal(model, made.config) is None
            with pytest.raises(CompressionError, match="leave the ratio out to get what the options give"):
                plan(model, CompressionConfig(method, 0.2, options=options))
        elif reachable:
            assert plan(model, recipe).config.ratio == 0.5
        elif refusal(model, recipe) is None:  # the options allow no layer as large as half
            assert plan(model, recipe).config.ratio > 0.5
        else:
            assert max(offered(refusal(model, recipe))) < 0.5


IDS = [[5 + (7 * row + step) % 60 for step in range(24)] for row in range(2)]


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bits_alone_say_the_ratio(method: str, bits: int, tmp_path: Path) -> None:
    model = tiny_models.llama(num_hidden_layers=1, dtype=torch.bfloat16)
    recipe = CompressionConfig(method=method, options={"bits": bits})
    again = CompressionConfig.from_dict(json.loads(json.dumps(recipe.to_dict())))  # as a file of recipes has it
    for given_recipe in (recipe, again):
        compressed = compress(
            tiny_models.llama(num_hidden_layers=1, dtype=torch.bfloat16), given_recipe, calibration=IDS, progress=False
        )
        config = compressed.config.quantization_config
        assert {spec.weight_bits for spec in config.layers.values()} == {bits}
        assert config.ratio == pytest.approx(compressed.compression_report["ratio_stored"], abs=1e-6)
        assert refusal(model, CompressionConfig(method, config.ratio, options=config.options)) is None


def test_bits_alone_say_the_ratio_on_the_command_line(tmp_path: Path) -> None:
    dense = tiny_models.saved(tiny_models.llama(num_hidden_layers=1), tmp_path / "dense")
    command = ["compress", str(dense), "-o", str(tmp_path / "new"), "--method", "rtn", "--set", "bits=4"]
    command += ["--samples", "2", "--sequence-length", "16"]
    shown = CliRunner().invoke(app, [*command, "--dry-run"])
    assert shown.exit_code == 0 and "memory" in shown.output
    refused = CliRunner().invoke(app, [*command, "--dry-run", "--ratio", "0.5"])  # the default, but given
    assert refused.exit_code == 1 and "ratio 0.5 is out of reach" in refused.output
    assert CliRunner().invoke(app, command).exit_code == 0
    recorded = AutoConfig.from_pretrained(tmp_path / "new").quantization_config
    assert {layer["weight_bits"] for layer in recorded["layers"].values()} == {4}


def test_a_comparison_without_ratios_leaves_them_to_the_options() -> None:
    (bits, default) = candidates(["gptq[bits=4]", "slab"], [])
    assert (bits.ratio, default.ratio) == (None, None)
    assert bits.file_name != candidates(["gptq[bits=4]"], [0.84])[0].file_name


SHAPES: dict[str, dict[str, int]] = {
    "single": {"n_embd": 1, "n_inner": 1},
    "primes": {"n_embd": 13, "n_inner": 17},
    "wide": {"n_embd": 5, "n_inner": 97},
    "narrow": {"n_embd": 31, "n_inner": 2},
}
"""Sides of layers: 1 × 1 and 1 × 3, primes, and feed-forward networks of one neuron or of many."""
WEIGHTS = {"random": None, "zeros": 0.0, "constant": 0.3}
TOKENS = {"some": IDS, "one": [[5]], "fewer than channels": [[5, 6, 7]]}
CASES = [
    ("random", "some"),
    ("zeros", "some"),
    ("constant", "one"),
    ("random", "one"),
    ("random", "fewer than channels"),
]


def tiny(shape: str, weights: str) -> PreTrainedModel:
    """Build a GPT-2 of two blocks whose layers have a shape."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fields = {"vocab_size": 70, "n_layer": 2, "n_head": 1, "n_positions": 32, "initializer_range": 0.2}
        model = GPT2LMHeadModel(GPT2Config(**fields, bos_token_id=1, eos_token_id=2, **SHAPES[shape])).eval()
    value = WEIGHTS[weights]
    for block in model.transformer.h:
        for module in block.modules():
            if value is not None and type(module).__name__ == "Conv1D":
                nn.init.constant_(module.weight, value)
    return model


def largest_step(model: PreTrainedModel, recipe: CompressionConfig) -> float:
    """Return the ratio that the largest step of a layer stands for, beside the tolerance of the plan.

    Every layer of a method that fits two parts to its own share may leave a rank of it unused. `auto` may find nothing
    between 8 bits and the dense layer that loses less than 8 bits.
    """
    made = plan(model, recipe)
    steps, ranks = [], []
    for layer in made.compressed:
        smallest = made.method.min_spec(layer)
        larger = made.method.next_spec(layer, smallest)
        steps.append(made.budget.stored_bits(layer, larger) - made.budget.stored_bits(layer, smallest))
        ranks.append((layer.out_features + layer.in_features) * 32)
    unused = sum(ranks) if recipe.method == "oats" else max(steps)
    if recipe.method == "auto":
        unused = max(made.budget.total_dense_bits([layer]) for layer in made.compressed)
    return unused / made.budget.total_dense_bits(made.compressed + made.dense) + 0.005


def ratios_and_shapes(method: str, options: dict[str, Any]) -> list[tuple[float, str]]:
    """Return ratios with the shapes to try them on: fixed ones on shapes in turn, and the bounds of one shape."""
    shapes = [*SHAPES]
    turn = registered_methods().index(method)
    ratios = (1e-6, 0.01, 0.4, 0.7, 0.9, 1 - 1e-6)
    pairs = [(ratio, shapes[(turn + number) % len(shapes)]) for number, ratio in enumerate(ratios)]
    shape = shapes[1 + turn % 3]  # a layer of one weight cannot become smaller
    message = refusal(tiny(shape, "random"), CompressionConfig(method, 1 - 1e-9, options=options))
    return [*pairs, *((bound, shape) for bound in offered(message))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", registered_methods())
def test_every_ratio_gives_a_model_of_that_size_or_one_line(method: str, tmp_path: Path) -> None:
    options = QUICK.get(method, {})
    outcomes = set()
    for number, (ratio, shape) in enumerate(ratios_and_shapes(method, options)):
        weights, tokens = CASES[number % len(CASES)]
        model = tiny(shape, weights)
        recipe = CompressionConfig(method, ratio, options=options)
        try:
            compress(model, recipe, calibration=TOKENS[tokens], progress=False)
        except CompressionError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
            continue
        outcomes.add("compressed")
        stored = model.compression_report["ratio_stored"]
        assert stored >= ratio - 1e-9
        if weights == "random":
            assert stored <= ratio + largest_step(tiny(shape, weights), recipe)
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        found = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([[1, 2, 3]])).logits
        assert found.isfinite().all() and torch.equal(found, model(torch.tensor([[1, 2, 3]])).logits)
    assert "refused" in outcomes


@pytest.mark.parametrize(
    "ratio", [0, 1, -0.1, 1.5, float("nan"), float("inf"), float("-inf"), "0.5", True, None, [0.5]]
)
def test_what_is_no_ratio_is_one_line(ratio: Any) -> None:
    with pytest.raises(CompressionError, match="ratio: found .*, expected a number between 0 and 1") as raised:
        CompressionConfig(ratio=ratio)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("method", "options"), [("fwsvd", {}), ("soco", {**QUICK["soco"], "loss": "cross_entropy"})])
def test_sequences_of_one_token_are_refused_where_the_next_one_is_learned_from(
    method: str, options: dict[str, Any]
) -> None:
    recipe = CompressionConfig(method, 0.4, options={**options, **({"batch_tokens": 1} if options else {})})
    with pytest.raises(CompressionError, match="no sequence has two tokens"):
        compress(tiny_models.llama(num_hidden_layers=1), recipe, calibration=[[5], [6]], progress=False)
    rows = [{"input_ids": torch.tensor([ids])} for ids in ([5], [6, 7, 8], [9])]
    compress(tiny_models.llama(num_hidden_layers=1), recipe, calibration=rows, progress=False)
