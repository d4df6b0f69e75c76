"""A nursery for threads: what is started inside the `with` has ended when the block is left."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from types import TracebackType


class Scope:
    """Owns threads for the length of a `with` block.

    A thread is started with a function to run and one that makes it stop. Leaving the block, for
    whatever reason, calls the latter for each thread and waits for it to end. An exception that a
    thread's function lets out is raised by the owner when the block is left, unless one is already
    on its way. Threads are daemons, so that one which hangs in a user's code cannot keep a process
    from exiting after a second Ctrl-C.
    """

    def __init__(self) -> None:
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
        interrupt: KeyboardInterrupt | None = None
        for thread, _ in self._started:
            try:
                _join(thread)
            except KeyboardInterrupt as further:  # give up on this one, which may hang; not on the rest
                interrupt = further
        self._started.clear()
        if interrupt is not None:
            raise interrupt
        if error is None and self._errors:
            raise self._errors[0]

    def _run(self, context: contextvars.Context, run: Callable[[], None]) -> None:
        try:
            context.run(run)
        except BaseException as error:
            self._errors.append(error)


def _join(thread: threading.Thread) -> None:
    # It never started, if an interrupt came in between; it is this one, if the collector closes an
    # abandoned belt on the belt's own thread, which ends as soon as it returns.
    if thread.ident is not None and thread is not threading.current_thread():
        thread.join()
