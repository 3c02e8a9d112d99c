"""Measures layers on a GPU beside cuBLAS.

`python benchmarks/speed_gpu.py [--shapes 4096x4096 ...] [--tokens 1 2048] [--repeats 50]`

Every variant is a CUDA graph of all copies of its layer, one after the other. So launches cost what they cost in a
captured model, and weights come from memory. The time of a graph, between two events, is divided by the number of
copies. The kernels are loaded, whatever `HF_LOWRANK_KERNELS` says, and tuned before the capture.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from hf_lowrank import kernels
from hf_lowrank.evaluation.speed import Call, LayerSpeed, Timing, benchmark_layers

HEADER = """\
| layout | shape | tokens | cuBLAS µs | compressed µs (spread) | × cuBLAS | bytes limit | GB/s | of copy |
|---|---|---|---|---|---|---|---|---|"""
COPIED_BYTES = 1 << 30


@torch.inference_mode()
def replayed(calls: Sequence[Call], x: Tensor) -> Callable[[], float]:
    """Return a timer for `benchmark_layers`: it measures the seconds of one product within a replayed graph of all."""
    calls[0](x)  # tunes the shape, which a capture cannot
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call(x)

    def seconds_per_call() -> float:
        return between_events(graph.replay) / len(calls)

    return seconds_per_call


def between_events(work: Callable[[], object]) -> float:
    """Return the seconds that the GPU takes for some work."""
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def copy_bandwidth(repeats: int) -> float:
    """Return the bytes read and written per second by a copy within the GPU's memory, at the median of its times."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = [between_events(partial(target.copy_, source)) for _ in range(repeats + 1)]
    return 2 * COPIED_BYTES / Timing.of(seconds[1:]).median  # the first copy warms up


def row(result: LayerSpeed, copy: float) -> str:
    bandwidth = "– | –"
    if result.tokens == 1:  # with more tokens a product is no longer bound by memory
        bandwidth = f"{result.bandwidth / 1e9:.0f} | {result.bandwidth / copy:.2f}"
    return (
        f"| {result.layout} | {result.rows} × {result.columns} | {result.tokens} | {result.dense.median * 1e6:.1f} "
        f"| {result.compressed.median * 1e6:.1f} ({result.compressed.spread * 1e6:.1f}) "
        f"| {result.ratio:.2f} | {result.bytes_limit:.2f} | {bandwidth} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096", "4096x11008"], help="out x in")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2048])
    parser.add_argument("--repeats", type=int, default=50)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device; this benchmark has nothing to measure here")
    kernels.load()
    copy = copy_bandwidth(arguments.repeats)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}; "
        f"copy bandwidth {copy / 1e9:.0f} GB/s\n"
    )
    print(HEADER)
    for shape in arguments.shapes:
        rows, columns = map(int, shape.split("x"))
        size = {"tokens": arguments.tokens, "repeats": arguments.repeats}
        for result in benchmark_layers([(rows, columns)], **size, device="cuda", build_timer=replayed):
            print(row(result, copy), flush=True)


if __name__ == "__main__":
    main()
