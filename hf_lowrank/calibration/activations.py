"""Where activations wait between two blocks: in memory up to a limit, the others in files that are mapped while they are used."""

import itertools
from pathlib import Path

import torch
from torch import Tensor

ACTIVATIONS_IN_MEMORY = 2**28
"""Bytes that wait in memory where there is a folder for more."""


class ActivationCache:
    """Room for tensors that wait.

    Args:
        folder: where files go; None keeps everything in memory.
        limit: bytes that may wait in memory; `ACTIVATIONS_IN_MEMORY` by default.
        owner: the number of the process, of those that share the folder.
    """

    def __init__(self, folder: Path | None = None, limit: int | None = None, owner: int = 0) -> None:
        self.folder, self.limit, self.owner = folder, ACTIVATIONS_IN_MEMORY if limit is None else limit, owner
        self.held = 0
        self._numbers = itertools.count()

    def put(self, tensor: Tensor) -> "CachedTensor":
        """A tensor on the cache."""
        size = tensor.numel() * tensor.itemsize
        if self.folder is None or self.held + size <= self.limit:
            self.held += size
            return CachedTensor(self, size, tensor)
        file = self.folder / f"activations-{self.owner}-{next(self._numbers)}.bin"
        file.write_bytes(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return CachedTensor(self, size, torch.empty_like(tensor, device="meta"), file, tensor.device)


class CachedTensor:
    """A tensor on a cache; its place is free again when nobody holds it."""

    def __init__(
        self,
        cache: ActivationCache,
        size: int,
        tensor: Tensor,
        file: Path | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._shelf, self._size, self._tensor, self._file, self._device = cache, size, tensor, file, device

    @property
    def tensor(self) -> Tensor:
        """The tensor; of one that waits in a file, a view of the file that is in memory only while it is used."""
        if self._file is None:
            return self._tensor
        empty = self._tensor
        mapped = torch.from_file(str(self._file), shared=False, size=empty.numel(), dtype=empty.dtype)
        return mapped.view(empty.shape).to(self._device or "cpu")

    def __del__(self) -> None:
        if self._file is None:
            self._shelf.held -= self._size
        else:
            self._file.unlink(missing_ok=True)
