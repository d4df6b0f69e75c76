"""The threads of the measured process, as the kernel and the interpreter list them."""

from __future__ import annotations

import os
import struct
import time

from pipeline.gil.measuring.process_memory import Memory

SLOT = struct.Struct("<QQQ")  # thread state, native id, stage: one row of the table of stage marks
MAX_THREADS = 4096
MAX_ENDED = 512  # threads that have ended and are kept by themselves
ENDED = -1  # takes the place of the native id of the others


class Thread:
    """One thread: its files in ``/proc`` and how long it was on a core or waited for one.

    Args:
        pid: Of the measured process.
        tid: The thread's native id.
        tstate: Address of its thread state in the interpreter.
    """

    def __init__(self, pid: int, tid: int, tstate: int) -> None:
        self.tid, self.tstate, self.slot = tid, tstate, -1
        self.folder = f"/proc/{pid}/task/{tid}"
        self.comm = ""
        self.refresh_name()
        self._state_fd = -1
        self.first_s = self.last_s = time.perf_counter()
        self.first_runnable_ns = self.last_runnable_ns = self._runnable_ns()

    @property
    def is_alive(self) -> bool:
        """Whether the kernel still knows it."""
        return os.path.exists(self.folder)

    def state_line(self, name: str) -> bytes:
        """Return what the kernel says it does now; nothing if it has ended."""
        try:
            if self._state_fd < 0:
                self._state_fd = os.open(f"{self.folder}/{name}", os.O_RDONLY)
            return os.pread(self._state_fd, 256, 0)
        except OSError:
            return b""

    def refresh(self) -> None:
        """Note how long it has been on a core or waited for one."""
        if runnable_ns := self._runnable_ns():
            self.last_runnable_ns, self.last_s = runnable_ns, time.perf_counter()

    def refresh_name(self) -> None:
        """Read its name again: threads get theirs after they have begun."""
        self.comm = self._read("comm").decode("utf-8", "replace").strip() or self.comm

    def close(self) -> None:
        """Close its files."""
        if self._state_fd >= 0:
            os.close(self._state_fd)
        self._state_fd = -1

    def _runnable_ns(self) -> int:
        words = self._read("schedstat").split()
        return int(words[0]) + int(words[1]) if len(words) >= 2 else 0

    def _read(self, name: str) -> bytes:
        try:
            with open(f"{self.folder}/{name}", "rb") as file:
                return file.read()
        except OSError:
            return b""


class ThreadList:
    """Who there is: threads that registered themselves, and those that the interpreter lists.

    The autograd engine's threads and others that were started in C never register; the
    interpreter's own list of thread states has them.

    Args:
        memory: Of the measured process.
        pid: Of the measured process.
        chain: Where the interpreter's list begins (``head``), and where in a thread state the
            ``next`` one and its ``native_id`` are; None if that could not be found out.
    """

    def __init__(self, memory: Memory, pid: int, chain: dict[str, int] | None) -> None:
        self._memory, self._pid, self._chain = memory, pid, chain
        self.by_tstate: dict[int, Thread] = {}
        self.ended: list[Thread] = []

    def refresh(self, table: bytes) -> list[Thread]:
        """Read both lists anew; return those that have ended meanwhile."""
        slots = _slots(table)
        found = dict(slots.keys()) | self._listed()  # the interpreter's own list is right where they differ
        gone = []
        for tstate, thread in [*self.by_tstate.items()]:
            thread.refresh()
            if found.get(tstate) != thread.tid or not thread.is_alive:
                thread.close()
                gone.append(self.by_tstate.pop(tstate))
        for tstate, tid in found.items():
            if tstate not in self.by_tstate and os.path.exists(f"/proc/{self._pid}/task/{tid}"):
                self.by_tstate[tstate] = Thread(self._pid, tid, tstate)
        for tstate, thread in self.by_tstate.items():
            thread.slot = slots.get((tstate, thread.tid), -1)
        self.ended.extend(gone)
        return gone

    def forget_ended(self) -> set[int]:
        """Give up the older half of the threads that have ended, if they are many; return their ids."""
        if len(self.ended) <= MAX_ENDED:
            return set()
        given_up, self.ended = self.ended[: MAX_ENDED // 2], self.ended[MAX_ENDED // 2 :]
        return {thread.tid for thread in given_up} - {thread.tid for thread in self.by_tstate.values()}

    def clear(self) -> None:
        """Forget all of them."""
        for thread in self.by_tstate.values():
            thread.close()
        self.by_tstate.clear()
        self.ended.clear()

    def _listed(self) -> dict[int, int]:
        found: dict[int, int] = {}
        if self._chain is None:
            return found
        tstate = self._memory.word(self._chain["head"])
        while tstate and tstate not in found and len(found) < MAX_THREADS:
            found[tstate] = self._memory.word(tstate + self._chain["native_id"])
            tstate = self._memory.word(tstate + self._chain["next"])
        return {tstate: tid for tstate, tid in found.items() if tid}


def table_version(table: bytes) -> int:
    """Return a number that changes when a thread registers itself; it stands in the last row."""
    return int(SLOT.unpack_from(table, len(table) - SLOT.size)[0]) if table else 0


def _slots(table: bytes) -> dict[tuple[int, int], int]:
    """Return the row of each registered thread, by thread state and native id."""
    rows = (SLOT.unpack_from(table, offset) for offset in range(0, len(table) - SLOT.size, SLOT.size))
    return {(tstate, tid): index for index, (tstate, tid, _) in enumerate(rows) if tstate}
