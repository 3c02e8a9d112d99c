"""Perplexity and fidelity equal a plain computation over the same tokens, and reproduce the published references."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_lowrank import CompressionError, NumericalError
from hf_lowrank.calibration.texts import token_stream, windows
from hf_lowrank.evaluation import perplexity
from hf_lowrank.evaluation.perplexity import evaluate, evaluate_windows

from ..support import tiny_models
from ..support.assets import asset_model, asset_text

MODEL, OTHER = tiny_models.llama(), tiny_models.llama(seed=1)


def plain(
    model: PreTrainedModel, stream: Tensor, window: int, stride: int, max_windows: int | None = None
) -> tuple[float, int]:
    """Return the mean nll and the number of scored tokens, computed token by token.

    Each token is scored once, in the first window that predicts it.
    """
    total = 0.0
    scored = set()
    starts = range(0, len(stream) - window + 1, stride)
    for start in starts[:max_windows]:
        with torch.no_grad():
            logs = model(stream[None, start : start + window]).logits[0].double().log_softmax(dim=-1)
        for position in range(1, window):
            if start + position not in scored and (start == 0 or position >= window - stride):
                scored.add(start + position)
                total -= float(logs[position - 1, stream[start + position]])
    return total / len(scored), len(scored)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(24, 150),
    window=st.integers(2, 24),
    share=st.floats(0.05, 1),
    batch=st.sampled_from([24, 60, 4096]),
)
def test_perplexity_is_a_plain_mean_over_tokens(tokens: int, window: int, share: float, batch: int) -> None:
    stream = tiny_models.token_ids(1, tokens, seed=tokens)[0]
    stride = max(1, int(share * window))
    usual, perplexity.TOKENS_PER_BATCH = perplexity.TOKENS_PER_BATCH, batch
    try:
        evaluation = evaluate_windows(MODEL, windows(stream, window, stride), stride)
    finally:
        perplexity.TOKENS_PER_BATCH = usual
    nll, scored = plain(MODEL, stream, window, stride)
    assert evaluation.scored_tokens == scored
    assert evaluation.nll == pytest.approx(nll, rel=1e-5)
    assert evaluation.perplexity == pytest.approx(math.exp(nll), rel=1e-4)
    assert (evaluation.window, evaluation.stride) == (window, stride)


def test_a_shorter_stride_scores_every_token_that_a_window_can_predict() -> None:
    stream = tiny_models.token_ids(1, 60)[0]
    scored = {
        stride: evaluate_windows(MODEL, windows(stream, 12, stride), stride).scored_tokens for stride in (12, 6, 1)
    }
    assert scored == {12: 5 * 11, 6: 11 + 8 * 6, 1: 59}


def write(folder: Path, documents: int = 4) -> str:
    file = folder / "text.txt"
    file.write_text("\n<|endoftext|>\n".join(tiny_models.text(documents)), encoding="utf-8")
    return str(file)


def test_a_text_file_is_scored_as_its_token_stream(tmp_path: Path) -> None:
    tokenizer = tiny_models.tokenizer()
    stream = token_stream(tokenizer, tiny_models.text(4))
    evaluation = evaluate(MODEL, tokenizer, write(tmp_path), window=16, stride=8, max_windows=5)
    assert (evaluation.windows, evaluation.text) == (5, write(tmp_path))
    assert evaluation.nll == pytest.approx(plain(MODEL, stream, 16, 8, max_windows=5)[0], rel=1e-5)
    whole = evaluate(MODEL, tokenizer, write(tmp_path))
    assert (whole.window, whole.stride, whole.windows) == (
        tiny_models.CONTEXT,
        tiny_models.CONTEXT,
        len(stream) // tiny_models.CONTEXT,
    )
    assert whole.kl is whole.nats_lost is whole.reference_nll is whole.top1_agreement is None


@pytest.mark.parametrize(
    ("window", "stride"), [(1, None), (-3, None), (tiny_models.CONTEXT + 1, None), (16, 17), (16, -1)]
)
def test_impossible_windows_are_errors_that_say_what_is_possible(
    tmp_path: Path, window: int, stride: int | None
) -> None:
    expected = "window: found .*, expected 2 to 64" if stride is None else "stride: found .*, expected 1 to 16"
    with pytest.raises(CompressionError, match=expected):
        evaluate(MODEL, tiny_models.tokenizer(), write(tmp_path), window=window, stride=stride)


@pytest.mark.parametrize("option", ["window", "stride", "max_windows"])
def test_zero_is_an_error_and_not_a_default(tmp_path: Path, option: str) -> None:
    with pytest.raises(CompressionError, match=f"{option}: found 0"):
        evaluate(MODEL, tiny_models.tokenizer(), write(tmp_path), **{option: 0})


def test_a_text_shorter_than_a_window_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(CompressionError, match="fewer than one window of 64"):
        evaluate(MODEL, tiny_models.tokenizer(), str(tmp_path / "short.txt"))


def test_a_model_agrees_with_itself() -> None:
    evaluation = evaluate_windows(MODEL, tiny_models.token_ids(4, 20), 20, reference=tiny_models.llama())
    assert (evaluation.kl, evaluation.nats_lost, evaluation.top1_agreement) == (0.0, 0.0, 1.0)
    assert evaluation.reference_nll == evaluation.nll


def test_fidelity_to_another_model_is_a_plain_mean() -> None:
    rows = tiny_models.token_ids(4, 20)
    evaluation = evaluate_windows(MODEL, rows, 20, reference=OTHER)
    with torch.no_grad():
        logs, reference = (model(rows).logits[:, :-1].double().log_softmax(dim=-1) for model in (MODEL, OTHER))
    targets = rows[:, 1:, None]
    assert evaluation.kl == pytest.approx(float((reference.exp() * (reference - logs)).sum(-1).mean()), rel=1e-5)
    assert evaluation.top1_agreement == pytest.approx(float((logs.argmax(-1) == reference.argmax(-1)).double().mean()))
    assert evaluation.reference_nll == pytest.approx(-float(reference.gather(-1, targets).mean()), rel=1e-5)
    assert evaluation.nats_lost == pytest.approx(-float((logs - reference).gather(-1, targets).mean()), rel=1e-4)
    assert evaluation.nats_lost == pytest.approx(evaluation.nll - evaluation.reference_nll)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("broken", ["model", "reference"])
def test_logits_that_are_not_finite_are_an_error(broken: str, value: float) -> None:
    bad = tiny_models.llama()
    with torch.no_grad():
        bad.lm_head.weight[7, 3] = value
    model, reference = (bad, MODEL) if broken == "model" else (MODEL, bad)
    with pytest.raises(NumericalError, match="LlamaForCausalLM gives logits that are not finite"):
        evaluate_windows(model, tiny_models.token_ids(2, 20), 20, "text", reference)


REFERENCES = [
    ("reference-7m", "wikitext2/valid_100kb.txt", 256, 125, 3.8348),
    ("stories260K", "wikitext2/valid_100kb.txt", 512, None, 5.01920),
]


@pytest.mark.parametrize(("name", "text", "window", "max_windows", "nll"), REFERENCES)
def test_published_references_are_reproduced(
    tmp_path: Path, name: str, text: str, window: int, max_windows: int | None, nll: float
) -> None:
    folder, file = asset_model(name), tmp_path / "text.txt"
    file.write_text(asset_text(text), encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    evaluation = evaluate(model, tokenizer, str(file), window=window, max_windows=max_windows)
    assert evaluation.nll == pytest.approx(nll, abs=5e-4)


def test_a_text_is_named_by_a_string_or_a_path(tmp_path: Path) -> None:
    model, tokenizer, file = tiny_models.llama(num_hidden_layers=1), tiny_models.tokenizer(), tmp_path / "rows.json"
    file.write_text(json.dumps([{"text": text} for text in tiny_models.text(3)]), encoding="utf-8")
    by_path, by_name = (evaluate(model, tokenizer, source, max_windows=1) for source in (file, str(file)))
    assert by_path == by_name
    with pytest.raises(CompressionError, match="text: found list .*expected the name of a file or of a dataset"):
        evaluate(model, tokenizer, ["text"])
