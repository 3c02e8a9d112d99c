"""Makes the per-layer table of speed.md.

`python benchmarks/speed_layers.py [--threads 1 4] [--tokens 1] [--shapes 4096x4096 ...] [--quantized]`

With `--cpu-time` (one thread) the clock is the thread's own, which other processes on a shared machine do not disturb.
"""

import argparse
import time

from hf_lowrank.evaluation.speed import PAPER_LAYOUTS, LayerSpeed, Layout, benchmark_layers
from hf_lowrank.runtime.layer_spec import LayerSpec

HEADER = (
    "| layout | shape | tokens | threads | dense ms | compressed ms (spread) "
    "| × dense | bytes limit | share of limit | GB/s |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def quantized(bits: int, group: int) -> Layout:
    return lambda rows, columns: LayerSpec(sparse="full", weight_bits=bits, weight_group=group)


def half_quantized(rows: int, columns: int) -> LayerSpec:
    return LayerSpec(sparse="bitmask", kept=columns // 2, weight_bits=4, weight_group=64)


QUANTIZED = {
    f"int{bits}, groups of {group}": quantized(bits, group)
    for bits, group in ((8, 32), (8, 128), (6, 64), (5, 64), (4, 32), (4, 64), (4, 128), (3, 32), (3, 128), (2, 64))
} | {"half of the values in int4, groups of 64": half_quantized}


def row(result: LayerSpeed) -> str:
    share = "–" if result.share_of_limit is None else f"{result.share_of_limit:.2f}"
    return (
        f"| {result.layout} | {result.rows} × {result.columns} | {result.tokens} | {result.threads} "
        f"| {result.dense.median * 1e3:.3f} "
        f"| {result.compressed.median * 1e3:.3f} ({result.compressed.spread * 1e3:.3f}) "
        f"| {result.ratio:.2f} | {result.bytes_limit:.2f} | {share} | {result.bandwidth / 1e9:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096", "4096x11008"], help="out x in")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time of the calling thread; for --threads 1"
    )
    parser.add_argument("--quantized", action="store_true", help="quantized layouts instead of those of the papers")
    arguments = parser.parse_args()
    layouts = QUANTIZED if arguments.quantized else PAPER_LAYOUTS
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    size = {"tokens": arguments.tokens, "threads": arguments.threads, "repeats": arguments.repeats}
    print(HEADER)
    for shape in arguments.shapes:
        rows, columns = map(int, shape.split("x"))
        for result in benchmark_layers([(rows, columns)], layouts, **size, clock=clock):
            print(row(result), flush=True)


if __name__ == "__main__":
    main()
