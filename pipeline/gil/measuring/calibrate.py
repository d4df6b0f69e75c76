"""Find out, by small experiments on this process, what the sampler needs to know of the interpreter.

No offset is written down here: each is found by looking for a value that is known, twice over, and
is left out when in doubt. Addresses are read through `Memory`, so a wrong guess is no crash.
"""

from __future__ import annotations

import ctypes
import struct
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.concurrency import Scope
from pipeline.gil.measuring.interpreter import COND_BYTES, COND_OFFSET, Gil, switch_interval, thread_state
from pipeline.gil.measuring.process_memory import Memory

HOLD_US = 3000
NUM_TRIES = 4
NUM_WORDS = 200  # of a thread state or an interpreter that are searched
NUM_INTERPRETER_WORDS = 16_384
FRAME_WORDS = 16
TAG_BITS = 7  # 3.14 tags its references
GIL_REQUESTED = {(3, 15): (30, 34)}  # where the published words have native_thread_id, gil_requested


class Parked:
    """A thread that waits, so that it can be looked at."""

    def __init__(self) -> None:
        self._is_ready, self._released = threading.Event(), threading.Lock()
        self._released.acquire()

    def run(self) -> None:
        """Note who this is, and wait."""
        self.tstate, self.tid = thread_state(), threading.get_native_id()
        self._is_ready.set()
        self.wait()

    def wait(self) -> None:
        """Wait in a function of its own, so that two frames are known."""
        self._released.acquire()

    def wait_until_ready(self) -> None:
        self._is_ready.wait()

    def release(self) -> None:
        if self._released.locked():
            self._released.release()


@contextmanager
def parked(count: int) -> Iterator[list[Parked]]:
    """Start so many waiting threads, one after the other."""
    with Scope() as scope:
        crew = []
        for _ in range(count):
            crew.append(member := Parked())
            scope.start(member.run, name="gil-calibration", stop=member.release)
            member.wait_until_ready()
        yield crew
        for member in crew:
            member.release()


def find_waiters(gil: Gil) -> list[tuple[int, int]]:
    """Find the words of the GIL's structure that count its waiters, with their values at rest.

    A thread is made to want the GIL while this one holds it, asleep in a call that does not release
    it. glibc counts the waiters of a condition variable in steps of eight.

    Returns:
        Offsets from the GIL's address, one for each condition variable; none if it was not found.
    """
    found: set[tuple[int, int]] | None = None
    for _ in range(NUM_TRIES):
        seen = _waiter_words(gil)
        found = seen if found is None else found & seen
    if not found or len(found) > 1:
        return []
    offset, idle = found.pop()
    return [(offset, idle), (offset + gil.switch_cond_offset - COND_OFFSET, idle)]


def _waiter_words(gil: Gil) -> set[tuple[int, int]]:
    hold = ctypes.PyDLL(None).usleep
    # A long interval, so that the waiter does not wake to ask again while we look.
    with parked(1) as (waiter,), switch_interval(0.05):
        before = ctypes.string_at(gil.address, gil.size_bytes)  # unlike `Memory.read`, with the GIL held
        waiter.release()
        hold(ctypes.c_uint(HOLD_US))
        during = ctypes.string_at(gil.address, gil.size_bytes)
    after = ctypes.string_at(gil.address, gil.size_bytes)
    found = set()
    for offset in range(COND_OFFSET, COND_OFFSET + COND_BYTES, 4):
        rest, held, end = (struct.unpack_from("<I", blob, offset)[0] for blob in (before, during, after))
        if rest == end and rest < 8 and held == rest + 8:
            found.add((offset, rest))
    return found


def find_chain(memory: Memory, gil: Gil) -> dict[str, int] | None:
    """Find the interpreter's list of thread states: ``head`` address, ``next``, ``native_id`` offsets.

    Two threads are started one after the other; the list has the newer one first.
    """
    for _ in range(NUM_TRIES):  # another thread may have started between the two
        with parked(2) as (older, newer):
            known = {thread_state(): threading.get_native_id()}
            known |= {older.tstate: older.tid, newer.tstate: newer.tid}
            if chain := _chain_of(memory, gil, older, newer, known):
                return chain
    return None


