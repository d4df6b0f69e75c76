"""SIGTERM and Ctrl-C end a run in good order, the second one at once; SIGUSR1 asks for a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pipeline.loop.cut_off import keeping_deaths
from pipeline.loop.run import STOPPING_SIGNALS, Run

_STOPPING = tuple(signal.Signals[name] for name in STOPPING_SIGNALS)
_SAVING = getattr(signal, "SIGUSR1", None)  # not on Windows
_ECHO_S = 1.0  # `timeout` and torchrun send what they were sent to a process that has it already


@contextmanager
def handling_signals(run: Run) -> Iterator[None]:
    """Handle signals for the length of the block, and put the handlers back that were there.

    On another thread than the main one nothing is installed, since nothing can be; a signal that is
    ignored, as Ctrl-C is in a background job, stays so.

    Runs on:
        Main thread. A handler sets a flag, which the loop looks at after each step; a second signal,
        unless it is an echo of the first, raises KeyboardInterrupt wherever the thread is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, Any] = {}
    owner, asked, asked_s = os.getpid(), "", 0.0

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked, asked_s
        if os.getpid() != owner:
            _hear_in_fork(number)
            return
        name = signal.Signals(number).name
        if not asked:
            asked, asked_s = name, time.monotonic()
            run.interrupt(name)
            os.write(2, _announcement(run, name).encode())  # not print: it may have come in one
        elif time.monotonic() - asked_s >= _ECHO_S:
            put_back()
            raise KeyboardInterrupt(f"{name} after {asked}: stopped at once")

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


def _hear_in_fork(number: int) -> None:
    """Answer in a fork of the trainer, such as a worker of somebody's pool, which is ended with SIGTERM.

    Ctrl-C it leaves to the trainer: the step under way may need it.
    """
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


def _announcement(run: Run, name: str) -> str:
    what = "all ranks stop behind the same step" if run.has_ranks else "what is under way is finished"
    if run.saver is not None:
        what += f", and saved. To go on from there, set run_dir={str(run.run_dir)!r} and resume='auto'"
        what += f" (on the command line hydra.run.dir={run.run_dir} trainer.resume=auto)"
    elif not run.has_ranks:  # of several, rank zero saves
        what += "; nothing is saved, since there is no run_dir, or enable_checkpointing is False"
    return f"{name}: {what}. Once more, after a second, stops at once.\n"
