"""Speed and memory of whole models when they generate text."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import BaseStreamer

from .speed import Timing, stored_bytes, torch_threads


@dataclass(frozen=True)
class ModelSpeed:
    """Speed and memory of one model from end to end.

    Attributes:
        name: name of the model.
        stored_bytes: size of all its tensors.
        resident_bytes: memory that stays resident after the load and one generation, or None where the system does not
            tell it (outside Linux).
        prefill: timing from the prompt to the first new token.
        decode: timing of the tokens after the first.
        prompt_tokens, new_tokens: tokens of the prompt, and tokens decoded after the first new one.
    """

    name: str
    stored_bytes: int
    resident_bytes: int | None
    prefill: Timing
    decode: Timing
    prompt_tokens: int
    new_tokens: int

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill.median

    @property
    def decode_tokens_per_second(self) -> float:
        return self.new_tokens / self.decode.median


def benchmark_model(
    models: Mapping[str, Callable[[], PreTrainedModel]],
    prompt_tokens: int = 512,
    new_tokens: int = 32,
    threads: int | None = None,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> list[ModelSpeed]:
    """Time prefill and decoding of `generate`, greedy, with batch size 1, the models in turn.

    Args:
        models: function that loads each model, by name. Its resident memory is by how much the process grows when it
            is loaded and has generated once.
        new_tokens: tokens decoded after the first new one, which belongs to the prefill.
        clock: function that returns seconds; see `speed.benchmark_layers`.
    """
    loaded: dict[str, PreTrainedModel] = {}
    resident: dict[str, int | None] = {}
    prefills: dict[str, list[float]] = {}
    decodes: dict[str, list[float]] = {}
    with torch_threads(threads or torch.get_num_threads()):
        for name, load in models.items():
            loaded[name], resident[name] = _load_and_weigh(load, clock)
            prefills[name] = []
            decodes[name] = []
        # All models are in memory by now, so that a round measures all of them within seconds of each other.
        for _ in range(repeats):
            for name, model in loaded.items():
                prefill, decode = _generate(model, prompt_tokens, new_tokens + 1, clock)
                prefills[name].append(prefill)
                decodes[name].append(decode)
    results = []
    for name, model in loaded.items():
        speed = ModelSpeed(
            name=name,
            stored_bytes=stored_bytes(model),
            resident_bytes=resident[name],
            prefill=Timing.of(prefills[name]),
            decode=Timing.of(decodes[name]),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
        )
        results.append(speed)
    return results


def _load_and_weigh(
    load: Callable[[], PreTrainedModel], clock: Callable[[], float]
) -> tuple[PreTrainedModel, int | None]:
    """Load a model and return it with the resident memory that it takes, or None where the system does not tell."""
    before = resident_bytes()
    model = load().eval()
    # One generation touches all weights and creates everything that is created on first use, so that this counts too.
    _generate(model, prompt_tokens=4, new_tokens=2, clock=clock)
    gc.collect()
    after = resident_bytes()
    if before is None or after is None:
        return model, None
    return model, after - before


def resident_bytes() -> int | None:
    """Return the memory that this process uses now, or None where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    # VmRSS counts what lies in memory now, where VmHWM would be the maximum so far.
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) << 10  # the file counts in KiB


class _TokenClock(BaseStreamer):
    """Records the time when `generate` passes on the prompt and each new token."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(self.clock())

    def end(self) -> None:
        pass


def _generate(
    model: PreTrainedModel, prompt_tokens: int, new_tokens: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Generate greedily from random tokens. Return the seconds to the first new token, and from there to the last.

    An end-of-text token does not stop the generation. `generate` moves every token to the CPU before it passes it on,
    so that a GPU has finished by then.
    """
    # The text does not matter for the time, but every model and every repetition gets the same.
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, prompt_tokens), generator=generator).to(model.device)
    streamer = _TokenClock(clock)
    generate: Any = model.generate
    generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        pad_token_id=0,
        streamer=streamer,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
    )
    # The streamer receives the prompt first, which starts the clock of the prefill.
    return streamer.times[1] - streamer.times[0], streamer.times[-1] - streamer.times[1]
