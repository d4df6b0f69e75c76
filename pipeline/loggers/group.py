"""All the loggers of a run: told in order, timed by name, and closed whatever happens."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.batch import Media, Progress, Row
from pipeline.errors import add_stage_note, note_further
from pipeline.protocols import Logger, RunInfo


@dataclass(slots=True)
class LoggerTime:
    """What one logger cost.

    Args:
        name: Its class, or its ``name`` if it has one; with a number behind it where there are several.
        num_rows: Rows it was told.
        wall_s: Time inside its calls.
        cpu_s: Processor time of its calls, on a thread of their own: the most that they can have held
            the GIL. None in ``textbook``, where every moment of them is the loop's.
    """

    name: str
    num_rows: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0


class LoggerGroup:
    """Tells every logger, each in order.

    Args:
        loggers: Closed with the group.
        info: Given to those that have an ``open`` method, before their first row.
        is_off_loop: Whether it is told from a thread of its own; then processor time is measured too.

    Attributes:
        info: As given.
        times: What each one cost so far.
        failures: What each logger that failed has raised.
        busy: The logger that is being told something, by name; None between two.
        has_failed: Set before the end of a run that an exception ends; those with a ``mark_failed``
            method are told.

    Runs on:
        The writer thread in ``overlap``, the loop thread in ``textbook``.
    """

    def __init__(self, loggers: Sequence[Logger], info: RunInfo, *, is_off_loop: bool) -> None:
        self._loggers, self.info, self._is_off_loop = tuple(loggers), info, is_off_loop
        self.times = [LoggerTime(name) for name in _names(loggers)]
        self._timed = list(zip(self._loggers, self.times, strict=True))
        self._is_open = self._is_closed = False
        self.has_failed = False
        self.failures: list[Exception] = []
        self.busy: str | None = None

    def log(self, rows: Sequence[Row]) -> None:
        """Tell each logger of some rows, in order.

        One that fails is told nothing more; the run goes on, and `closing` raises the error at its end.
        """
        if not self._is_open:
            self._open()
        # One look at the clock between two loggers: on the loop thread this runs at every step.
        is_off_loop = self._is_off_loop
        began_s, began_cpu_s = time.perf_counter(), time.thread_time() if is_off_loop else 0.0
        for logger, spent in self._timed:
            self.busy = spent.name
            row = rows[0]
            try:
                for row in rows:
                    logger.log(row)
            except Exception as error:
                self._turn_off(logger, spent, error, "log", row.step)
            spent.num_rows += len(rows)
            ended_s = time.perf_counter()
            spent.wall_s += ended_s - began_s
            began_s = ended_s
            if is_off_loop:
                ended_cpu_s = time.thread_time()
                spent.cpu_s += ended_cpu_s - began_cpu_s
                began_cpu_s = ended_cpu_s
        self.busy = None

    def log_media(self, media: Media) -> None:
        """Tell those loggers that keep media."""
        self._open()
        self._call("log_media", media, step=media.step)

    def log_progress(self, progress: Progress) -> None:
        """Tell those loggers that show how far things are."""
        self._open()
        self._call("log_progress", progress)

    def flush(self) -> None:
        """Make what was written readable by others."""
        if self._is_open:
            self._call("flush")

    def close(self) -> None:
        """Close each logger once, but for one that another thread hangs in."""
        if self._is_closed:
            return
        self._is_closed = True
        if self.has_failed and self._is_open:
            self._close_each("mark_failed")
        self._close_each("close")

    def _close_each(self, method: str) -> None:
        for logger, spent in zip(self._loggers, self.times, strict=True):
            bound = getattr(logger, method, None)
            if bound is None or spent.name == self.busy:
                continue
            try:
                self._timed_call(bound, spent)
            except Exception as error:
                self._turn_off(logger, spent, error, method, None)

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Have everything closed after the block, and raise what a logger has raised meanwhile.

        It is the first one's own exception, with what the others have raised in notes; an error of the block
        is not lost to them.
        """
        try:
            yield
        except BaseException as error:
            self.close()
            for further in self.failures:
                note_further(error, further)
            raise
        self.close()
        if self.failures:
            first, *others = self.failures
            for other in others:
                note_further(first, other)
            raise first

    def _open(self) -> None:
        if not self._is_open:
            self._is_open = True
            self._call("open", self.info)

    def _call(self, method: str, *arguments: Any, step: int | None = None) -> None:
        for logger, spent in self._timed:
            bound = getattr(logger, method, None)
            if bound is None:
                continue
            self.busy = spent.name
            try:
                self._timed_call(bound, spent, *arguments)
            except Exception as error:
                self._turn_off(logger, spent, error, method, step)
            self.busy = None

    def _turn_off(
        self, logger: Logger, spent: LoggerTime, error: Exception, method: str, step: int | None
    ) -> None:
        """Tell a logger nothing more; say so at once, and at the end of the run."""
        add_stage_note(error, f"{method} ({spent.name})", step=step)
        self.failures.append(error)
        self._timed = [each for each in self._timed if each[0] is not logger]
        where = method if step is None else f"{method} at step {step}"
        print(
            f"logger {spent.name} failed in {where} and is told nothing more; training goes on. "
            f"{type(error).__name__}: {error}",
            file=sys.stderr,
        )

    def _timed_call(self, call: Callable[..., None], spent: LoggerTime, *arguments: Any) -> None:
        cpu_clock = time.thread_time if self._is_off_loop else _no_clock
        began_s, began_cpu_s = time.perf_counter(), cpu_clock()
        try:
            call(*arguments)
        finally:
            spent.wall_s += time.perf_counter() - began_s
            spent.cpu_s += cpu_clock() - began_cpu_s


def _no_clock() -> float:
    return 0.0  # reading the processor time takes 0.8 µs: too dear for the loop thread


def _names(loggers: Sequence[Logger]) -> list[str]:
    names = [getattr(logger, "name", None) or type(logger).__name__ for logger in loggers]
    seen: Counter[str] = Counter()
    numbered = []
    for name in names:
        seen[name] += 1
        numbered.append(name if names.count(name) == 1 else f"{name} {seen[name]}")
    return numbered
