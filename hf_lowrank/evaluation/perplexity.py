"""Perplexity of a model on a text, and its fidelity to a reference model on the same tokens."""

import math
import os
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..calibration.texts import read_documents, token_stream, windows
from ..execution.modes import own_modes
from ..models.caller_state import evaluation_mode
from ..models.context import context_length
from ..runtime.errors import CompressionError, NumericalError

LONGEST_WINDOW = 2048
"""Maximum number of tokens per window by default, as the papers measure; longer contexts are used only on request."""
TOKENS_PER_BATCH = 4096
"""Maximum number of tokens in one batch of windows."""
LARGEST_EXPONENT = 700.0
"""Maximum mean loss whose exponential is taken, in nats. The exponential of a larger one overflows a float."""


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model on one text.

    Attributes:
        text: source of the text: a file or the name of a dataset.
        windows, scored_tokens: how much was scored.
        window, stride: tokens per window, and tokens between the starts of two windows.
        nll: mean negative log-likelihood in nats per token.
        perplexity: exp(nll).
        reference_nll: nll of the reference model.
        nats_lost: nll − reference_nll.
        kl: mean KL(reference ‖ model) in nats per token.
        top1_agreement: share of tokens for which both models have the same most likely next token.
    """

    text: str
    windows: int
    window: int
    stride: int
    scored_tokens: int
    nll: float
    perplexity: float
    reference_nll: float | None = None
    nats_lost: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    source: str | os.PathLike[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    max_windows: int | None = None,
    reference: PreTrainedModel | None = None,
) -> Evaluation:
    """Evaluate a model on a file of texts or on the test split of a dataset.

    Args:
        source: path of a file (plain text, or rows with a column `text` or `messages`), or the name of a dataset
            ("wikitext2", "c4").
        window: tokens per window. The default is the model's context, at most 2048.
        stride: tokens between the starts of two windows. The default is the window. Where windows overlap, each token
            is scored once.
        max_windows: maximum number of windows to score, from the start of the text.
        reference: model to compare with, such as the dense one.

    Raises:
        CompressionError: if a model does not predict next tokens, the text is shorter than a window, or the window is
            longer than the context.
        NumericalError: if a logit is not finite. No token is skipped.
    """
    # Models with an encoder predict the next token of a second text, given the first.
    _check_causal(model)
    if reference is not None:
        _check_causal(reference)
    context = context_length(model)
    if window is None:
        window = LONGEST_WINDOW if context is None else min(context, LONGEST_WINDOW)
    if stride is None:
        stride = window
    # A window of one token predicts nothing.
    if context is not None and not 1 < window <= context:
        raise CompressionError(f"window: found {window}, expected 2 to {context}, the model's context")
    if window < 2:
        raise CompressionError(f"window: found {window}, expected at least 2")
    if not 1 <= stride <= window:
        raise CompressionError(f"stride: found {stride}, expected 1 to {window}, the window")
    if max_windows is not None and max_windows < 1:
        raise CompressionError(f"max_windows: found {max_windows}, expected at least 1")
    # Documents after the last window are not read.
    enough = None if max_windows is None else window + (max_windows - 1) * stride
    documents = read_documents(source, split="test")
    rows = windows(token_stream(tokenizer, documents, enough, most_documents=0), window, stride)
    return evaluate_windows(model, rows[:max_windows], stride, os.fspath(source), reference)


def _check_causal(model: PreTrainedModel) -> None:
    """Raise CompressionError if a model does not predict the next token of a text."""
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise CompressionError(
            f"perplexity is measured on the next token of a text, which {type(model).__name__} does not predict; "
            "use a causal model"
        )


@own_modes()
def evaluate_windows(
    model: PreTrainedModel, rows: Tensor, stride: int, source: str = "tokens", reference: PreTrainedModel | None = None
) -> Evaluation:
    """Evaluate a model on windows of token ids (W, T). Each starts `stride` tokens after the one before."""
    length = rows.shape[1]
    # Windows score unequal numbers of tokens, so means are taken once at the end, of sums in float64.
    sums = torch.zeros(5, dtype=torch.float64)  # tokens, nll, reference nll, KL, agreements
    first = 0
    with evaluation_mode(model), nullcontext() if reference is None else evaluation_mode(reference):
        for batch in rows.split(max(TOKENS_PER_BATCH // length, 1)):
            scored = _scored_positions(len(batch), length, stride, is_start=first == 0)
            sums += _score(model, batch, scored, source, reference)
            first += len(batch)
    _, nll, reference_nll, kl, agreements = (sums / sums[0]).tolist()
    evaluation = Evaluation(
        text=source,
        windows=len(rows),
        window=length,
        stride=stride,
        scored_tokens=int(sums[0]),
        nll=nll,
        perplexity=math.exp(min(nll, LARGEST_EXPONENT)),
    )
    if reference is None:
        return evaluation
    return replace(
        evaluation,
        reference_nll=reference_nll,
        nats_lost=nll - reference_nll,
        kl=kl,
        top1_agreement=agreements,
    )


def _scored_positions(count: int, length: int, stride: int, is_start: bool) -> Tensor:
    """Return which predictions of a batch of windows are scored, as booleans (count, length - 1).

    Args:
        is_start: whether the batch holds the first window of the text.
    """
    scored = torch.ones(count, length - 1, dtype=torch.bool)
    if stride < length:
        # The window before has scored all but the last `stride` tokens, with more context than a repetition could
        # have.
        scored[:, : length - 1 - stride] = False
        # Nothing comes before the first window, so all its predictions count.
        if is_start:
            scored[0] = True
    return scored


def _score(
    model: PreTrainedModel, batch: Tensor, scored: Tensor, source: str, reference: PreTrainedModel | None
) -> Tensor:
    """Return sums over the scored tokens of a batch, float64 (5,): tokens, nll, reference nll, KL, agreements."""
    targets = batch[:, 1:][scored]
    tokens = torch.tensor(float(len(targets)), dtype=torch.float64)
    logs = _log_probabilities(model, batch, scored, source)
    nll = F.nll_loss(logs, targets, reduction="sum").double()
    if reference is None:
        zero = torch.zeros((), dtype=torch.float64)
        return torch.stack([tokens, nll, zero, zero, zero])
    dense = _log_probabilities(reference, batch, scored, source)
    kl = F.kl_div(logs, dense, log_target=True, reduction="none").double().sum()
    agreements = (logs.argmax(dim=-1) == dense.argmax(dim=-1)).double().sum()
    dense_nll = F.nll_loss(dense, targets, reduction="sum").double()
    return torch.stack([tokens, nll, dense_nll, kl, agreements])


def _log_probabilities(model: PreTrainedModel, batch: Tensor, scored: Tensor, source: str) -> Tensor:
    """Return log-probabilities of the next token at the scored positions, float32 (scored, vocabulary), on the CPU."""
    # Selecting the scored rows before the softmax saves the memory and the time of the others.
    logits = model(input_ids=batch.to(model.device), use_cache=False).logits[:, :-1].float().cpu()[scored]
    if not bool(logits.isfinite().all()):
        raise NumericalError(
            f"{source}: {type(model).__name__} gives logits that are not finite; the model is broken, or its dtype "
            "too narrow"
        )
    return logits.log_softmax(dim=-1)
