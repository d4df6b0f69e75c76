"""Memory that processes share: anonymous, so that nothing is left behind, whoever is killed.

A file made by `memfd_create` has no name. It is freed by the kernel when the last process that has it
open or mapped is gone; it does not lie in ``/dev/shm``, whose size a container limits to 64 MB.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import weakref
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import StageError

PAGE_BYTES = mmap.ALLOCATIONGRANULARITY
HAS_SHARED_MEMORY = hasattr(os, "memfd_create")


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """A piece of a shared file, mapped here."""

    offset: int
    nbytes: int
    memory: mmap.mmap


class SlotFile:
    """Slots of shared memory on lease; it grows as they are wanted.

    A slot is free again when the last object that views its memory has died, so a batch that somebody
    keeps stays valid, and a consumer that keeps them all makes the file grow as its own memory would.

    Runs on:
        One thread leases; a lease may end on any thread, in the middle of anything: all it does is one
        append to a deque.
    """

    def __init__(self) -> None:
        self.file = os.memfd_create("batches")
        self._end = 0
        self._free: deque[Slot] = deque()
        self.num_leases = 0

    def acquire(self, nbytes: int) -> Slot:
        """Return a slot of at least so many bytes.

        Raises:
            StageError: If the machine has no memory for it.
        """
        while self._free:
            slot = self._free.pop()
            if slot.nbytes >= nbytes:
                return slot
            slot.memory.madvise(mmap.MADV_REMOVE)  # too small from now on: give its pages back
        return self._grow(-(-max(nbytes, 1) // PAGE_BYTES) * PAGE_BYTES)

    def release(self, slot: Slot) -> None:
        """Take back a slot that nobody views."""
        self._free.append(slot)

    def lend(self, slot: Slot) -> Any:
        """Return a buffer over the slot; the slot is free when the buffer and all its views are gone."""
        buffer = (ctypes.c_char * slot.nbytes).from_buffer(slot.memory)
        weakref.finalize(buffer, self._free.append, slot).atexit = False
        self.num_leases += 1
        return buffer

    def close(self) -> None:
        """Close the file; what is on lease stays valid."""
        os.close(self.file)
        self._free.clear()

    def _grow(self, nbytes: int) -> Slot:
        check_room(nbytes)
        offset, self._end = self._end, self._end + nbytes
        os.ftruncate(self.file, self._end)
        return Slot(offset, nbytes, mmap.mmap(self.file, nbytes, offset=offset))


def view_file(file: int, *, is_private: bool = False) -> mmap.mmap:
    """Map a whole file and close it; it stays as long as the mapping.

    Args:
        file: Descriptor.
        is_private: What is written to it here is seen by nobody else.
    """
    try:
        access = mmap.ACCESS_COPY if is_private else mmap.ACCESS_WRITE
        return mmap.mmap(file, os.fstat(file).st_size, access=access)
    finally:
        os.close(file)


def check_room(nbytes: int) -> None:
    """See that the machine has so much memory to give.

    Raises:
        StageError: If not; it says how much is needed and how much there is.
    """
    available = available_bytes()
    if available is not None and nbytes > available:
        raise StageError(
            f"the batches of the worker processes need {nbytes / 1e6:.0f} MB of shared memory more, but "
            f"{available / 1e6:.0f} MB are free. Lower batch_size, prefetch_depth or num_workers, or set "
            "placement=inline.",
            stage="fetch",
        )


def available_bytes() -> int | None:
    """Return the memory that is free for this process, by the machine and its control group."""
    found = [_machine_bytes(), _group_bytes()]
    return min((each for each in found if each is not None), default=None)


def _machine_bytes() -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _group_bytes() -> int | None:
    folder = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # "max", or no such control group
        limit = int((folder / "memory.max").read_text())
        used = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return limit - int(used["anon"]) - int(used["shmem"])
    return None
