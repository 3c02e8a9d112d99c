"""Matrices solved one thread each, several at a time: what is solved does not depend on how many threads there are.

Not so the largest, of which few would fit in memory at a time: they take all threads, one after the other.

LAPACK's factorizations and sums over many values differ in their last bits with the number of threads that share one; products do not.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch

TOGETHER = 2**29
"""Bytes that matrices which are solved at the same time may take; one that takes more gets all threads for itself."""

T = TypeVar("T")


def parallel_slots(working_memory: int) -> int:
    """How many matrices that take so many bytes each are solved at the same time; 0 if each takes too many to be left to one thread."""
    return min(torch.get_num_threads(), TOGETHER // max(working_memory, 1))


def solve_in_threads(costs: dict[str, float], solve: Callable[[str], T], count: int) -> Iterator[tuple[str, T]]:
    """The solution of every task, in order, each found by one thread; `count` of them at a time, the costliest first.

    With a count of 0, one after the other, each by all threads. Of several errors the first in order is raised, when the tasks that had
    begun are over.
    """
    if min(count, len(costs)) <= 1:
        for name in costs:
            with one_thread() if count else nullcontext():
                solution = solve(name)
            yield name, solution
        return

    @torch.no_grad()  # which holds for the thread that asks for it
    def alone(name: str) -> T:
        return solve(name)

    # The number of threads is each thread's own where LAPACK reads it; a new one begins with that of the environment.
    with one_thread(), ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            pending = {name: pool.submit(alone, name) for name in sorted(costs, key=lambda each: -costs[each])}
            found = {name: pending[name].result() for name in costs}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    yield from found.items()


@contextmanager
def one_thread() -> Iterator[None]:
    """While active, what torch and the libraries under it compute in this thread they compute in it alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
