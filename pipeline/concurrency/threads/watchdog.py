"""A thread that sleeps, and speaks up when another has made no progress for long."""

from __future__ import annotations

import threading
from collections.abc import Callable

from pipeline.concurrency.threads.joined import Scope


def watch(
    scope: Scope, timeout_s: float, progress: Callable[[], object], report: Callable[[], None]
) -> threading.Thread:
    """Have `report` called whenever `progress` returns the same twice, `timeout_s` apart.

    Args:
        scope: Owns the thread.
        timeout_s: Between two looks; it wakes no oftener.
        progress: Returns anything that changes with the work.
        report: Says what is the matter.

    Runs on:
        A thread of its own, which holds the GIL for some microseconds every `timeout_s`.
    """
    is_over = threading.Event()

    def run() -> None:
        before = progress()
        while not is_over.wait(timeout_s):
            now = progress()
            if now == before:
                report()
            before = now

    return scope.start(run, name="watchdog", stop=is_over.set)
