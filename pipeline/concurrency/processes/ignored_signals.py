"""Signals that reach every process of a program, and are the trainer's alone to answer.

A terminal sends Ctrl-C to the whole group, and schedulers send SIGTERM (or a warning before it) to each
process of a job. The trainer decides what they mean: it finishes its step, for which it needs its workers.

A process that was started here has to be deaf from its first instruction on, while the interpreter starts:
a mask outlives `exec`, handlers do not. So it is started with the signals blocked, and then takes them with
a handler that does nothing. They are not ignored, for that would be passed on to whatever program a dataset
starts; a handler is not.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
GROUP_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


@contextmanager
def starting_deaf() -> Iterator[None]:
    """Have processes that this thread starts in the block begin with the signals blocked.

    What comes meanwhile for this process goes to another thread, or waits for the end of the block.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def become_deaf() -> None:
    """Take the signals and do nothing; runs in the process, on its main thread."""
    for number in GROUP_SIGNALS:
        signal.signal(number, _do_nothing)
        if hasattr(signal, "siginterrupt"):
            signal.siginterrupt(number, False)
    if hasattr(signal, "pthread_sigmask"):
        _unblock()


def hear_in_forks() -> None:
    """Have what this process forks be as other processes are: it may be ended with SIGTERM."""
    # Blocked meanwhile: what comes before the fork has its handlers back must not be lost.
    os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_hear)


def _block() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)


def _hear() -> None:
    for number in GROUP_SIGNALS:
        if signal.getsignal(number) is _do_nothing:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _unblock()


def _do_nothing(number: int, frame: FrameType | None) -> None:
    pass
