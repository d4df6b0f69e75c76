"""Stage marks: one word a thread that says what it is doing, for the sampler to read.

The words lie in one table of this process. The sampler's process reads the table as it reads the
GIL; a forked process has a copy of its own, so that its marks disturb nobody. A mark is one store,
whether an account runs or not.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from array import array
from collections.abc import Callable
from contextlib import ContextDecorator
from types import TracebackType
from typing import Any

from pipeline.gil.measuring.interpreter import thread_state
from pipeline.gil.sampler.sampler import NO_STAGE

MAX_MARKED_THREADS = 256
MAX_NAMES = 4096  # of threads, those that have ended too
ROW_WORDS = 3  # thread state, native id, stage: `SLOT` in sampler/thread_list.py

# The last row is of threads that found no other. Its first word counts registrations, by which the
# sampler sees at once that there is a new thread.
table = array("Q", bytes(8 * ROW_WORDS * (MAX_MARKED_THREADS + 1)))
VERSION_AT = ROW_WORDS * MAX_MARKED_THREADS
stage_names: dict[int, str] = {}
thread_names: dict[int, str] = {}  # native id to name, of marked threads
_stage_ids: dict[str, int] = {}
_rows: dict[int, int] = {}  # native id to row
_table_pid = os.getpid()
_numbers = itertools.count(1)
_lock = threading.Lock()
on_change: Callable[[int], None] | None = None  # told of the stage that a block leaves, if any


def stage_id(name: str) -> int:
    """Return the number of a stage, the same for the same name."""
    with _lock:
        if name not in _stage_ids:
            _stage_ids[name] = number = next(_numbers)
            stage_names[number] = name
        return _stage_ids[name]


def forget_forked_threads() -> None:
    """In a process that was forked, give the rows of its parent's threads back."""
    global _marks, _table_pid
    if _table_pid != os.getpid():
        _table_pid = os.getpid()
        _rows.clear()
        for row in range(MAX_MARKED_THREADS):
            table[ROW_WORDS * row] = 0
        _marks = _Marks()


def _register(tid: int, tstate: int) -> int:
    """Give a thread a row, that of one which has ended if need be."""
    with _lock:
        thread_names[tid] = next((t.name for t in threading.enumerate() if t.native_id == tid), "")
        if len(thread_names) > MAX_NAMES:
            for ended in [tid for tid in thread_names if tid not in _rows][: MAX_NAMES // 2]:
                del thread_names[ended]
        for other, row in [*_rows.items()]:
            if other == tid or table[ROW_WORDS * row] == tstate:  # of a thread that has ended
                table[ROW_WORDS * row] = 0
                del _rows[other]
        if len(_rows) == MAX_MARKED_THREADS:
            _forget_ended_threads()
        free = set(range(MAX_MARKED_THREADS)) - set(_rows.values())
        if not free:
            return MAX_MARKED_THREADS  # its marks go nowhere: the account has it without stages
        _rows[tid] = row = min(free)
        table[ROW_WORDS * row + 2] = NO_STAGE
        table[ROW_WORDS * row + 1] = tid
        table[ROW_WORDS * row] = tstate  # last but one: it makes the row count
        table[VERSION_AT] += 1
        return row


def _forget_ended_threads() -> None:
    with contextlib.suppress(OSError):  # no /proc: then there is no sampler either
        alive = set(map(int, os.listdir("/proc/self/task")))
        for tid in _rows.keys() - alive:
            table[ROW_WORDS * _rows.pop(tid)] = 0


class _Marks(threading.local):
    """Where the calling thread's stage stands in the table, and the stages around the present one."""

    def __init__(self) -> None:
        row = _register(threading.get_native_id(), thread_state())
        self.row: tuple[int, list[int]] = (ROW_WORDS * row + 2, [])


_marks = _Marks()


def stage_cell() -> memoryview:
    """Return the calling thread's stage word, for the cheapest mark: ``cell[0] = stage_id("collate")``.

    Runs on:
        The thread that is to be marked; a mark is one store, some 40 ns.
    """
    return memoryview(table)[_marks.row[0] : _marks.row[0] + 1]


class stage(ContextDecorator):  # noqa: N801  (it is called like a function)
    """Mark what a block, or a function, is doing; blocks may nest.

        collating = stage("collate")
        with collating:
            batch = collate(samples)

    Make it once and enter it often; one object may be used by several threads at a time. A block must
    not contain a ``yield`` or an ``await``: the thread would keep the stage, and another may leave it.

    Args:
        name: As the account will list it.

    Runs on:
        Any thread; with or without an account, entering and leaving cost some 0.3 µs more than an
        empty `with` of Python.
    """

    def __init__(self, name: str) -> None:
        self.name, self._id = name, stage_id(name)

    def __enter__(self) -> stage:
        at, outer = _marks.row
        outer.append(table[at])
        if on_change is not None:
            on_change(table[at])
        table[at] = self._id
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        at, outer = _marks.row
        if on_change is not None:
            on_change(table[at])
        table[at] = outer.pop() if outer else NO_STAGE  # a generator may have come from another thread

    def _recreate_cm(self) -> Any:
        return self

    def __reduce__(self) -> tuple[type[stage], tuple[str]]:
        return stage, (self.name,)  # another process numbers its stages anew
