"""Takes the samples and keeps their counts."""

from __future__ import annotations

import struct
import time
from collections import Counter, deque
from typing import Any

from pipeline.gil.measuring.process_memory import Memory
from pipeline.gil.sampler.functions import Functions
from pipeline.gil.sampler.states import UNKNOWN, WAITING, WAITING_AWAKE, StateReader
from pipeline.gil.sampler.thread_list import ENDED, SLOT, Thread, ThreadList, table_version

GIL_WORDS = struct.Struct("<QQi4xQ")  # interval (us), last holder, locked, number of switches
REFRESH_S = 0.05  # how often the list of threads is read anew
UNKNOWN_REFRESH_S = 0.01  # how often at most, if an unknown thread holds the GIL
NO_STAGE = 0


class Sampler:
    """One window after another of samples.

    Args:
        config: From the parent: ``pid``, ``memory_fd``, ``gil`` and ``gil_bytes`` (0 where there is no
            GIL to look at), ``table`` and ``table_bytes`` (of the stage marks), ``waiters``,
            ``requested``, ``chain``, ``frames``, ``max_events`` (0 keeps no trace).
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._config, self._pid = config, config["pid"]
        self._memory = memory = Memory(config["memory_fd"])
        self._gil, self._gil_bytes = config["gil"], config["gil_bytes"]
        self._threads = ThreadList(memory, self._pid, config["chain"])
        self._states = StateReader(
            memory,
            self._pid,
            (self._gil, self._gil + self._gil_bytes),
            config["waiters"],
            config["requested"],
        )
        self._functions = Functions(memory, config["frames"]) if config["frames"] else None
        self.reset()

    def reset(self) -> None:
        """Begin a new window."""
        self._counts: Counter[tuple[int, int, str, int, int]] = Counter()
        self._holders: Counter[tuple[int, int, bool]] = Counter()  # thread, code, whether main waits
        self._late_s: deque[float] = deque(maxlen=20_000)
        self._events: deque[tuple[int, int, str, int]] = deque(maxlen=self._config["max_events"])
        self._lanes: dict[int, tuple[str, int]] = {}
        self._num_samples = self._num_locked = self._num_unknown = 0
        self._began_s, self._began_cpu_s = time.perf_counter(), time.process_time()
        self._first_switches = self._last_switches = self._look()[2]
        self._threads.clear()
        self._refreshed_s, self._version = 0.0, -1

    def sample(self, late_s: float) -> None:
        """Look once, at a moment that came so much later than it was meant to."""
        now_s = time.perf_counter()
        self._late_s.append(late_s)
        holder, is_locked, self._last_switches, snapshot = self._look()
        table = self._memory.read(self._config["table"], self._config["table_bytes"])
        known = self._threads.by_tstate
        limit_s = UNKNOWN_REFRESH_S if is_locked and holder not in known else REFRESH_S
        if now_s - self._refreshed_s > limit_s or table_version(table) != self._version:
            self._refresh(now_s, table)
        states = self._states.read([*known.values()], holder if is_locked else 0, snapshot)
        self._num_samples += 1
        if is_locked:
            self._num_locked += 1
            self._num_unknown += holder not in known
            self._count_function(known.get(holder), states)
        self._count(states, table, known.get(holder) if is_locked else None)
        if self._config["max_events"]:
            self._note_events(now_s, states, table)

    def report(self) -> dict[str, Any]:
        """Return the counts of the window so far."""
        late = sorted(self._late_s) or [0.0]
        for thread in self._threads.by_tstate.values():
            thread.refresh()
            thread.refresh_name()
        everyone = [*self._threads.ended, *self._threads.by_tstate.values()]
        return {
            "num_samples": self._num_samples,
            "num_locked": self._num_locked,
            "num_unknown_holder": self._num_unknown,
            "handoffs": self._last_switches - self._first_switches,
            "wall_s": time.perf_counter() - self._began_s,
            "cpu_s": time.process_time() - self._began_cpu_s,
            "late_p50_s": late[len(late) // 2],
            "late_p99_s": late[int(len(late) * 0.99)],
            "knows_calls": self._states.knows_calls,
            "counts": [[*key, count] for key, count in self._counts.items()],
            "holders": [[*key, count] for key, count in self._holders.items()],
            "functions": self._functions.names if self._functions else {},
            "threads": [
                [t.tid, t.comm, t.last_s - t.first_s, (t.last_runnable_ns - t.first_runnable_ns) / 1e9]
                for t in everyone
            ],
        }

    def trace(self) -> dict[str, Any]:
        """Return when each thread began to do what, in microseconds since the window began."""
        end_us = int((time.perf_counter() - self._began_s) * 1e6)
        return {"events": list(self._events), "end_us": end_us}

    def _look(self) -> tuple[int, bool, int, bytes]:
        snapshot = self._memory.read(self._gil, self._gil_bytes) if self._gil else b""
        if len(snapshot) < GIL_WORDS.size:
            return 0, False, 0, b""
        _, holder, locked, switches = GIL_WORDS.unpack_from(snapshot)
        return holder, locked == 1, switches, snapshot

    def _refresh(self, now_s: float, table: bytes) -> None:
        self._refreshed_s, self._version = now_s, table_version(table)
        for thread in self._threads.refresh(table):
            if self._lanes.pop(thread.tid, None):
                self._events.append((self._us(now_s), thread.tid, UNKNOWN, NO_STAGE))
        if given_up := self._threads.forget_ended():
            self._merge_ended(given_up)

    def _merge_ended(self, given_up: set[int]) -> None:
        """Count these threads as one, so that a long run with many short threads stays small."""

        def merged(tid: int) -> int:
            return ENDED if tid in given_up else tid

        counts, self._counts = self._counts, Counter()
        for (tid, stage, state, holder, holder_stage), count in counts.items():
            self._counts[merged(tid), stage, state, merged(holder), holder_stage] += count
        holders, self._holders = self._holders, Counter()
        for (tid, code, main_waits), count in holders.items():
            self._holders[merged(tid), code, main_waits] += count

    def _count(self, states: dict[Thread, str], table: bytes, holder: Thread | None) -> None:
        """Book each thread's state with its stage, and whom a waiting one waits for."""
        blamed = (holder.tid, _stage(holder, table)) if holder else (0, NO_STAGE)
        for thread, state in states.items():
            is_waiting = state in (WAITING, WAITING_AWAKE)
            key = (thread.tid, _stage(thread, table), state, *(blamed if is_waiting else (0, NO_STAGE)))
            self._counts[key] += 1

    def _count_function(self, holder: Thread | None, states: dict[Thread, str]) -> None:
        if self._functions is None or holder is None:
            return
        if code := self._functions.top_code(holder.tstate):
            main_waits = any(
                thread.tid == self._pid and state in (WAITING, WAITING_AWAKE)
                for thread, state in states.items()
            )
            self._holders[holder.tid, code, main_waits] += 1

    def _note_events(self, now_s: float, states: dict[Thread, str], table: bytes) -> None:
        for thread, state in states.items():
            lane = (state, _stage(thread, table))
            if self._lanes.get(thread.tid) != lane:
                self._lanes[thread.tid] = lane
                self._events.append((self._us(now_s), thread.tid, *lane))

    def _us(self, now_s: float) -> int:
        return int((now_s - self._began_s) * 1e6)


def _stage(thread: Thread, table: bytes) -> int:
    offset = thread.slot * SLOT.size
    return int(SLOT.unpack_from(table, offset)[2]) if 0 <= offset < len(table) else NO_STAGE
