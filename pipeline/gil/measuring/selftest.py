"""The sampler's self-test: calls whose truth is known, and what it makes of them."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import Any, TypeAlias

from pipeline.errors import GilAccountError
from pipeline.gil import marks
from pipeline.gil.measuring import calibrate
from pipeline.gil.sampler.states import HELD, HELD_ASLEEP, WAITING, WAITING_AWAKE

TEST_PERIOD_S, TEST_SAMPLES, TEST_TRIES = 0.0002, 20, 4
TEST_US = 15_000

Ask: TypeAlias = Callable[[str], dict[str, Any]]
"""Sends the sampler's process a command and returns its answer."""


def hold_gil(sleep_us: int) -> None:
    """Sleep in a call that does not release the GIL; it uses no processor time."""
    _usleep(ctypes.PyDLL)(ctypes.c_uint(sleep_us))


def release_gil(sleep_us: int) -> None:
    """Sleep in a call that releases the GIL."""
    _usleep(ctypes.CDLL)(ctypes.c_uint(sleep_us))


@functools.cache
def _usleep(library: type[ctypes.CDLL]) -> Callable[[ctypes.c_uint], int]:
    """Find it once: to look for it holds the GIL for 50 us and more, which nobody could know."""
    return library(None).usleep


def sees_waiters(ask: Ask) -> bool:
    """Check held and waiting against calls whose truth is known; return whether waiting is seen.

    Raises:
        GilAccountError: If a call that holds the GIL, or one that does not, reads otherwise.
    """
    for number in range(TEST_TRIES):
        held, released, waiting, num_samples = _measure_known_calls(ask, TEST_US << number)
        if num_samples < TEST_SAMPLES:
            continue  # the machine is busy: look longer
        if held >= 0.95 and released <= 0.05:
            return waiting >= 0.8
    raise GilAccountError(
        "the self-test failed: a call that holds the GIL reads as held for "
        f"{held:.2f} of its time, one that releases it for {released:.2f}, with {num_samples} samples"
    )


def _measure_known_calls(ask: Ask, sleep_us: int) -> tuple[float, float, float, int]:
    """Return the held share of a call that holds, of one that releases, and a waiter's share."""
    cell, before = marks.stage_cell(), marks.stage_cell()[0]
    with calibrate.parked(1) as (waiter,):
        ask("reset")  # now, so that the list of threads has this one
        try:
            cell[0] = marks.stage_id("self-test: released")
            release_gil(sleep_us)
            cell[0] = marks.stage_id("self-test: held")
            waiter.release()
            hold_gil(sleep_us)
        finally:
            cell[0] = before
    counts = ask("report")["counts"]

    def count(tid: int, stage: str, states: str) -> int:
        number = marks.stage_id(stage) if stage else 0
        return sum(c for t, s, state, _, _, c in counts if (t, s) == (tid, number) and state in states)

    # What it waited beside other threads, before the call or after it, is not the call's.
    tid, without_waiting = threading.get_native_id(), "HhNBU"
    num_held = count(tid, "self-test: held", without_waiting)
    num_released = count(tid, "self-test: released", without_waiting)
    held = count(tid, "self-test: held", HELD + HELD_ASLEEP) / max(num_held, 1)
    released = count(tid, "self-test: released", HELD + HELD_ASLEEP) / max(num_released, 1)
    waiting = count(waiter.tid, "", WAITING + WAITING_AWAKE) / max(num_held, 1)
    return held, released, waiting, min(num_held, num_released)
