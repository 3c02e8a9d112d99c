"""The processes that work on one run: who does what, sums over all of them, and results that one sends to the others.

Every process holds the model, or the block of it that is being compressed. The calibration batches are split over the
processes. Each matrix of a block is solved by one process. The main process does what only one process may do, such
as writing files or asking for text. `ProcessGroup` is a single process, for which all of this is trivial.
`TorchProcessGroup` is the default group of torch.distributed.
"""

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
from .torchrun import RemoteError, distributed_backends, first_sentence
from .work_folder import Record, WorkFolder

COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""How long a process waits for another, which may be solving its largest matrix. One that ends is noticed at once."""

LARGEST_FUSED_TENSOR = 2**17
"""Maximum number of values of a tensor that is summed together with others, in one message instead of one for each."""

CPU = torch.device("cpu")

T = TypeVar("T")


class ProcessGroup:
    """The processes that work on a run. This class is the case of a single process.

    Attributes:
        rank: number of this process.
        size: number of processes.
    """

    rank = 0
    size = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, which writes files and prints."""
        return self.rank == 0

    def split(self, items: Sequence[T]) -> list[T]:
        """Return the items that this process works on, of a list that all have: every `size`-th from `rank` on."""
        # In turn, so that no process has more than one item more than another, and long and short ones mix.
        return list(items[self.rank :: self.size])

    def gather(self, value: T) -> list[T]:
        """Return a small value of every process, in the order of their ranks, on every process."""
        return [value]

    def broadcast(self, find: Callable[[], T]) -> T:
        """Run `find` on the main process and return its result on every process. An exception is raised everywhere."""
        return find()

    def all_reduce(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Replace each tensor by its sum over the processes. A process that lacks a name adds nothing to that sum."""
        return tensors

    def map_balanced(
        self,
        costs: dict[str, float],
        solve: Callable[[str], T],
        pack: Callable[[T], Record],
        unpack: Callable[[str, Record], T],
        threads: int,
    ) -> Iterator[tuple[str, T]]:
        """Yield the solution of every task, in order, on every process. An exception is raised everywhere.

        Each task is solved by one thread of one process, which sends the solution to the others.

        Args:
            costs: cost of each task by its name, in any unit.
            solve: returns the solution of a task.
            pack: returns the record in which a solution is sent.
            unpack: returns the solution that a task's record holds.
            threads: maximum number of tasks that a process works on at a time.
        """
        return solve_in_threads(costs, solve, threads)

    def gather_to_main(self, records: Sequence[Record], count: int) -> Iterator[Record]:
        """Yield the records of all `count` items in order, on the main process only.

        Args:
            records: one record for each item that `split` gives this process.
        """
        return iter(records)

    def scatter(self, find: Callable[[], list[Record]]) -> list[Record]:
        """Run `find` on the main process and return to each process the records that `split` gives it."""
        return find()

    def work_folder(self, path: str | Path) -> WorkFolder:
        """Return the run's work folder."""
        return WorkFolder(path)


SINGLE_PROCESS = ProcessGroup()


class TorchProcessGroup(ProcessGroup):
    """The processes of torch.distributed's default group.

    Args:
        device: device of this process's tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.device = device
        # A group of its own, because the default one may serve one kind of device only, and gives up sooner.
        with self._one_line_errors():
            self._group: Any = dist.new_group(backend=distributed_backends(), timeout=COLLECTIVE_TIMEOUT)

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        with self._one_line_errors():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def broadcast(self, find: Callable[[], T]) -> T:
        value, error = _attempt(find) if self.is_main else (None, None)
        # A failure is sent, too. Otherwise the other processes would wait for a result until the timeout.
        value, message = self._broadcast_object((value, _message(error)))
        if error is not None:
            raise error
        if message is not None:
            raise RemoteError(message)
        return value  # type: ignore[return-value]  # without an error there is a value

    def all_reduce(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        # All processes must make the same calls in the same order, so they first agree on what there is to sum.
        layouts = self._layouts_of_all(tensors)
        fused: dict[tuple[torch.dtype, str], list[str]] = {}
        for name, (shape, dtype, device_type) in layouts.items():
            if name not in tensors:
                tensors[name] = torch.zeros(shape, dtype=dtype, device=self._local_device(device_type))
            # The time of a small message is latency, so small tensors of one kind travel as one.
            if shape.numel() <= LARGEST_FUSED_TENSOR:
                fused.setdefault((dtype, device_type), []).append(name)
            else:
                tensors[name] = self._all_reduce_tensor(tensors[name].contiguous())
        for names in fused.values():
            flat = self._all_reduce_tensor(torch.cat([tensors[name].flatten() for name in names]))
            parts = flat.split([tensors[name].numel() for name in names])
            for name, part in zip(names, parts, strict=True):
                tensors[name] = part.view(layouts[name][0])
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
        own_costs = {name: cost for name, cost in costs.items() if owners[name] == self.rank}

        # An error is kept until it is the task's turn, so that all processes raise the same one.
        def attempt(name: str) -> tuple[T | None, Exception | None]:
            return _attempt(partial(solve, name))

        own_results = dict(solve_in_threads(own_costs, attempt, threads))
        # Every process goes through all tasks in the same order, so each send meets its receives.
        for name, owner in owners.items():
            if owner != self.rank:
                yield name, unpack(name, self._receive_record(owner))
                continue
            solution, error = own_results.pop(name)
            if error is not None:
                self._broadcast_object(_message(error), owner)
                raise error
            assert solution is not None
            self._send_record(pack(solution))
            yield name, solution

    def gather_to_main(self, records: Sequence[Record], count: int) -> Iterator[Record]:
        for position in range(count):
            owner = position % self.size
            if owner == self.rank:
                record = records[position // self.size]  # the inverse of `split`
                if self.is_main:
                    yield record
                else:
                    self._send_record(record, target=0)
            elif self.is_main:
                yield self._receive_record(owner, target=0)

    def scatter(self, find: Callable[[], list[Record]]) -> list[Record]:
        all_records: list[Record] = []

        def find_and_count() -> int:
            all_records.extend(find())
            return len(all_records)

        own_records = []
        for position in range(self.broadcast(find_and_count)):
            target = position % self.size
            if self.is_main and target == 0:
                own_records.append(all_records[position])
            elif self.is_main:
                self._send_record(all_records[position], target)
            elif target == self.rank:
                own_records.append(self._receive_record(source=0, target=target))
        return own_records

    def broadcast_record(self, find: Callable[[], Record | None]) -> Record | None:
        """Run `find` on the main process and return the record, or None, on every process, as `broadcast` does."""
        record: Record | None = None

        def find_and_tell() -> bool:
            nonlocal record
            record = find()
            return record is not None

        if not self.broadcast(find_and_tell):
            return None
        if record is None:
            return self._receive_record(source=0)
        self._send_record(record)
        return record

    def work_folder(self, path: str | Path) -> WorkFolder:
        return _SharedWorkFolder(path, self)

    def _layouts_of_all(self, tensors: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype, str]]:
        """Return the shape, dtype and device type of every tensor that any process has, by name."""
        own = {name: (tensor.shape, tensor.dtype, tensor.device.type) for name, tensor in tensors.items()}
        layouts = {}
        for of_one_process in self.gather(own):
            layouts.update(of_one_process)
        return layouts

    def _all_reduce_tensor(self, tensor: Tensor) -> Tensor:
        with self._one_line_errors():
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def _broadcast_object(self, value: T, source: int = 0) -> T:
        """Return a small value of the process `source` on every process."""
        box = [value]
        with self._one_line_errors():
            dist.broadcast_object_list(box, group=self._group, src=source, device=CPU)
        return box[0]

    def _send_record(self, record: Record, target: int | None = None) -> None:
        """Send a record to one process, or to all without a target. The receivers call `_receive_record`."""
        tensors = {name: tensor.detach().contiguous() for name, tensor in record.tensors.items()}
        layouts = [(name, tensor.shape, tensor.dtype, tensor.device.type) for name, tensor in tensors.items()]
        header = (layouts, record.facts)  # tells the others how much memory to allocate
        if target is None:
            self._broadcast_object(header, self.rank)
        else:
            with self._one_line_errors():
                dist.send_object_list([header], group=self._group, dst=target, device=CPU)
        for tensor in tensors.values():
            self._transfer_bytes(tensor, self.rank, target)

    def _receive_record(self, source: int, target: int | None = None) -> Record:
        """Return the record that the process `source` sends to this process alone (its `target`), or to all.

        Raises:
            RemoteError: if the other process sends an error message in place of the record.
        """
        box: list[Any] = [None]
        if target is None:
            box = [self._broadcast_object(None, source)]
        else:
            with self._one_line_errors():
                dist.recv_object_list(box, group=self._group, src=source, device=CPU)
        (header,) = box
        if isinstance(header, str):  # in place of a record, `map_balanced` sends the message of an error
            raise RemoteError(header)
        layouts, facts = header
        tensors = {}
        for name, shape, dtype, device_type in layouts:
            tensors[name] = torch.empty(shape, dtype=dtype, device=self._local_device(device_type))
            self._transfer_bytes(tensors[name], source, target)
        return Record(tensors, facts)

    def _transfer_bytes(self, tensor: Tensor, source: int, target: int | None) -> None:
        """Send the bytes of a contiguous tensor from the process `source`, or receive them into it there."""
        if not tensor.numel():
            return
        data = tensor.reshape(-1).view(torch.uint8)  # as bytes, because not every back end knows every dtype
        with self._one_line_errors():
            if target is None:
                dist.broadcast(data, group=self._group, src=source)
            elif self.rank == source:
                dist.send(data, group=self._group, dst=target)
            else:
                dist.recv(data, group=self._group, src=source)

    def _local_device(self, device_type: str) -> torch.device:
        """Return this process's device of a type, for a tensor that another process has on such a device."""
        return self.device if device_type == self.device.type else torch.device(device_type)

    @contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        """Turn errors of the communication between the processes into one line that names the cure."""
        try:
            yield
        except RuntimeError as error:
            raise CompressionError(
                f"another of the {self.size} processes ended or cannot be reached ({first_sentence(error)}); "
                "it said why if it could; "
                "the same command goes on from what is finished in its work folder, if it has one"
            ) from error


class _SharedWorkFolder(WorkFolder):
    """A work folder that only the main process reads and writes. The other processes receive its content."""

    def __init__(self, path: str | Path, group: TorchProcessGroup) -> None:
        self.path = Path(path)
        self.group = group
        group.broadcast(lambda: super(_SharedWorkFolder, self).__init__(path))

    def __exit__(self, *error: object) -> None:
        if self.group.is_main:
            super().__exit__(*error)

    def claim(self, identity: dict[str, Any]) -> None:
        self.group.broadcast(lambda: super(_SharedWorkFolder, self).claim(identity))

    def read(self, name: str) -> Record | None:
        return self.group.broadcast_record(lambda: self.read_here(name))

    def write(self, name: str, record: Record) -> None:
        self.group.broadcast(lambda: super(_SharedWorkFolder, self).write(name, record))

    # Nothing waits for what these remove, so the other processes need not know.

    def discard(self, name: str) -> None:
        if self.group.is_main:
            super().discard(name)

    def finish(self) -> None:
        self.group.broadcast(super().finish)

    def clear(self) -> None:
        if self.group.is_main:
            super().clear()


def balanced(costs: dict[str, float], size: int) -> dict[str, int]:
    """Return the rank of the process, out of `size`, that solves each task.

    The costliest task is assigned first, and each one to the process with the least to do so far. Over all tasks, no
    process has more than the even share and one task.
    """
    load = [0.0] * size
    owners = {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        owners[name] = load.index(min(load))  # of several, the first, so that all processes decide alike
        load[owners[name]] += costs[name]
    return {name: owners[name] for name in costs}  # in the order of the tasks again


def current_process_group(device: torch.device | None = None) -> ProcessGroup:
    """Return torch.distributed's default group if it has several processes, or else this process alone.

    Args:
        device: device of this process's tensors, the CPU by default.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return SINGLE_PROCESS
    return TorchProcessGroup(device or CPU)


def _attempt(find: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Return the result of a call and None, or None and the exception that it raised."""
    try:
        return find(), None
    except Exception as error:  # whatever it is, the other processes must learn of it
        return None, error


def _message(error: Exception | None) -> str | None:
    """Return the message that the other processes raise for an error of this one, or None without an error."""
    if error is None:
        return None
    if isinstance(error, CompressionError):
        return str(error)
    return f"{type(error).__name__}: {error}"
