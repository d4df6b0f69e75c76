"""Memory that processes share: anonymous, so that nothing is left behind, whoever is killed.

A file made by `memfd_create` has no name. It is freed by the kernel when the last process that has it
open or mapped is gone; it does not lie in ``/dev/shm``, whose size a container limits to 64 MB.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
import weakref
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import StageError

PAGE_BYTES = mmap.ALLOCATIONGRANULARITY
HAS_SHARED_MEMORY = hasattr(os, "memfd_create")


class Pinning(Protocol):
    """A device that may copy from memory of the host where it lies, once it was told."""

    def pin(self, address: int, nbytes: int) -> bool:
        """Keep memory where it is, and let the device read it; say whether that went well."""

    def unpin(self, address: int) -> None:
        """Take that back, once no copy is under way."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A piece of a shared file."""

    offset: int
    nbytes: int


class SlotFile:
    """Slots of shared memory on lease; there are more of them as they are wanted.

    A slot is free again when the last object that views its memory has died, so a batch that somebody
    keeps stays valid, and a consumer that keeps them all makes the file grow as its own memory would.

    Args:
        pinning: What `pin` uses.

    Attributes:
        num_slots: Made so far.
        can_pin: Whether `pin` does anything.

    Runs on:
        One thread acquires; a lease may end on any thread, in the middle of anything: all it does is to take
        a key out of a dict and to append to a deque.
    """

    def __init__(self, pinning: Pinning | None = None) -> None:
        self._pinning, self.can_pin, self._pinned = pinning, pinning is not None, dict[Slot, int]()
        self._pinning_lock = threading.Lock()  # whoever closes it need not be who is lent slots
        self.file, self._owner = os.memfd_create("batches"), os.getpid()
        os.ftruncate(self.file, span_bytes())
        self._memory = map_slots(self.file)
        self._free: deque[Slot] = deque()
        self._leases: dict[int, weakref.ref[Any]] = {}
        self._end = 0
        self.num_slots = 0

    def acquire(self, nbytes: int) -> Slot:
        """Return a slot of at least so many bytes.

        Raises:
            StageError: If the machine has no memory for it.
        """
        while self._free:
            slot = self._free.pop()
            if slot.nbytes >= nbytes:
                return slot
            self._drop(slot)  # too small from now on
        nbytes = -(-max(nbytes, 1) // PAGE_BYTES) * PAGE_BYTES
        check_room(nbytes)
        self.num_slots += 1
        offset, self._end = self._end, self._end + nbytes
        return Slot(offset, nbytes)

    def write(self, slot: Slot, data: bytes) -> None:
        """Write to the beginning of a slot."""
        self._memory[slot.offset : slot.offset + len(data)] = data

    def release(self, slot: Slot) -> None:
        """Take back a slot that nobody views."""
        self._free.append(slot)

    def lend(self, slot: Slot) -> Any:
        """Return a buffer over the slot; the slot is free when the buffer and all its views are gone."""
        buffer = view_slot(self._memory, slot.offset, slot.nbytes)
        leases, free = self._leases, self._free

        def end(lease: weakref.ref[Any]) -> None:
            del leases[slot.offset]
            free.append(slot)

        leases[slot.offset] = weakref.ref(buffer, end)  # a third of what `weakref.finalize` costs
        return buffer

    def close(self) -> None:
        """Let go of the memory, but for what is on lease, which stays valid, though no longer pinned.

        In a fork of the process that made it, only close the file: the pages are still the other's.
        """
        os.close(self.file)
        if os.getpid() != self._owner:
            self.can_pin = False
            return
        self.stop_pinning()
        while self._free:
            self._drop(self._free.pop())

    def pin(self, slot: Slot) -> None:
        """Pin a slot, until it is dropped or the file closed, unless it is or cannot be."""
        with self._pinning_lock:
            if not self.can_pin or slot in self._pinned:
                return
            assert self._pinning is not None
            address = ctypes.addressof(view_slot(self._memory, slot.offset, slot.nbytes))
            if self._pinning.pin(address, slot.nbytes):
                self._pinned[slot] = address
            else:
                self.can_pin = False  # once it does not, it never will

    def stop_pinning(self) -> None:
        """Let go of what is pinned, and pin nothing any more.

        Memory that stays pinned when it is unmapped would be read by its old address.
        """
        with self._pinning_lock:
            self.can_pin = False
            for slot in list(self._pinned):
                self._unpin(slot)

    def _unpin(self, slot: Slot) -> None:
        if (address := self._pinned.pop(slot, None)) is not None:
            assert self._pinning is not None
            self._pinning.unpin(address)

    def _drop(self, slot: Slot) -> None:
        with self._pinning_lock:
            self._unpin(slot)
        self._memory.madvise(mmap.MADV_REMOVE, slot.offset, slot.nbytes)


def span_bytes() -> int:
    """Return how much address space the slots of a file are given: more than could ever be filled.

    One mapping serves all of them; a page takes memory only once it is written to.
    """
    return 4 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def map_slots(file: int) -> mmap.mmap:
    """Map the file of the slots."""
    return mmap.mmap(file, span_bytes())


def view_slot(memory: mmap.mmap, offset: int, nbytes: int) -> Any:
    """Return a buffer over a slot."""
    return (ctypes.c_char * nbytes).from_buffer(memory, offset)


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
