"""Where a thread hangs: its stage and its sample, read off its stack when it is too late to ask."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from pipeline.concurrency import Scope, stack_of, watch
from pipeline.errors import StallError, describe_stage

# The innermost of these functions on the stack says where a thread is.
_STAGES = {
    ("pipeline.data.fetch", "_samples"): "fetch",
    ("pipeline.data.fetch", "fetch"): "collate",
    ("pipeline.data.shard_fetch", "_read_to"): "fetch",
    ("pipeline.data.iterable", "_next"): "fetch",
    ("pipeline.inbound.read_ahead", "_send"): "transfer",
}


@contextmanager
def locating(find_thread: Callable[[], threading.Thread]) -> Iterator[None]:
    """Write on a StallError of the block where a thread stands.

    It costs nothing before that: the sample's index is a local variable of the function that makes it.

    Args:
        find_thread: Returns the thread that is waited for.
    """
    try:
        yield
    except StallError as error:
        if error.stage is None:
            thread = find_thread()
            error.stage, error.index = stage_of(thread)
            error.stack = stack_of(thread)
        raise


def stage_of(thread: threading.Thread) -> tuple[str | None, int | None]:
    """Return the stage that a thread is in, and the index of the sample that it makes, if any."""
    frame: FrameType | None = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        place = frame.f_globals.get("__name__"), frame.f_code.co_name
        if place in _STAGES:
            return _STAGES[place], frame.f_locals.get("index")
        frame = frame.f_back
    return None, None


def watch_loop(scope: Scope, timeout_s: float, num_steps: Callable[[], int]) -> None:
    """Show where the calling thread stands if it makes no step for so long; it is left to go on.

    For ``textbook``, where nobody waits for the loop thread and so nobody could raise an error.
    """
    thread = threading.current_thread()

    def report() -> None:
        stage, index = stage_of(thread)
        where = "" if stage is None else f" ({describe_stage(stage, index=index)})"
        text = (
            f"no step for {timeout_s:g} s{where}. textbook waits on; the loop stands at:\n{stack_of(thread)}"
        )
        print(text, file=sys.stderr, flush=True)

    watch(scope, timeout_s, num_steps, report)
