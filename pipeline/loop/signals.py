"""SIGTERM and Ctrl-C end a run in good order, the second one at once; SIGUSR1 asks for a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pipeline.loop.cut_off import keeping_deaths
from pipeline.loop.run import STOPPING_SIGNALS, Run

_STOPPING = tuple(signal.Signals[name] for name in STOPPING_SIGNALS)
_SAVING = getattr(signal, "SIGUSR1", None)  # not on Windows


@contextmanager
def handling_signals(run: Run) -> Iterator[None]:
    """Handle signals for the length of the block, and put the handlers back that were there.

    On another thread than the main one nothing is installed, since nothing can be; a signal that is
    ignored, as Ctrl-C is in a background job, stays so.

    Runs on:
        Main thread. A handler sets a flag, which the loop looks at after each step; the second signal
        raises KeyboardInterrupt wherever the thread is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, Any] = {}
    owner = os.getpid()

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            return  # a fork, such as a DataLoader's worker: the step under way needs it
        name = signal.Signals(number).name
        if run.asked_by in STOPPING_SIGNALS:
            put_back()
            raise KeyboardInterrupt(f"{name} after {run.asked_by}: stopped at once")
        run.interrupt(name)
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"{name}: the step under way is finished and saved. Once more stops at once.\n".encode())

    def save(number: int, frame: FrameType | None) -> None:
        if run.saver is not None:
            run.saver.is_asked = True

    wanted = dict.fromkeys(_STOPPING, stop)
    if _SAVING is not None and run.saver is not None:
        wanted[_SAVING] = save
    try:
        for number, handler in wanted.items():
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
        with keeping_deaths(run):
            yield
    finally:
        put_back()
