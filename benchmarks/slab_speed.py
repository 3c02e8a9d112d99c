"""Measures SLaB's alternation against the same loop with a full SVD in every step.

`python benchmarks/slab_speed.py [--size 4096] [--threads 2]`

Both get the same matrix, input norms and budget. Times are wall and CPU seconds. The objective is
‖(W − Ŵ) diag(c)‖_F / ‖W diag(c)‖_F.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from hf_lowrank.budget import Budget
from hf_lowrank.methods import Decomposition, Statistics, make_method
from hf_lowrank.runtime.configuration import LayerSpec

VALUE_BITS = 16


def full_svd_loop(weight: Tensor, c: Tensor, kept: int, iterations: int) -> Tensor:
    """Return Ŵ after `iterations` of the steps of SLaB (arXiv 2604.04493), computed with full decompositions.

    A step takes the leading singular pair of |R| and the signs of R for the residual R = W − S, and keeps in every row
    of S the entries of the rest that are largest when scaled by c.
    """
    S = torch.zeros_like(weight)
    binary = S
    for _ in range(iterations):
        R = weight - S
        U, sigma, Vh = torch.linalg.svd(R.abs(), full_matrices=False)
        binary = sigma[0] * torch.outer(U[:, 0].abs(), Vh[0].abs()) * torch.where(R >= 0, 1.0, -1.0)
        Y = weight - binary
        chosen = (Y * c).abs().topk(kept, dim=1, sorted=False).indices
        S = torch.zeros_like(Y).scatter_(1, chosen, Y.gather(1, chosen))
    return binary + S


def timed(work: Callable[[], Tensor | Decomposition]) -> tuple[Tensor | Decomposition, float, float]:
    """Return the result of `work`, its wall seconds, and the CPU seconds of all threads."""
    wall = time.perf_counter()
    cpu = time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    n = arguments.size
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, n, dtype=torch.float64, generator=generator)
    c = torch.exp(0.7 * torch.randn(n, dtype=torch.float64, generator=generator))
    statistics = Statistics(tokens=1, column_norms=c, mean=torch.zeros_like(c), mean_abs=c)
    budget = Budget(int((1 - arguments.ratio) * n * n * VALUE_BITS), n, n, VALUE_BITS)
    kept = budget.kept_per_row(LayerSpec(kind="sparse_lowrank_binary", sparse="bitmask", binary_rank=1))

    def error(approximation: Tensor) -> float:
        return float(((weight - approximation) * c).norm() / (weight * c).norm())

    print("| loop | wall s | CPU s | objective |\n|---|---|---|---|", flush=True)
    method = make_method("slab", {"iterations": arguments.iterations})
    ours, wall, cpu = timed(work=lambda: method.decompose(weight, statistics, budget))
    assert isinstance(ours, Decomposition)
    own_error = error(ours.to_layer(n, n).to_dense(torch.float64).detach())
    print(f"| hf_lowrank | {wall:.1f} | {cpu:.1f} | {own_error:.6f} |", flush=True)
    full, full_wall, full_cpu = timed(work=lambda: full_svd_loop(weight, c, kept, arguments.iterations))
    assert isinstance(full, Tensor)
    full_error = error(full)
    print(f"| full SVDs | {full_wall:.1f} | {full_cpu:.1f} | {full_error:.6f} |", flush=True)
    change = own_error / full_error - 1
    print(f"\n{full_wall / wall:.1f} × in wall time, {full_cpu / cpu:.1f} × in CPU time; objective {change:+.4%}")


if __name__ == "__main__":
    main()
