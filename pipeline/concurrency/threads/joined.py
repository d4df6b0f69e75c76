"""A nursery for threads: what is started inside the `with` has ended when the block is left."""

from __future__ import annotations

import contextvars
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from types import TracebackType

from pipeline.errors import StallError

_HURRIED_JOIN_S = 0.8  # after an interrupt or a hang: a second signal ends a run within two seconds


class Scope:
    """Owns threads for the length of a `with` block.

    A thread is started with a function to run and one that makes it stop. Leaving the block, for
    whatever reason, calls the latter for each thread and waits for it to end. An exception that a
    thread's function lets out is raised by the owner when the block is left, unless one is already
    on its way. Threads are daemons, so that one which hangs in a user's code cannot keep a process
    from exiting after a second Ctrl-C.

    Args:
        join_timeout_s: How long to wait, in all, for threads to end; None for ever. One that has not
            ended then hangs in somebody's code: a warning shows its stack, and it is left behind. After
            an interrupt or a StallError it is under a second.
    """

    def __init__(self, join_timeout_s: float | None = None) -> None:
        self._join_timeout_s = join_timeout_s
        self._started: list[tuple[threading.Thread, Callable[[], None]]] = []
        self._errors: list[BaseException] = []

    def __enter__(self) -> Scope:
        return self

    def start(self, run: Callable[[], None], *, name: str, stop: Callable[[], None]) -> threading.Thread:
        """Start a thread in a copy of the caller's context.

        Args:
            run: What the thread does.
            name: The thread's name, as profilers and stack dumps show it.
            stop: Makes `run` return soon; called once, by the owner. Must not block.
        """
        context = contextvars.copy_context()
        thread = threading.Thread(target=self._run, args=(context, run), name=name, daemon=True)
        self._started.append((thread, stop))  # first: an interrupt after the start must find it
        thread.start()
        return thread

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for _, stop in self._started:
            stop()
        interrupt = self._join_all(error)
        if interrupt is not None:
            raise interrupt
        if error is None and self._errors:
            raise self._errors[0]

    def _join_all(self, error: BaseException | None) -> KeyboardInterrupt | None:
        is_hurried = isinstance(error, (KeyboardInterrupt, StallError))
        timeout_s = _HURRIED_JOIN_S if is_hurried else self._join_timeout_s
        give_up_s = None if timeout_s is None else time.monotonic() + timeout_s
        interrupt: KeyboardInterrupt | None = None
        for thread, _ in self._started:
            try:
                _join(thread, give_up_s)
            except KeyboardInterrupt as further:  # give up on this one, which may hang; not on the rest
                interrupt = further
        left = [thread for thread, _ in self._started if thread.is_alive()]
        self._started.clear()
        for thread in left:
            if thread is not threading.current_thread() and interrupt is None:
                _report_left(thread)
        return interrupt

    def _run(self, context: contextvars.Context, run: Callable[[], None]) -> None:
        try:
            context.run(run)
        except BaseException as error:
            self._errors.append(error)


def stack_of(thread: threading.Thread) -> str:
    """Return where a thread stands, as a traceback shows it; empty if it has ended."""
    frame = sys._current_frames().get(thread.ident or 0)
    return "" if frame is None else "".join(traceback.format_stack(frame))


def _report_left(thread: threading.Thread) -> None:
    warnings.warn(
        f"thread {thread.name!r} hangs and was left behind; it ends with the process. It stands at:\n"
        f"{stack_of(thread)}",
        RuntimeWarning,
        stacklevel=4,
    )


def _join(thread: threading.Thread, give_up_s: float | None) -> None:
    # It never started, if an interrupt came in between; it is this one, if the collector closes an
    # abandoned belt on the belt's own thread, which ends as soon as it returns.
    if thread.ident is not None and thread is not threading.current_thread():
        thread.join(None if give_up_s is None else max(0.0, give_up_s - time.monotonic()))
