"""Many processes on one run: who does what, sums over all of them, and what one finds given to the others.

Every process holds the model, or the block of it that is in its turn. The calibration batches are dealt to the processes, the matrices of
a block are solved by one process each, and what a process alone may do (write, ask for text) is done by the first. `ProcessGroup` is one process
by itself, for which all of that is nothing; `TorchProcessGroup` are those of torch.distributed's process group.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..runtime.errors import CompressionError
from .threads import solve_in_threads
from .work_folder import Record, WorkFolder

COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""How long a process waits for another, which may be solving its largest matrix; one that ends is noticed at once."""
STARTUP_TIMEOUT = timedelta(minutes=5)
"""How long the processes may take to start."""

SMALL = 2**17
"""Values; tensors of no more are summed together."""

T = TypeVar("T")


class RemoteError(CompressionError):
    """What another process of the run raised, and reports."""


class ProcessGroup:
    """The processes that work on a run; here one, which is by itself.

    Attributes:
        rank: which this process is. size: how many there are.
    """

    rank, size = 0, 1

    @property
    def is_main(self) -> bool:
        """Whether this is the first process, the one that writes and speaks."""
        return self.rank == 0

    def split(self, items: Sequence[T]) -> list[T]:
        """The items that this process works on, of a list that all have: they are dealt in turn."""
        return list(items[self.rank :: self.size])

    def gather(self, value: T) -> list[T]:
        """A small value of every process, by rank."""
        return [value]

    def broadcast(self, find: Callable[[], T]) -> T:
        """What the first process finds; what it raises, all raise."""
        return find()

    def all_reduce(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the processes by name, in place; a process that lacks a name adds nothing to it."""
        return tensors

    def map_balanced(
        self,
        costs: dict[str, float],
        solve: Callable[[str], T],
        pack: Callable[[T], Record],
        unpack: Callable[[str, Record], T],
        threads: int,
    ) -> Iterator[tuple[str, T]]:
        """The solution of every task, in order, each found by one thread of one process and given to all; what it raises, all raise.

        Args:
            costs: by the name of the task, in any unit.
            pack, unpack: a solution as a record, in which it travels, and the solution that a task's record holds.
            threads: how many tasks a process may work on at a time.
        """
        return solve_in_threads(costs, solve, threads)

    def gather_to_main(self, records: Sequence[Record], count: int) -> Iterator[Record]:
        """The records that belong to the items of `split`, for all `count` items in order; at the first process only."""
        return iter(records)

    def scatter(self, find: Callable[[], list[Record]]) -> list[Record]:
        """Of the records that the first process finds, one for each item of a list, those of the items that `split` gives this one."""
        return find()

    def work_folder(self, path: str | Path) -> WorkFolder:
        """The run's work folder."""
        return WorkFolder(path)


SINGLE_PROCESS = ProcessGroup()


class TorchProcessGroup(ProcessGroup):
    """The processes of the default process group.

    Args:
        device: where this one's tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device
        with self._talking():
            self._group: Any = dist.new_group(backend=_backends(), timeout=COLLECTIVE_TIMEOUT)

    def gather(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        with self._talking():
            dist.all_gather_object(found, value, group=self._group)
        return found

    def broadcast(self, find: Callable[[], T]) -> T:
        value, error = _attempt(find) if self.is_main else (None, None)
        value, told = self._tell((value, _reason(error)))
        if error is not None:
            raise error
        if told is not None:
            raise RemoteError(told)
        return value  # type: ignore[return-value]  # an error, if there is no value

    def all_reduce(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        known = self.gather(
            {name: (tensor.shape, tensor.dtype, tensor.device.type) for name, tensor in tensors.items()}
        )
        shapes = {name: shape for each in known for name, shape in each.items()}
        small: dict[tuple[torch.dtype, str], list[str]] = {}
        for name, (shape, dtype, kind) in shapes.items():
            if name not in tensors:
                tensors[name] = torch.zeros(shape, dtype=dtype, device=self._place(kind))
            if shape.numel() <= SMALL:
                small.setdefault((dtype, kind), []).append(name)
            else:
                tensors[name] = self._add_up(tensors[name].contiguous())
        for names in small.values():
            flat = self._add_up(torch.cat([tensors[name].flatten() for name in names]))
            parts = flat.split([tensors[name].numel() for name in names])
            tensors |= {name: part.view(shapes[name][0]) for name, part in zip(names, parts, strict=True)}
        return tensors

    def map_balanced(
        self,
        costs: dict[str, float],
        solve: Callable[[str], T],
        pack: Callable[[T], Record],
        unpack: Callable[[str, Record], T],
        threads: int,
    ) -> Iterator[tuple[str, T]]:
        owners = balanced(costs, self.size)
        mine = {name: cost for name, cost in costs.items() if owners[name] == self.rank}
        own = dict(solve_in_threads(mine, lambda name: _attempt(partial(solve, name)), threads))
        for name, owner in owners.items():
            if owner != self.rank:
                yield name, unpack(name, self._passed(None, owner))
                continue
            solution, error = own.pop(name)
            if error is not None:
                self._tell(_reason(error), owner)
                raise error
            assert solution is not None
            self._passed(pack(solution), owner)
            yield name, solution

    def gather_to_main(self, records: Sequence[Record], count: int) -> Iterator[Record]:
        for position in range(count):
            owner, place = position % self.size, position // self.size
            if owner == 0 and self.is_main:
                yield records[place]
            elif self.rank in (0, owner):
                record = self._passed(records[place] if owner == self.rank else None, owner, 0)
                if self.is_main:
                    yield record

    def scatter(self, find: Callable[[], list[Record]]) -> list[Record]:
        records: list[Record] = []

        def count() -> int:
            records.extend(find())
            return len(records)

        found = []
        for position in range(self.broadcast(count)):
            record, target = records[position] if self.is_main else None, position % self.size
            if target != 0 and self.rank in (0, target):
                record = self._passed(record, 0, target)
            if target == self.rank:
                assert record is not None
                found.append(record)
        return found

    def record(self, find: Callable[[], Record | None]) -> Record | None:
        """A record that the first process finds, given to all; None if it finds none."""
        record: Record | None = None

        def there() -> bool:
            nonlocal record
            record = find()
            return record is not None

        return self._passed(record, 0) if self.broadcast(there) else None

    def work_folder(self, path: str | Path) -> WorkFolder:
        return _SharedWorkFolder(path, self)

    def _add_up(self, tensor: Tensor) -> Tensor:
        with self._talking():
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def _tell(self, value: T, source: int = 0) -> T:
        """A small value of one process, at all."""
        box = [value]
        with self._talking():
            dist.broadcast_object_list(box, group=self._group, src=source, device=torch.device("cpu"))
        return box[0]

    def _passed(self, record: Record | None, source: int, target: int | None = None) -> Record:
        """A record of one process, at all of them or at one.

        Raises:
            RemoteError: with the reason that the other process tells in its place.
        """
        sends = self.rank == source
        sent = (
            {} if record is None else {name: tensor.detach().contiguous() for name, tensor in record.tensors.items()}
        )
        shapes = [(name, tensor.shape, tensor.dtype, tensor.device.type) for name, tensor in sent.items()]
        header: Any = None if record is None else (shapes, record.facts)
        if target is None:
            header = self._tell(header, source)
        else:
            box = [header]
            with self._talking():
                if sends:
                    dist.send_object_list(box, group=self._group, dst=target, device=torch.device("cpu"))
                else:
                    dist.recv_object_list(box, group=self._group, src=source, device=torch.device("cpu"))
            header = box[0]
        if isinstance(header, str):
            raise RemoteError(header)
        shapes, facts = header
        tensors = (
            sent
            if sends
            else {
                name: torch.empty(shape, dtype=dtype, device=self._place(kind)) for name, shape, dtype, kind in shapes
            }
        )
        for tensor in tensors.values():
            if tensor.numel():
                data = tensor.reshape(-1).view(torch.uint8)
                with self._talking():
                    if target is None:
                        dist.broadcast(data, group=self._group, src=source)
                    elif sends:
                        dist.send(data, group=self._group, dst=target)
                    else:
                        dist.recv(data, group=self._group, src=source)
        return Record(tensors, facts)

    def _place(self, kind: str) -> torch.device:
        return self.device if kind == self.device.type else torch.device(kind)

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """What goes wrong between processes, as one line."""
        try:
            yield
        except RuntimeError as error:
            raise CompressionError(
                f"another of the {self.size} processes ended or cannot be reached ({_first_sentence(error)}); it said why if it could; "
                "the same command goes on from what is finished in its work folder, if it has one"
            ) from error


class _SharedWorkFolder(WorkFolder):
    """A work folder in the hands of the first process, the only one that sees it; the others are told what it holds."""

    def __init__(self, path: str | Path, group: TorchProcessGroup) -> None:
        self.path, self.group = Path(path), group
        group.broadcast(lambda: super(_SharedWorkFolder, self).__init__(path))

    def __exit__(self, *error: object) -> None:
        if self.group.is_main:
            super().__exit__(*error)

    def claim(self, identity: dict[str, Any]) -> None:
        self.group.broadcast(lambda: super(_SharedWorkFolder, self).claim(identity))

    def read(self, name: str) -> Record | None:
        return self.group.record(lambda: self.read_here(name))

    def write(self, name: str, record: Record) -> None:
        self.group.broadcast(lambda: super(_SharedWorkFolder, self).write(name, record))

    def discard(self, name: str) -> None:
        if self.group.is_main:
            super().discard(name)

    def finish(self) -> None:
        self.group.broadcast(super().finish)

    def clear(self) -> None:
        if self.group.is_main:
            super().clear()


def balanced(costs: dict[str, float], size: int) -> dict[str, int]:
    """Which of `size` processes does which task: the costliest first, each to the one with the least to do."""
    load = [0.0] * size
    owners = {}
    for name in sorted(costs, key=lambda each: -costs[each]):
        owners[name] = load.index(min(load))
        load[owners[name]] += costs[name]
    return {name: owners[name] for name in costs}


def current_process_group(device: torch.device | None = None) -> ProcessGroup:
    """The processes of the default process group, if there is one of several; else this process by itself.

    Args:
        device: where this one's tensors are; the CPU by default.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return SINGLE_PROCESS
    return TorchProcessGroup(device or torch.device("cpu"))


@contextmanager
def torchrun_group() -> Iterator[None]:
    """While active, this process belongs to the group that `torchrun` or `accelerate launch` started it in, if one did.

    Each process on a machine takes the accelerator of its number there.
    """
    if torchrun_rank() is None:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        dist.init_process_group(_backends(), timeout=STARTUP_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise CompressionError(
            f"the {os.environ['WORLD_SIZE']} processes that the environment tells of (WORLD_SIZE) did not come together "
            f"({_first_sentence(error)}); start all of them by torchrun, or unset WORLD_SIZE to work with one"
        ) from error
    yield
    dist.destroy_process_group()  # not after an error: it would wait for those that are gone


def torchrun_rank() -> int | None:
    """This process's number among those that `torchrun` or `accelerate launch` started; None if it was started by itself."""
    several = (
        int(os.environ.get("WORLD_SIZE", "1")) > 1
        and {"RANK", "MASTER_ADDR"} <= os.environ.keys()
        and dist.is_available()
    )
    return int(os.environ["RANK"]) if several else None


def _backends() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"


def _attempt(find: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return find(), None
    except Exception as error:  # whatever it is, the other processes must hear of it
        return None, error


def _first_sentence(error: Exception) -> str:
    """What torch.distributed says, without the place in its code and its advice."""
    return re.sub(r"^\[\S*\] ", "", str(error)).split(". ")[0].strip()


def _reason(error: Exception | None) -> str | None:
    return (
        None
        if error is None
        else str(error)
        if isinstance(error, CompressionError)
        else f"{type(error).__name__}: {error}"
    )
