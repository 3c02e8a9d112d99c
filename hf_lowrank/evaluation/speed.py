"""Speed of compressed layers beside dense ones.

The variants are measured in turn within one run, so that all of them see the same machine in the same state.
"""

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..kernels.cpu import native, products
from ..runtime.configuration import LayerSpec
from ..runtime.layers import CompressedLinear, build_layer
from ..runtime.packing import pack_bits
from . import torch_products

ModuleT = TypeVar("ModuleT", bound=nn.Module)

Layout = Callable[[int, int], LayerSpec]
"""Function from the shape of a layer (out, in) to its spec."""
Call = Callable[[Tensor], Tensor | None]
"""Product of one copy of a layer with an input."""
Timer = Callable[[], float]
"""Function that measures one product in seconds each time it is called."""
TimerBuilder = Callable[[Sequence[Call], Tensor], Timer]
"""Function that builds a timer from the copies of one product and their input."""

DENSE = "torch's dense product"
"""Name of the variant that the compressed ones are compared with."""
GEMV = "the package's dense product"
"""Name of the variant that shows what memory allows: a dense product by loops like those of compressed layers."""
WORKING_SET_BYTES = 256 << 20
"""Size of all copies of a layer together, so that weights come from memory and not from a cache, as in a model."""
MAX_COPIES = 1000
"""Maximum number of copies, because more copies of a tiny layer would take longer to create than to measure."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, the fastest, and the range of the middle half."""

    median: float
    minimum: float
    spread: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """Return the timing of repeated calls."""
        # Quartiles need two values. The range of the middle half ignores the outliers of a busy machine.
        spread = 0.0
        if len(seconds) > 1:
            quartiles = statistics.quantiles(seconds, n=4)
            spread = quartiles[2] - quartiles[0]
        return cls(statistics.median(seconds), min(seconds), spread)


@dataclass(frozen=True)
class LayerSpeed:
    """Speed of one layout of one shape beside the dense layer.

    Attributes:
        layout: name of the layout.
        rows, columns: shape of the layer (out, in).
        tokens: number of input rows.
        threads: number of torch's threads.
        dtype: data type of the input and of the dense layer.
        dense_bytes, stored_bytes: size of the dense and of the compressed layer.
        dense: timing of torch's dense product.
        compressed: timing of the compressed layer.
        gemv: timing of a dense product by the package's own loops (CPU, few tokens), or None where there is none. It
            is what the share of the bytes limit is measured against, because torch's dense product is often not bound
            by memory itself.
    """

    layout: str
    rows: int
    columns: int
    tokens: int
    threads: int
    dtype: torch.dtype
    dense_bytes: int
    stored_bytes: int
    dense: Timing
    compressed: Timing
    gemv: Timing | None

    @property
    def ratio(self) -> float:
        """How many times faster than dense the compressed layer is."""
        return self.dense.median / self.compressed.median

    @property
    def bytes_limit(self) -> float:
        """Dense bytes per stored byte: the ratio of two products that are both bound by memory alone."""
        return self.dense_bytes / self.stored_bytes

    @property
    def share_of_limit(self) -> float | None:
        """Speed relative to the package's dense product, as a fraction of the bytes limit."""
        if self.gemv is None:
            return None
        return self.gemv.median / self.compressed.median / self.bytes_limit

    @property
    def bandwidth(self) -> float:
        """Stored bytes read per second by the compressed layer."""
        return self.stored_bytes / self.compressed.median


def _slab_spec(kept: int) -> LayerSpec:
    return LayerSpec(kind="sparse_lowrank_binary", sparse="bitmask", kept=kept, binary_rank=1)


def _bitmask_spec(kept: int) -> LayerSpec:
    return LayerSpec(sparse="bitmask", kept=kept)


def _lowrank_spec(rank: int) -> LayerSpec:
    return LayerSpec(rank=rank)


SPECS_BY_SIZE: dict[str, Callable[[int], LayerSpec]] = {
    "slab": _slab_spec,
    "bitmask": _bitmask_spec,
    "lowrank": _lowrank_spec,
}
"""Functions from one number, the kept values per row or the rank, to what a method stores."""


