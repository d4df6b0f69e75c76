"""Where a thread hangs: its stage and its sample, read off its stack when it is too late to ask."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pipeline.concurrency import Channel, stack_of
from pipeline.errors import StallError

# The innermost of these functions on the stack says where a thread is.
_STAGES = {
    ("pipeline.data.fetch", "_samples"): "fetch",
    ("pipeline.data.fetch", "fetch"): "collate",
    ("pipeline.data.iterable", "_next"): "fetch",
    ("pipeline.loop.prefetch", "_send"): "transfer",
}


@contextmanager
def locating(threads: Sequence[threading.Thread], channel: Channel[Any]) -> Iterator[None]:
    """Write on a StallError of the block where the thread stands that makes what the channel waits for.

    It costs nothing before that: sample and position are local variables of the functions on its stack.
    """
    try:
        yield
    except StallError as error:
        if error.stage is None:
            blamed = [each for each in threads if position_of(each) == channel.position] or threads[:1]
            error.stage, error.index = stage_of(blamed[0])
            error.stack = stack_of(blamed[0])
        raise


def stage_of(thread: threading.Thread) -> tuple[str | None, int | None]:
    """Return the stage that a thread is in, and the index of the sample that it makes, if any."""
    for frame in _frames(thread):
        place = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if place in _STAGES:
            return _STAGES[place], frame.f_locals.get("index")
    return None, None


def position_of(thread: threading.Thread) -> int | None:
    """Return the position in the epoch of the batch that a thread makes, if it makes one."""
    for frame in _frames(thread):
        if frame.f_code.co_name == "_fill":
            return frame.f_locals.get("position")
    return None


def _frames(thread: threading.Thread) -> Iterator[FrameType]:
    frame: FrameType | None = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        yield frame
        frame = frame.f_back
