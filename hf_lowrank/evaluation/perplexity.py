"""Perplexity of a model on a text, and its fidelity to a reference model on the same tokens."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..calibration.texts import context_length, read_documents, token_stream, windows
from ..runtime.errors import CompressionError, NumericalError

LONGEST_WINDOW = 2048
TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class Evaluation:
    """Figures on one text.

    Attributes:
        text: where it came from.
        windows, scored_tokens: how much was scored; window, stride: tokens per window and between window starts.
        nll: mean negative log-likelihood, nats per token. perplexity: exp(nll).
        reference_nll: of the reference model; nats_lost: nll − reference_nll.
        kl: mean KL(reference ‖ model), nats per token. top1_agreement: share of tokens with the same most likely next token.
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
    source: str,
    *,
    window: int | None = None,
    stride: int | None = None,
    max_windows: int | None = None,
    reference: PreTrainedModel | None = None,
) -> Evaluation:
    """Evaluate on a text file or a dataset (its test split).

    Args:
        window: tokens per window; default: the model's context, at most 2048.
        stride: tokens between window starts; default: the window. Of overlapping windows, only new tokens are scored.
        max_windows: score only the first windows.
        reference: the model to compare with, such as the dense one.

    Raises:
        CompressionError: for a model of another kind, a text shorter than a window, or a window longer than the context.
        NumericalError: if a logit is not finite; nothing is skipped.
    """
    for each in (model, reference):
        if each is not None and (not each.can_generate() or each.config.is_encoder_decoder):
            raise CompressionError(
                f"perplexity is that of a text's next token, which {type(each).__name__} does not predict; use a causal model"
            )
    context = context_length(model.config) or LONGEST_WINDOW
    window = min(context, LONGEST_WINDOW) if window is None else window
    stride = window if stride is None else stride
    if not 1 < window <= context:
        raise CompressionError(f"window: found {window}, expected 2 to {context}, the model's context")
    if not 1 <= stride <= window:
        raise CompressionError(f"stride: found {stride}, expected 1 to {window}, the window")
    if max_windows is not None and max_windows < 1:
        raise CompressionError(f"max_windows: found {max_windows}, expected at least 1")
    rows = windows(token_stream(tokenizer, read_documents(source, split="test")), window, stride)
    return evaluate_windows(model, rows[:max_windows], stride, source, reference)


@torch.no_grad()
def evaluate_windows(
    model: PreTrainedModel, rows: Tensor, stride: int, source: str = "tokens", reference: PreTrainedModel | None = None
) -> Evaluation:
    """Evaluate on windows of token ids (W, T), of which the next starts `stride` tokens after the last."""
    length = rows.shape[1]
    sums = torch.zeros(5, dtype=torch.float64)  # tokens, nll, reference nll, KL, agreements
    first = 0
    for batch in rows.split(max(TOKENS_PER_BATCH // length, 1)):
        scored = torch.ones(len(batch), length - 1, dtype=torch.bool)
        if stride < length:
            scored[:, : length - 1 - stride] = False
            if first == 0:
                scored[0] = True
        sums += _score(model, batch, scored, source, reference)
        first += len(batch)
    _, nll, reference_nll, kl, agreements = (sums / sums[0]).tolist()
    measured = Evaluation(source, len(rows), length, stride, int(sums[0]), nll, math.exp(min(nll, 700.0)))
    if reference is None:
        return measured
    figures = {
        "reference_nll": reference_nll,
        "nats_lost": nll - reference_nll,
        "kl": kl,
        "top1_agreement": agreements,
    }
    return Evaluation(**{**measured.to_dict(), **figures})


def _score(
    model: PreTrainedModel, batch: Tensor, scored: Tensor, source: str, reference: PreTrainedModel | None
) -> Tensor:
    targets = batch[:, 1:][scored]
    logs = _log_probabilities(model, batch, scored, source)
    nll = F.nll_loss(logs, targets, reduction="sum").double()
    zero = torch.zeros((), dtype=torch.float64)
    if reference is None:
        return torch.stack([torch.tensor(float(len(targets)), dtype=torch.float64), nll, zero, zero, zero])
    dense = _log_probabilities(reference, batch, scored, source)
    kl = F.kl_div(logs, dense, log_target=True, reduction="none").double().sum()
    agreements = (logs.argmax(dim=-1) == dense.argmax(dim=-1)).double().sum()
    dense_nll = F.nll_loss(dense, targets, reduction="sum").double()
    return torch.stack([torch.tensor(float(len(targets)), dtype=torch.float64), nll, dense_nll, kl, agreements])


def _log_probabilities(model: PreTrainedModel, batch: Tensor, scored: Tensor, source: str) -> Tensor:
    logits = model(input_ids=batch.to(model.device), use_cache=False).logits[:, :-1].float().cpu()[scored]
    if not bool(logits.isfinite().all()):
        raise NumericalError(
            f"{source}: {type(model).__name__} gives logits that are not finite; the model is broken, or its dtype too narrow"
        )
    return logits.log_softmax(dim=-1)
