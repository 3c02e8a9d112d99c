"""How fast compressed layers and models are beside dense ones: both in turn within one run, so that both see the same machine."""

import copy
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation import BaseStreamer

from ..kernels.cpu import native, products
from ..runtime.configuration import LayerSpec
from ..runtime.layers import CompressedLinear, build_layer
from ..runtime.packing import pack_bits

L = TypeVar("L", bound=nn.Linear)

Call = Callable[[Tensor], Tensor | None]
Watch = Callable[[Sequence[Call], Tensor], Callable[[], float]]
"""Makes of the copies of a product and their input what measures the seconds of one product, each time it is called."""
DENSE, GEMV = "torch's dense product", "the package's dense product"
WORKING_SET_BYTES = 256 << 20
"""Copies of a layer take turns until they fill this much, so that weights come from memory and not from a cache, as in a model."""
MOST_COPIES = 1000
"""More copies than this of a tiny layer would take longer to make than to measure."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, fastest, and the range of the middle half."""

    median: float
    minimum: float
    spread: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
        return cls(statistics.median(seconds), min(seconds), quartiles[2] - quartiles[0])


@dataclass(frozen=True)
class LayerSpeed:
    """One layout of one shape beside the dense layer.

    `gemv` is a dense product by the package's own loops (CPU, few tokens): the yardstick for the share of the bytes limit, which
    torch's dense product, often not bound by memory itself, cannot give.
    """

    layout: str
    rows: int
    columns: int
    tokens: int
    threads: int
    dense_bytes: int
    stored_bytes: int
    dense: Timing
    compressed: Timing
    gemv: Timing | None

    @property
    def ratio(self) -> float:
        """Times faster than dense."""
        return self.dense.median / self.compressed.median

    @property
    def bytes_limit(self) -> float:
        """Dense bytes per stored byte: the ratio of two products that are both bound by memory alone."""
        return self.dense_bytes / self.stored_bytes

    @property
    def share_of_limit(self) -> float | None:
        """Ratio to the yardstick, as a fraction of the bytes limit."""
        return None if self.gemv is None else self.gemv.median / self.compressed.median / self.bytes_limit

    @property
    def bandwidth(self) -> float:
        """Stored bytes read per second by the compressed layer."""
        return self.stored_bytes / self.compressed.median