def _chain_of(
    memory: Memory, gil: Gil, older: Parked, newer: Parked, known: dict[int, int]
) -> dict[str, int] | None:
    bodies = {tstate: memory.words(tstate, NUM_WORDS) for tstate in known}
    native = [at for at in range(NUM_WORDS) if all(_at(bodies[t], at) == tid for t, tid in known.items())]
    following = [at for at, word in enumerate(bodies[newer.tstate]) if word == older.tstate]
    words = memory.words(gil.interpreter, NUM_INTERPRETER_WORDS)
    heads = [gil.interpreter + 8 * at for at, word in enumerate(words) if word == newer.tstate]
    for head in heads:
        for after in following:
            if native and known.items() <= _walk(memory, head, 8 * after, 8 * native[0]).items():
                return {"head": head, "next": 8 * after, "native_id": 8 * native[0]}
    return None


def _walk(memory: Memory, head: int, following: int, native_id: int) -> dict[int, int]:
    found: dict[int, int] = {}
    tstate = memory.word(head)
    while tstate and tstate not in found:
        found[tstate] = memory.word(tstate + native_id)
        tstate = memory.word(tstate + following)
    return found


def _at(words: list[int], index: int) -> int:
    return words[index] if index < len(words) else 0


def find_requested(gil: Gil, chain: dict[str, int] | None) -> int:
    """Return the published offset of a thread state's flag that it waits for the GIL; 0 before 3.15."""
    where = GIL_REQUESTED.get(sys.version_info[:2])
    if where is None or chain is None or len(gil.published) <= max(where):
        return 0
    native_id, requested = (gil.published[index] for index in where)
    return requested if native_id == chain["native_id"] else 0


def find_frames(memory: Memory) -> dict[str, Any] | None:
    """Find the way from a thread state to the name of its innermost Python function.

    Returns:
        ``hops`` from the thread state to the frame; offsets of ``code`` and ``previous`` in a frame,
        of ``qualname``, ``filename``, ``firstlineno`` in a code object, of ``text`` in a string; the
        addresses of their types. None if one of them was not found.
    """
    found = None
    for _ in range(NUM_TRIES):  # the thread may not have come to its innermost frame yet
        with parked(1) as (member,):
            found = found or _frame_offsets(memory, member.tstate)
    offsets = {**_code_offsets(memory), "code_type": id(types.CodeType), "str_type": id(str)}
    return None if found is None or None in offsets.values() else {**found, **offsets}


def _frame_offsets(memory: Memory, tstate: int) -> dict[str, Any] | None:
    inner, outer = id(Parked.wait.__code__), id(Parked.run.__code__)
    for hops, frame in _reachable(memory, tstate):
        words = memory.words(frame, FRAME_WORDS)
        code = _offset_of(words, inner)
        if code is None:
            continue
        for at, previous in enumerate(words):
            if previous and memory.word(previous + code) & ~TAG_BITS == outer:
                return {"hops": hops, "code": code, "previous": 8 * at}
    return None


def _reachable(memory: Memory, tstate: int) -> Iterator[tuple[list[int], int]]:
    """Yield what a thread state points to, and then what that points to (before 3.13 it takes two hops)."""
    words = memory.words(tstate, NUM_WORDS)
    yield from (([8 * at], word) for at, word in enumerate(words) if word)
    for at, word in enumerate(words):
        near = memory.words(word, 4) if word else []
        yield from (([8 * at, 8 * further], each) for further, each in enumerate(near) if each)


def _code_offsets(memory: Memory) -> dict[str, int | None]:
    namespace: dict[str, Any] = {}
    exec(compile("\n" * 7918 + "class A:\n def b(self): ...", "gil-calibration", "exec"), namespace)
    code = namespace["A"].b.__code__
    words, blob = memory.words(id(code), 40), memory.read(id(code), 320)
    line_at = blob.find(struct.pack("<i", code.co_firstlineno))
    text_at = memory.read(id(code.co_filename), 80).find(code.co_filename.encode())
    return {
        "qualname": _offset_of(words, id(code.co_qualname)),
        "filename": _offset_of(words, id(code.co_filename)),
        "firstlineno": line_at if line_at > 0 else None,
        "text": text_at if text_at > 0 else None,
    }


def _offset_of(words: list[int], value: int) -> int | None:
    return next((8 * at for at, word in enumerate(words) if word & ~TAG_BITS == value), None)
