"""A worker process looks at its own copy of the dataset: what moves there, the loop cannot see."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

from pipeline.checks.trial import MovedThereError
from pipeline.checks.watch import StateWatch

LOOK_RATIO = 0.01  # of a worker's time


class WorkerLook:
    """Called after each batch that a worker has made; its first one may set up what the others use.

    What has moved once counts for all later batches: they may be made of it.

    Args:
        roots: Returns what makes a batch, by name.
        tolerated: Names of what may move.
        ratio: Of a worker's time that may be spent on it.

    Runs on:
        Any thread of a worker process.
    """

    def __init__(
        self, roots: Callable[[], list[tuple[str, Any]]], tolerated: frozenset[str], ratio: float
    ) -> None:
        self._roots, self._tolerated, self._ratio = roots, tolerated, ratio
        self._lock, self._moved = threading.Lock(), tuple[Any, ...]()
        self._watch: StateWatch | None = None
        self._every_n, self._count, self._last_s = 1, 0, time.perf_counter()

    def __call__(self) -> None:
        """Look, unless that would take too much of the time.

        Raises:
            MovedThereError: If something has moved.
        """
        with self._lock:
            self._count += 1
            if self._count >= self._every_n and not self._moved:
                self._look()
        if self._moved:
            raise MovedThereError(*self._moved)

    def _look(self) -> None:
        began_s = time.perf_counter()
        if self._watch is None:
            self._watch = StateWatch(self._roots)
            self._watch.expected.update(self._tolerated)
        elif not self._watch.is_quiet():
            moved = {each.name for each in self._watch.moved() if each.change == "moved"}
            own = self._watch.reached.bound  # a connection that this process has opened for itself
            names = sorted(moved - self._tolerated - own.keys())
            self._moved = (self._count - 1, *names) if names else ()
        cost_s, budget_s = time.perf_counter() - began_s, self._ratio * (began_s - self._last_s)
        self._every_n = math.ceil(cost_s * self._count / max(budget_s, 1e-9))
        self._last_s, self._count = began_s + cost_s, 0


def looking(name: str, tolerated: frozenset[str], fetcher: Any, ratio: float = LOOK_RATIO) -> WorkerLook:
    """Return what a worker process calls after each batch.

    Args:
        name: What the dataset is called.
        tolerated: Names of what may move.
        fetcher: Has the dataset.
        ratio: Of a worker's time that may be spent on it.
    """
    return WorkerLook(lambda: fetcher.roots(name), tolerated, ratio)