def layout(method: str, ratio: float, accounting: str = "paper") -> Callable[[int, int], LayerSpec]:
    """The layer that `method` ("slab", "bitmask" or "lowrank") stores at a removed ratio.

    Args:
        accounting: "paper", mask bits not counted, or "bits", as `CompressionConfig.accounting`.
    """
    layouts: dict[str, Callable[[int], LayerSpec]] = {
        "slab": lambda kept: LayerSpec(kind="sparse_lowrank_binary", sparse="bitmask", kept=kept, binary_rank=1),
        "bitmask": lambda kept: LayerSpec(sparse="bitmask", kept=kept),
        "lowrank": lambda rank: LayerSpec(rank=rank),
    }
    if method not in layouts:
        raise ValueError(f"unknown layout {method!r}, expected one of {', '.join(layouts)}")
    of_size = layouts[method]

    def spec(rows: int, columns: int) -> LayerSpec:
        empty, one = (of_size(size).stored_bits(rows, columns, 16, accounting) for size in (0, 1))
        return of_size(max(int(((1 - ratio) * 16 * rows * columns - empty) // (one - empty)), 1))

    return spec


PAPER_LAYOUTS: dict[str, Callable[[int, int], LayerSpec]] = {
    "SLaB 50 %": layout("slab", 0.5),
    "SLaB 80 %": layout("slab", 0.8),
    "bitmask 50 %": layout("bitmask", 0.5),
    "low rank 30 %": layout("lowrank", 0.3),
}
"""The layouts whose speed is reported by default."""


def benchmark_layers(
    shapes: Sequence[tuple[int, int]],
    layouts: Mapping[str, Callable[[int, int], LayerSpec]] = PAPER_LAYOUTS,
    tokens: Sequence[int] = (1,),
    threads: Sequence[int] = (),
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    repeats: int = 30,
    clock: Callable[[], float] = time.perf_counter,
    watch: Watch | None = None,
) -> list[LayerSpeed]:
    """Time compressed layers of random content beside `nn.Linear`.

    Args:
        shapes: (out, in) of the layers.
        layouts: what each compressed layer stores, as a function of (out, in).
        tokens: rows of the input.
        threads: numbers of torch's threads to measure with; those in use when empty.
        clock: seconds; `time.thread_time`, for one thread, does not count what other processes take of a shared machine.
        watch: how a product is measured; by `clock`, one copy after the other, when None.
    """
    watch = partial(_by_clock, clock) if watch is None else watch
    results = []
    for rows, columns in shapes:
        dense = _copies(nn.Linear(columns, rows, bias=False, device=device, dtype=dtype))
        compressed = {
            name: _copies(random_layer(spec(rows, columns), rows, columns, dtype, device))
            for name, spec in layouts.items()
        }
        for count in threads or (torch.get_num_threads(),):
            for batch in tokens:
                with _threads(count):
                    x = torch.randn(batch, columns, device=device, dtype=dtype)
                    calls: dict[str, list[Call]] = {
                        name: [layer.forward for layer in copies] for name, copies in compressed.items()
                    }
                    calls[DENSE] = [layer.forward for layer in dense]
                    yardstick = _yardsticks(dense, x)
                    if yardstick:
                        calls[GEMV] = yardstick
                    timings = _in_turn({name: watch(copies, x) for name, copies in calls.items()}, repeats)
                results += [
                    LayerSpeed(
                        name,
                        rows,
                        columns,
                        batch,
                        count,
                        _stored_bytes(dense[0]),
                        _stored_bytes(copies[0]),
                        timings[DENSE],
                        timings[name],
                        timings.get(GEMV),
                    )
                    for name, copies in compressed.items()
                ]
    return results


def random_layer(
    spec: LayerSpec, rows: int, columns: int, dtype: torch.dtype, device: str = "cpu"
) -> CompressedLinear:
    """A layer whose kept columns and signs are random: the mask decides how evenly a kernel's work is spread."""
    layer = build_layer(spec, columns, rows, dtype=dtype)
    if spec.sparse == "bitmask":
        packed = pack_bits(torch.rand(min(rows, 256), columns).argsort(dim=1) < spec.kept)
        layer.get_buffer("weight_mask").copy_(packed.repeat(-(-rows // len(packed)), 1)[:rows])
    if spec.binary_rank:
        layer.get_buffer("sign_bits").random_(0, 256)
    return layer.to(device)


@dataclass(frozen=True)
class ModelSpeed:
    """End to end: one model of the pair. Memory is None where the system does not tell it (outside Linux)."""

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
    """Prefill and decode of `generate`, greedy, batch 1, the models in turn.

    Args:
        models: for each name, what loads the model; the memory that stays resident is the growth of the process by the
            load and one generation.
        new_tokens: tokens decoded after the first, which belongs to the prefill.
        clock: seconds, see `benchmark_layers`.
    """
    with _threads(threads or torch.get_num_threads()):
        loaded, resident = {}, {}
        for name, load in models.items():
            before = resident_bytes()
            loaded[name] = load().eval()
            _generate(loaded[name], prompt_tokens=4, new_tokens=2, clock=clock)
            gc.collect()
            after = resident_bytes()
            resident[name] = None if before is None or after is None else after - before
        prefills: dict[str, list[float]] = {name: [] for name in loaded}
        decodes: dict[str, list[float]] = {name: [] for name in loaded}
        for _ in range(repeats):
            for name, model in loaded.items():
                prefill, decode = _generate(model, prompt_tokens, new_tokens + 1, clock)
                prefills[name].append(prefill)
                decodes[name].append(decode)
    return [
        ModelSpeed(
            name,
            _stored_bytes(model),
            resident[name],
            Timing.of(prefills[name]),
            Timing.of(decodes[name]),
            prompt_tokens,
            new_tokens,
        )
        for name, model in loaded.items()
    ]


def resident_bytes() -> int | None:
    """Memory of this process that is in use now, or None where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) << 10


class _Clock(BaseStreamer):
    """Notes when `generate` hands out the prompt and each new token."""

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
    """Seconds to the first token and from there to the last, greedy, from random tokens; an end-of-text token does not stop it.

    `generate` moves every token to the CPU before it hands it out, so that a GPU has finished by then.
    """
    ids = torch.randint(0, model.config.vocab_size, (1, prompt_tokens), generator=torch.Generator().manual_seed(0)).to(
        model.device
    )
    streamer = _Clock(clock)
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    generate: Any = model.generate
    generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, streamer=streamer, **length)
    return streamer.times[1] - streamer.times[0], streamer.times[-1] - streamer.times[1]


def _yardsticks(dense: list[nn.Linear], x: Tensor) -> list[Call]:
    """The package's own dense product of each copy, where this machine has one for x."""
    if x.device.type != "cpu" or native.library() is None or products.dense_linear(x, dense[0].weight) is None:
        return []
    # Not the copy that torch's product has just left in the cache.
    middle = len(dense) // 2
    return [partial(_gemv, layer.weight) for layer in (*dense[middle:], *dense[:middle])]


def _gemv(weight: Tensor, x: Tensor) -> Tensor | None:
    return products.dense_linear(x, weight)


@torch.inference_mode()
def _in_turn(watches: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, Timing]:
    """Every variant once per repeat; the first round, which warms up, is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in watches}
    for _ in range(repeats + 1):
        for name, measure in watches.items():
            seconds[name].append(measure())
    return {name: Timing.of(times[1:]) for name, times in seconds.items()}


def _by_clock(clock: Callable[[], float], calls: Sequence[Call], x: Tensor) -> Callable[[], float]:
    """A watch: each time the next copy is called."""
    turn = itertools.cycle(calls)
    return lambda: _seconds(partial(next(turn), x), x.device, clock)


def _seconds(call: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def _copies(layer: L) -> list[L]:
    layer.requires_grad_(False)
    count = min(max(-(-WORKING_SET_BYTES // _stored_bytes(layer)), 2), MOST_COPIES)
    return [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]


def _stored_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
