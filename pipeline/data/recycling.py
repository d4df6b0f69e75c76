"""Memory for large batches, used again when nobody views it any more.

The memory of a large batch comes from the kernel and goes back to it with the batch: glibc keeps no freed
piece of more than 32 MB. The kernel clears each page when it is touched for the first time, and that takes
several times as long as to fill it.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

MIN_BYTES = 32 << 20
MAX_FREE = 4
_PAGE_BYTES = 2 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@dataclass(slots=True, eq=False)
class _Block:
    memory: mmap.mmap
    nbytes: int
    lease: weakref.ref[Any] | None = None


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
        self._free: deque[_Block] = deque(maxlen=MAX_FREE)

    def __reduce__(self) -> tuple[type[RecycledMemory], tuple[int]]:
        return RecycledMemory, (self._min_bytes,)  # another process begins without any

    def tensor(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor | None:
        """Return an uninitialised tensor; None if it is small."""
        count = shape.numel()
        if (nbytes := count * dtype.itemsize) < self._min_bytes:
            return None
        return torch.frombuffer(self._lend(nbytes), dtype=dtype, count=count).view(shape)

    def _lend(self, nbytes: int) -> Any:
        block, free = self._take(nbytes), self._free
        buffer = (ctypes.c_char * block.nbytes).from_buffer(block.memory)

        def end(lease: weakref.ref[Any]) -> None:
            free.append(block)  # the block has the lease, which must not die before

        block.lease = weakref.ref(buffer, end)
        return buffer

    def _take(self, nbytes: int) -> _Block:
        """Return a free piece that is not much too large, or a new one."""
        for _ in range(len(self._free)):
            with contextlib.suppress(IndexError):  # another thread was faster
                block = self._free.popleft()
                if nbytes <= block.nbytes <= 2 * nbytes:
                    return block
                self._free.append(block)
        return _new_block(nbytes)


def _new_block(nbytes: int) -> _Block:
    nbytes = -(-nbytes // _PAGE_BYTES) * _PAGE_BYTES
    memory = mmap.mmap(-1, nbytes)
    with contextlib.suppress(OSError, AttributeError):  # fewer pages to clear, where there are large ones
        memory.madvise(mmap.MADV_HUGEPAGE)
    return _Block(memory, nbytes)


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
