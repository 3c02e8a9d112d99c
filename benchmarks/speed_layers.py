"""Makes the per-layer table of speed.md.

`python benchmarks/speed_layers.py [--threads 1 4] [--tokens 1] [--shapes 4096x4096 ...]`

With `--cpu-time` (one thread) the clock is the thread's own, which other processes on a shared machine do not disturb.
"""

import argparse
import time

from hf_lowrank.evaluation.speed import LayerSpeed, benchmark_layers

HEADER = (
    "| layout | shape | tokens | threads | dense ms | compressed ms (spread) "
    "| × dense | bytes limit | share of limit | GB/s |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


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
    arguments = parser.parse_args()
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    size = {"tokens": arguments.tokens, "threads": arguments.threads, "repeats": arguments.repeats}
    print(HEADER)
    for shape in arguments.shapes:
        rows, columns = map(int, shape.split("x"))
        for result in benchmark_layers([(rows, columns)], **size, clock=clock):
            print(row(result), flush=True)


if __name__ == "__main__":
    main()
