"""A lock that several threads hold at once, or one alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class SharedLock:
    """Held by any number of threads side by side, or by one of them alone.

    Who wants it alone waits for those that have it, and is let in before whoever comes later.

    Runs on:
        Any thread; waits with the GIL released.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_shared = 0
        self._num_lone = 0  # who have it alone, or want to
        self._is_alone = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold it beside others."""
        with self._changed:
            self._changed.wait_for(lambda: not self._num_lone)
            self._num_shared += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_shared -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold it while nobody else does."""
        with self._changed:
            self._num_lone += 1
            self._changed.wait_for(lambda: not (self._num_shared or self._is_alone))
            self._is_alone = True
        try:
            yield
        finally:
            with self._changed:
                self._num_lone -= 1
                self._is_alone = False
                self._changed.notify_all()
