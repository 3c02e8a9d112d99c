"""A cache for the activations between two blocks, and for what else waits until it is used again.

It keeps them in memory up to a limit. Those beyond the limit are in files, which are mapped when they are used.
"""

import itertools
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

ACTIVATIONS_IN_MEMORY = 2**28
"""Maximum number of bytes that a cache with a folder keeps in memory."""


class ActivationCache:
    """Keeps tensors until they are used again.

    Args:
        folder: the folder for the tensors that do not fit into memory. None keeps all of them in memory.
        limit: maximum number of bytes in memory, `ACTIVATIONS_IN_MEMORY` by default. Without a folder it is ignored.
        owner: rank of this process. It keeps file names apart where processes share the folder.
        temporary: whether the cache makes a temporary folder of its own once its tensors do not fit into memory.
        device: the device on which the tensors are used. They wait on the host. None if they wait and are used where
            they are when they are put in.

    Attributes:
        bytes_in_memory: bytes of the tensors that are in memory now.
    """

    def __init__(
        self,
        folder: Path | None = None,
        limit: int | None = None,
        owner: int = 0,
        temporary: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.folder = folder
        self.temporary = temporary
        self.device = device
        # The default is looked up at every call, so that the module's constant can be changed at run time.
        self.limit = ACTIVATIONS_IN_MEMORY if limit is None else limit
        self.owner = owner
        self.bytes_in_memory = 0
        self._file_numbers = itertools.count()
        self._temporary_folder: TemporaryDirectory[str] | None = None  # removed together with the cache

    def put(self, tensor: Tensor) -> "CachedTensor":
        """Store a tensor and return the handle by which it is read."""
        size = tensor.numel() * tensor.itemsize
        has_folder = self.folder is not None or self.temporary
        if not has_folder or self.bytes_in_memory + size <= self.limit:
            self.bytes_in_memory += size
            waiting = tensor if self.device is None else tensor.detach().cpu()
            return CachedTensor(self, size, waiting, self.device or tensor.device)
        if self.folder is None:
            self._temporary_folder = TemporaryDirectory(prefix="hf-lowrank-")
            self.folder = Path(self._temporary_folder.name)
        file = self.folder / f"activations-{self.owner}-{next(self._file_numbers)}.bin"
        # NumPy has no bfloat16: the file holds the bytes of any dtype.
        file.write_bytes(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        # On the meta device the tensor has its shape and dtype, and no memory.
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return CachedTensor(self, size, empty, self.device or tensor.device, file)


class CachedTensor:
    """A tensor in an `ActivationCache`. Its memory or its file is freed together with the last reference to it.

    Args:
        cache: the cache that counts its bytes.
        size: number of bytes.
        tensor: the tensor itself, or a tensor on the meta device with its shape and dtype if `file` has the values.
        device: the device on which the tensor is used.
        file: the file with the values. None if the tensor is in memory.
    """

    def __init__(
        self,
        cache: ActivationCache,
        size: int,
        tensor: Tensor,
        device: torch.device,
        file: Path | None = None,
    ) -> None:
        self._cache = cache
        self._size = size
        self._tensor = tensor
        self._file = file
        self._device = device

    @property
    def tensor(self) -> Tensor:
        """The tensor, on the device where it is used."""
        return self.waiting.to(self._device)

    @property
    def waiting(self) -> Tensor:
        """The tensor where it waits.

        A file is mapped at every access, so that it is in memory only while the result is used.
        """
        if self._file is None:
            return self._tensor
        empty = self._tensor
        # The mapping is private: a computation in place on the result does not reach the file.
        mapped = torch.from_file(str(self._file), shared=False, size=empty.numel(), dtype=empty.dtype)
        return mapped.view(empty.shape)

    def __del__(self) -> None:
        # A batch replaces its hidden states after every block, so that the old ones need no call to be given up.
        if self._file is None:
            self._cache.bytes_in_memory -= self._size
        else:
            self._file.unlink(missing_ok=True)
