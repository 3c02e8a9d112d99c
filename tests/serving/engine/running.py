"""Runs vLLM's engine, and Transformers as the reference for it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from tests.support import tiny_models

from .checkpoints import CONTEXT

NEW_TOKENS = 16
TOLERANCE = 1e-4
"""How far the log-probability of a token may be from the reference, in float32."""

Continuation = tuple[list[int], list[float]]
"""Tokens and their log-probabilities."""


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[LLM]:
    """Start vLLM's engine in this process, and end it."""
    options = {"dtype": "float32", "enforce_eager": True, **options}
    llm = LLM(str(folder), max_model_len=CONTEXT, seed=0, distributed_executor_backend="uni", **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def prompts(count: int = 3, seed: int = 0) -> list[list[int]]:
    """Return prompts of random tokens, of several lengths."""
    return [tiny_models.token_ids(1, 5 + 7 * i % 40, seed=seed + i)[0].tolist() for i in range(count)]


def continued(llm: LLM, texts: Sequence[list[int]], **options: Any) -> list[Continuation]:
    """Return the greedy continuations by vLLM. `options` are those of `LLM.generate`."""
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=1)
    requests = [{"prompt_token_ids": tokens} for tokens in texts]
    results = []
    for request in llm.generate(requests, greedy, use_tqdm=False, **options):
        (output,) = request.outputs
        scores = [step[token].logprob for token, step in zip(output.token_ids, output.logprobs, strict=True)]
        results.append((list(output.token_ids), scores))
    return results


def reference(source: Path | PreTrainedModel, texts: Sequence[list[int]]) -> list[Continuation]:
    """Return the greedy continuations by Transformers, without a cache and without padding."""
    model = AutoModelForCausalLM.from_pretrained(source) if isinstance(source, Path) else source
    results = []
    for prompt in texts:
        tokens, scores = list(prompt), []
        for _ in range(NEW_TOKENS):
            with torch.no_grad():
                last = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
            tokens.append(int(last.argmax()))
            scores.append(float(last.max()))
        results.append((tokens[len(prompt) :], scores))
    return results


def assert_same(found: Sequence[Continuation], wanted: Sequence[Continuation]) -> None:
    """Check that the tokens are the same ones, and their log-probabilities nearly the same."""
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in wanted]
    for (_, scores), (_, expected) in zip(found, wanted, strict=True):
        torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected), rtol=0, atol=TOLERANCE)
