"""Matrices are solved by one thread each, several at a time, so that solutions do not depend on the number of threads.

LAPACK's factorizations, and sums over many values, differ in their last bits with the number of threads that share
one. Products differ only as docs/promises.md says. The largest matrices are the exception, because one thread would
take too long for them: each takes all threads, one after the other.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch

MAX_PARALLEL_BYTES = 2**29
"""Maximum number of bytes of the matrices that are solved at the same time. A larger one gets all threads."""

T = TypeVar("T")


def parallel_slots(working_memory: int) -> int:
    """Return how many matrices are solved at the same time, or 0 if each is too large to be left to one thread.

    Args:
        working_memory: bytes that one matrix takes while it is solved.
    """
    return min(torch.get_num_threads(), MAX_PARALLEL_BYTES // max(working_memory, 1))


def solve_in_threads(costs: dict[str, float], solve: Callable[[str], T], count: int) -> Iterator[tuple[str, T]]:
    """Yield the solution of every task, in order. One thread solves each task.

    If several tasks raise errors, the first one in the order of the tasks is raised, when the tasks that had begun
    are over.

    Args:
        costs: cost of each task by its name, in any unit; the costliest begin first.
        solve: returns the solution of a task.
        count: number of tasks that are solved at a time; with 0, one after the other, each by all threads.
    """
    if min(count, len(costs)) <= 1:
        for name in costs:
            with one_thread() if count else nullcontext():
                solution = solve(name)
            yield name, solution
        return

    @torch.no_grad()  # which holds only for the thread that asks for it
    def solve_here(name: str) -> T:
        return solve(name)

    # LAPACK reads the number of threads of the thread it runs in, which is the environment's in a new thread.
    with one_thread(), ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            pending = {}
            for name in sorted(costs, key=lambda name: -costs[name]):
                pending[name] = pool.submit(solve_here, name)
            solutions = {name: pending[name].result() for name in costs}
        except BaseException:  # also an interruption: what has not begun is not begun any more
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    yield from solutions.items()


@contextmanager
def one_thread() -> Iterator[None]:
    """While active, torch and the libraries under it use one thread for what this thread computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
