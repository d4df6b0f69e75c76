"""One ordered thread that takes work off the loop: append and go on; it wakes seldom.

Each wake-up of a thread costs the loop the GIL twice, so the writer lets records gather for some
50 ms after the first and then handles them all: an append costs the loop some 6 µs a step in all.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from pipeline.concurrency.threads.joined import Scope, stack_of
from pipeline.errors import StallError

Item = TypeVar("Item")


class Writer(Generic[Item]):
    """Hands items to a function on a thread of its own, in order, none lost.

    Args:
        scope: Owns the thread; leaving it drains what is pending and ends the thread.
        handle: Called with a batch of items, in order, on the writer thread.
        name: The thread's name.
        gather_s: How long to let items gather after the first, in seconds.
        max_pending: Items that may wait or be in the handler's hands; a `put` beyond them blocks until
            half are handled. None sets no bound: memory grows while the handler is behind.
        finish: Called once on the writer thread when all has been handled, or after an error; what it
            raises is raised by the scope.

        stall_timeout_s: How long to wait for the handler without progress, which `num_beats` shows.
        doing: Says what the handler is at, for a StallError.

    Attributes:
        num_beats: Counted up by the handler as it gets on.

    The first exception of `handle` ends the work: it is raised by the next `put` or `flush`, and
    what was put after it is dropped.
    """

    def __init__(
        self,
        scope: Scope,
        handle: Callable[[list[Item]], None],
        *,
        name: str,
        gather_s: float = 0.05,
        max_pending: int | None = 1024,
        finish: Callable[[], None] | None = None,
        stall_timeout_s: float | None = None,
        doing: Callable[[], str] | None = None,
    ) -> None:
        self._stall_timeout_s, self._doing = stall_timeout_s, doing
        self._handle, self._gather_s, self._finish = handle, gather_s, finish
        self._max_pending = sys.maxsize if max_pending is None else max_pending
        self._items: deque[Item] = deque()
        lock = threading.Lock()
        self._lock = lock
        self._wake = threading.Condition(lock)
        self._idle = threading.Condition(lock)
        self._is_asleep = True
        self._is_hurried = False  # somebody waits: do not gather
        self._is_closed = False
        self._num_handling = 0
        self._error: BaseException | None = None
        self.num_beats = 0
        self._thread = scope.start(self._run_and_finish, name=name, stop=self._close)

    def put(self, item: Item) -> None:
        """Append an item; block only while `max_pending` items wait.

        Raises:
            BaseException: What `handle` raised before.

        Runs on:
            The loop thread. Takes a lock only to wake the writer, every `gather_s` at most.
        """
        if self._error is not None:
            raise self._error
        # Appended before the flag is read, and the writer sets the flag before it looks for items:
        # whichever comes second sees the other.
        self._items.append(item)
        if self._is_asleep:
            with self._lock:
                self._wake.notify()
        if len(self._items) + self._num_handling > self._max_pending:
            self._wait_until(self._max_pending // 2)

    def flush(self) -> None:
        """Return when all that was put has been handled; raise what `handle` raised."""
        self._wait_until(0)

    def _wait_until(self, max_left: int) -> None:
        with self._lock:
            while self._error is None and len(self._items) + self._num_handling > max_left:
                self._is_hurried = True
                self._wake.notify()
                before = self.num_beats
                if not self._idle.wait(self._stall_timeout_s) and before == self.num_beats:
                    raise self._stalled()
        if self._error is not None:
            raise self._error

    def _stalled(self) -> StallError:
        assert self._stall_timeout_s is not None
        error = StallError(self._stall_timeout_s, "progress of the loggers")
        error.stage = "log" if self._doing is None else self._doing()
        error.stack = stack_of(self._thread)
        return error

    def _close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._wake.notify()

    def _run_and_finish(self) -> None:
        try:
            self._run()
        finally:
            if self._finish is not None:
                self._finish()

    def _run(self) -> None:
        while self._wait_for_items():
            taken: list[Item] = []
            with self._lock:
                while self._items:
                    taken.append(self._items.popleft())
                self._num_handling = len(taken)
            try:
                self._handle(taken)
            except BaseException as error:
                self._error = error
            with self._lock:
                self._num_handling = 0
                self._idle.notify_all()
            if self._error is not None:
                return

    def _wait_for_items(self) -> bool:
        """Sleep until there is something, let more gather, and say whether there is work."""
        with self._lock:
            self._is_asleep = True
            while not self._items and not self._is_closed:
                self._wake.wait()
            self._is_asleep = False
            if not self._is_closed and not self._is_hurried:
                self._wake.wait_for(lambda: self._is_closed or self._is_hurried, self._gather_s)
            self._is_hurried = False
            return bool(self._items)
