"""Memory for large batches, used again when nobody views it any more.

The memory of a large batch comes from the kernel and goes back to it with the batch: glibc keeps no freed
piece of more than 32 MB. The kernel clears each page when it is touched for the first time, and that takes
several times as long as to fill it.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections import deque
from typing import Any

import torch

MIN_BYTES = 32 << 20
MAX_FREE = 4
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class RecycledMemory:
    """Hands out large tensors, in memory of former ones.

    A piece of memory is free again when the last tensor that views it has died, so a batch that somebody
    keeps stays valid. Few free pieces are kept, and all are let go of with this object.

    Args:
        min_bytes: Smaller tensors are left to torch, whose allocator keeps their memory itself.

    Runs on:
        Any thread, several at once. A lease may end on any thread, in the middle of anything.
    """

    def __init__(self, min_bytes: int = MIN_BYTES) -> None:
        self._min_bytes = min_bytes
        self._free: deque[torch.Tensor] = deque(maxlen=MAX_FREE)
        self._leases: dict[int, weakref.ref[Any]] = {}  # by address; a weak reference must live to be told

    def __reduce__(self) -> tuple[type[RecycledMemory], tuple[int]]:
        return RecycledMemory, (self._min_bytes,)  # another process begins without any

    def takes(self, nbytes: int) -> bool:
        """Say whether a tensor of so many bytes is large."""
        return nbytes >= self._min_bytes

    def tensor(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised tensor of one element or more; its storage has no more bytes than that."""
        count = shape.numel()
        return torch.frombuffer(self._lend(count * dtype.itemsize), dtype=dtype).view(shape)

    def _lend(self, nbytes: int) -> Any:
        memory, owner = self._take(nbytes), weakref.ref(self)
        address = memory.data_ptr()
        array = memory.numpy()[:nbytes]  # keeps the memory, and is kept by the storage of a tensor made of it

        def end(lease: weakref.ref[Any]) -> None:
            if (found := owner()) is not None:
                del found._leases[address]
                found._free.append(memory)

        self._leases[address] = weakref.ref(array, end)
        return array

    def _take(self, nbytes: int) -> torch.Tensor:
        """Return a free piece that is not much too large; or a new one, in place of one that nobody took."""
        for _ in range(len(self._free)):
            with contextlib.suppress(IndexError):  # another thread was faster
                memory = self._free.popleft()
                if nbytes <= memory.nbytes <= 2 * nbytes:
                    return memory
                self._free.append(memory)
        with contextlib.suppress(IndexError):
            self._free.popleft()
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


def keep_freed_memory() -> None:
    """Have this process's allocator keep what it was given, in pieces of up to 32 MB; glibc alone.

    For large samples the same holds as for batches. In a worker process, where nobody else wants the memory.

    Source:
        mallopt(3): M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and the latter's greatest value.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
