"""What a thread does at a sample: holds the GIL, waits for it, runs without it, or is blocked."""

from __future__ import annotations

import os
import struct

from pipeline.gil.measuring.process_memory import Memory
from pipeline.gil.sampler.thread_list import Thread

HELD, HELD_ASLEEP = "H", "h"  # h: in a system call that does not release the GIL
WAITING, WAITING_AWAKE = "W", "w"  # w: woken, but without it yet
NATIVE, BLOCKED, UNKNOWN = "N", "B", "U"
FUTEX = {"x86_64": b"202", "aarch64": b"98"}


class StateReader:
    """Classifies threads by what the kernel, and the GIL's own words, say.

    Args:
        memory: Of the measured process.
        pid: Of the measured process.
        gil: First address of the GIL's structure, and the first behind it.
        waiters: Offsets of the words in it that count waiters, each with its value at rest.
        requested: Offset in a thread state of the flag that it waits for the GIL; 0 if there is none.
    """

    def __init__(
        self,
        memory: Memory,
        pid: int,
        gil: tuple[int, int],
        waiters: list[tuple[int, int]],
        requested: int,
    ) -> None:
        self._memory, self._gil, self._waiters, self._requested = memory, gil, waiters, requested
        self._futex = FUTEX.get(os.uname().machine, b"-")
        self._turn = 0
        self.knows_calls = _can_read(f"/proc/{pid}/syscall")  # needs the right to trace
        self._file = "syscall" if self.knows_calls else "stat"

    def read(self, threads: list[Thread], holder: int, snapshot: bytes) -> dict[Thread, str]:
        """Return each thread's state.

        Args:
            threads: Whom to look at.
            holder: The thread state that holds the GIL; 0 if nobody does.
            snapshot: The GIL's structure at the same moment.
        """
        states = {thread: self._state(thread, holder) for thread in threads}
        if not self._requested and snapshot:
            self._assign_waiters(states, self._count_waiters(snapshot))
        return states

    def _state(self, thread: Thread, holder: int) -> str:
        found = self._kernel_state(thread)
        if thread.tstate == holder:
            return HELD_ASLEEP if found in (BLOCKED, WAITING) else HELD
        if self._requested and found != UNKNOWN:
            asks = self._memory.read(thread.tstate + self._requested, 4) == b"\x01\0\0\0"
            if asks:
                return WAITING_AWAKE if found == NATIVE else WAITING
            return BLOCKED if found == WAITING else found
        return found

    def _kernel_state(self, thread: Thread) -> str:
        line = thread.state_line(self._file)
        if not line:
            return UNKNOWN
        if not self.knows_calls:
            return NATIVE if line[line.rfind(b")") + 2 :][:1] == b"R" else BLOCKED
        if line.startswith(b"running"):
            return NATIVE
        words = line.split(None, 2)
        is_futex = len(words) > 1 and words[0] == self._futex
        return WAITING if is_futex and self._gil[0] <= int(words[1], 16) < self._gil[1] else BLOCKED

    def _count_waiters(self, snapshot: bytes) -> int:
        return sum(
            (struct.unpack_from("<I", snapshot, offset)[0] - idle) >> 3 for offset, idle in self._waiters
        )

    def _assign_waiters(self, states: dict[Thread, str], num_waiters: int) -> None:
        """Find the waiters that look otherwise: one just woken looks as if it ran.

        Where more threads than that look so, they take turns: right on the average, if not each time.
        """
        looks_like, is_then = (NATIVE, WAITING_AWAKE) if self.knows_calls else (BLOCKED, WAITING)
        missing = num_waiters - sum(state == WAITING for state in states.values())
        candidates = [thread for thread, state in states.items() if state == looks_like]
        self._turn += 1
        for number in range(min(missing, len(candidates))):
            states[candidates[(self._turn + number) % len(candidates)]] = is_then


def _can_read(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return bool(file.read(1))
    except OSError:
        return False