def layout(method: str, ratio: float, accounting: str = "paper") -> Layout:
    """Return the largest layout of a method that stores no more than a removed ratio allows.

    Args:
        method: "slab", "bitmask" or "lowrank".
        ratio: fraction of the bits of a 16-bit dense layer to remove.
        accounting: "paper", which does not count mask bits, or "bits", as in `CompressionConfig.accounting`.

    Raises:
        ValueError: if the method is none of these.
    """
    if method not in SPECS_BY_SIZE:
        raise ValueError(f"unknown layout {method!r}, expected one of {', '.join(SPECS_BY_SIZE)}")
    return partial(_spec_at_ratio, SPECS_BY_SIZE[method], ratio, accounting)


def _spec_at_ratio(
    spec_of_size: Callable[[int], LayerSpec], ratio: float, accounting: str, rows: int, columns: int
) -> LayerSpec:
    # Stored bits grow linearly with the size, so two sizes determine the largest that the budget pays for.
    base = spec_of_size(0).stored_bits(rows, columns, 16, accounting)
    step = spec_of_size(1).stored_bits(rows, columns, 16, accounting) - base
    budget = (1 - ratio) * 16 * rows * columns
    return spec_of_size(max(int((budget - base) // step), 1))


PAPER_LAYOUTS: dict[str, Layout] = {
    "SLaB 50 %": layout("slab", 0.5),
    "SLaB 80 %": layout("slab", 0.8),
    "bitmask 50 %": layout("bitmask", 0.5),
    "low rank 30 %": layout("lowrank", 0.3),
}
"""Layouts of the papers' methods."""


def quantized_layout(bits: int, group: int) -> Layout:
    """Return the layout of a matrix of integers."""
    return partial(_quantized_spec, bits, group)


def _quantized_spec(bits: int, group: int, rows: int, columns: int) -> LayerSpec:
    return LayerSpec(sparse="full", weight_bits=bits, weight_group=group)


INTEGER_LAYOUTS: dict[str, Layout] = {
    "int8, groups of 32": quantized_layout(8, 32),
    "int4, groups of 32": quantized_layout(4, 32),
    "int3, groups of 128": quantized_layout(3, 128),
}
LAYOUTS = PAPER_LAYOUTS | INTEGER_LAYOUTS
"""Layouts whose speed is reported by default."""


def benchmark_layers(
    shapes: Sequence[tuple[int, int]],
    layouts: Mapping[str, Layout] = LAYOUTS,
    tokens: Sequence[int] = (1,),
    threads: Sequence[int] = (),
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    repeats: int = 30,
    clock: Callable[[], float] = time.perf_counter,
    build_timer: TimerBuilder | None = None,
) -> list[LayerSpeed]:
    """Time compressed layers of random content beside `nn.Linear`, and beside torch's own int4 and int8.

    Args:
        shapes: (out, in) of the layers.
        layouts: functions that give the spec of each compressed layer, by name.
        tokens: numbers of input rows to measure with.
        threads: numbers of torch's threads to measure with. By default, the number in use.
        clock: function that returns seconds. `time.thread_time`, for one thread, does not count the time that other
            processes take of a shared machine.
        build_timer: function that builds the timer of a variant. By default, `clock` times one copy of the layer after
            the other.
    """
    build_timer = partial(_clock_timer, clock) if build_timer is None else build_timer
    results = []
    for rows, columns in shapes:
        dense = _copies(nn.Linear(columns, rows, bias=False, device=device, dtype=dtype))
        compressed: dict[str, list[nn.Module]] = {}
        for name, spec_of_shape in layouts.items():
            compressed[name] = _copies(random_layer(spec_of_shape(rows, columns), rows, columns, dtype, device))
        if torch_products.fits(rows, columns):
            for name, build in torch_products.available(device, dtype).items():
                compressed[name] = _copies(build(dense[0].weight))
        # The copies serve all numbers of threads and tokens, because to create them takes longer than to measure.
        for count in threads or (torch.get_num_threads(),):
            for batch in tokens:
                with torch_threads(count):
                    x = torch.randn(batch, columns, device=device, dtype=dtype)
                    timings = _time_variants(dense, compressed, x, build_timer, repeats)
                for name, copies in compressed.items():
                    speed = LayerSpeed(
                        layout=name,
                        rows=rows,
                        columns=columns,
                        tokens=batch,
                        threads=count,
                        dtype=dtype,
                        dense_bytes=stored_bytes(dense[0]),
                        stored_bytes=stored_bytes(copies[0]),
                        dense=timings[DENSE],
                        compressed=timings[name],
                        gemv=timings.get(GEMV),
                    )
                    results.append(speed)
    return results


def _time_variants(
    dense: list[nn.Linear],
    compressed: Mapping[str, Sequence[nn.Module]],
    x: Tensor,
    build_timer: TimerBuilder,
    repeats: int,
) -> dict[str, Timing]:
    """Return the timings of the compressed layers by name, of `DENSE`, and of `GEMV` where this machine has that."""
    calls: dict[str, list[Call]] = {}
    for name, copies in compressed.items():
        calls[name] = [layer.forward for layer in copies]
    # The dense variants come last, in this order, on which `_package_dense_calls` relies.
    calls[DENSE] = [layer.forward for layer in dense]
    package_calls = _package_dense_calls(dense, x)
    if package_calls:
        calls[GEMV] = package_calls
    timers = {name: build_timer(variant_calls, x) for name, variant_calls in calls.items()}
    return _time_in_turn(timers, repeats)


def random_layer(
    spec: LayerSpec, rows: int, columns: int, dtype: torch.dtype, device: str = "cpu"
) -> CompressedLinear:
    """Return a layer with random kept columns and signs.

    The mask must be random, because it decides how evenly the work of a kernel is spread.
    """
    layer = build_layer(spec, columns, rows, dtype=dtype)
    if spec.sparse == "bitmask":
        # A pattern of 256 rows is repeated, because sorting random numbers for all rows of a large layer takes long.
        packed = pack_bits(torch.rand(min(rows, 256), columns).argsort(dim=1) < spec.kept)
        repetitions = -(-rows // len(packed))
        layer.get_buffer("weight_mask").copy_(packed.repeat(repetitions, 1)[:rows])
    if spec.binary_rank:
        layer.get_buffer("sign_bits").random_(0, 256)
    if spec.weight_bits and spec.sparse == "full" and columns * spec.weight_bits % 8 == 0:  # no bits of padding
        layer.get_buffer("weight").random_(0, 256)
    return layer.to(device)


def _package_dense_calls(dense: list[nn.Linear], x: Tensor) -> list[Call]:
    """Return the package's own dense product of each copy, or nothing if this machine has none for x."""
    if x.device.type != "cpu" or native.library() is None or products.dense_linear(x, dense[0].weight) is None:
        return []
    # torch's product has just left one copy in the cache. To start in the middle keeps the two half a round apart.
    middle = len(dense) // 2
    return [partial(_package_dense_product, layer.weight) for layer in (*dense[middle:], *dense[:middle])]


def _package_dense_product(weight: Tensor, x: Tensor) -> Tensor | None:
    return products.dense_linear(x, weight)


@torch.inference_mode()
def _time_in_turn(timers: Mapping[str, Timer], repeats: int) -> dict[str, Timing]:
    """Call every timer once per round. The first round, which warms up, is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(repeats + 1):
        for name, timer in timers.items():
            seconds[name].append(timer())
    return {name: Timing.of(times[1:]) for name, times in seconds.items()}


def _clock_timer(clock: Callable[[], float], calls: Sequence[Call], x: Tensor) -> Timer:
    """Build a timer that calls the next copy each time, from the first to the last and again."""
    remaining = itertools.cycle(calls)

    def time_next_copy() -> float:
        call = next(remaining)
        return _seconds(partial(call, x), x.device, clock)

    return time_next_copy


def _seconds(call: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    # A GPU computes after the call has returned, so it must be idle at the start and finished at the end.
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def _copies(layer: ModuleT) -> list[ModuleT]:
    """Return the layer and copies of it that fill `WORKING_SET_BYTES` together: at least two, at most `MAX_COPIES`."""
    layer.requires_grad_(False)
    filling = -(-WORKING_SET_BYTES // stored_bytes(layer))
    count = min(max(filling, 2), MAX_COPIES)
    return [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]


def stored_bytes(module: nn.Module) -> int:
    """Return the bytes of all parameters and buffers of a module."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set the number of torch's threads while the context is active."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
