"""Layers on a GPU beside cuBLAS: `python benchmarks/speed_gpu.py [--shapes 4096x4096 ...] [--tokens 1 2048] [--repeats 50]`.

Every variant is a CUDA graph of all copies of its layer, one after the other, so that launches cost what they cost in a captured model
and weights come from memory; its time, between two events, is divided by the number of copies. The kernels are loaded, whatever
`HF_LOWRANK_KERNELS` says, and tuned before the capture.
"""

import argparse
from collections.abc import Callable, Sequence

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
    """Build a timer for `benchmark_layers`: seconds of one product within a replayed graph of all."""
    calls[0](x)  # tunes the shape, which a capture cannot
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call(x)
    return lambda: between_events(graph.replay) / len(calls)


def between_events(work: Callable[[], object]) -> float:
    """Seconds that the GPU takes."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def copy_bandwidth(repeats: int) -> float:
    """Bytes read and written per second by a copy within the GPU's memory, at its median."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = [between_events(lambda: target.copy_(source)) for _ in range(repeats + 1)]
    return 2 * COPIED_BYTES / Timing.of(seconds[1:]).median


def row(result: LayerSpeed, copy: float) -> str:
    bandwidth = f"{result.bandwidth / 1e9:.0f} | {result.bandwidth / copy:.2f}" if result.tokens == 1 else "– | –"
    return (
        f"| {result.layout} | {result.rows} × {result.columns} | {result.tokens} | {result.dense.median * 1e6:.1f} "
        f"| {result.compressed.median * 1e6:.1f} ({result.compressed.spread * 1e6:.1f}) | {result.ratio:.2f} | {result.bytes_limit:.2f} "
        f"| {bandwidth} |"
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
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}; copy bandwidth {copy / 1e9:.0f} GB/s\n"
    )
    print(HEADER)
    for shape in arguments.shapes:
        rows, columns = map(int, shape.split("x"))
        size = {"tokens": arguments.tokens, "repeats": arguments.repeats}
        for result in benchmark_layers([(rows, columns)], **size, device="cuda", build_timer=replayed):
            print(row(result, copy), flush=True)


if __name__ == "__main__":
    main()
