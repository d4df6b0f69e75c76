"""A gate that holds a thread up until a test opens it."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Gate:
    """Stops whoever passes until it is opened; tells how many have come.

    Args:
        timeout_s: Fail rather than hang if nobody opens it.
    """

    def __init__(self, timeout_s: float = 30.0) -> None:
        self._condition = threading.Condition()
        self._timeout_s = timeout_s
        self._is_open = False
        self._num_arrived = 0

    def pass_through(self) -> None:
        """Wait here until the gate is open."""
        with self._condition:
            self._num_arrived += 1
            self._condition.notify_all()
            self._wait_for(lambda: self._is_open)

    def open(self) -> None:
        """Let everybody through, now and later."""
        with self._condition:
            self._is_open = True
            self._condition.notify_all()

    def wait_for_arrivals(self, count: int) -> None:
        """Return once so many have come to the gate."""
        with self._condition:
            self._wait_for(lambda: self._num_arrived >= count)

    def _wait_for(self, is_so: Callable[[], bool]) -> None:
        if not self._condition.wait_for(is_so, self._timeout_s):
            raise TimeoutError(f"nobody came or opened the gate in {self._timeout_s} s")
