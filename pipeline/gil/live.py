"""`gil_account`: the account of whatever runs inside a `with` block."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import GilAccountError
from pipeline.gil import marks
from pipeline.gil.account import GilReport
from pipeline.gil.cheap_signals import Handoffs, SharedTimes
from pipeline.gil.measuring.interpreter import handoff_counter
from pipeline.gil.measuring.sampler_client import PERIOD_S, Sampler, SecondAccountError
from pipeline.gil.report import make_report, make_signals_report, thread_names
from pipeline.gil.trace import chrome_trace, write_trace


class GilAccount(Protocol):
    """A running account."""

    def report(self) -> GilReport:
        """Return the report of the window so far; of the whole of it once the `with` was left.

        Raises:
            GilAccountError: If the sampler's process has died.

        Runs on:
            Any thread; blocks for some milliseconds, with the GIL released.
        """

    def restart(self) -> GilReport:
        """Return the report so far, and begin a new window."""

    def trace(self) -> dict[str, Any]:
        """Return what each thread did when, in Chrome's JSON format.

        Raises:
            GilAccountError: If no trace was kept.
        """

    def write_trace(self, path: str | Path) -> None:
        """Write it to a file, for Perfetto or Chrome."""


@contextmanager
def gil_account(
    *, period_s: float = PERIOD_S, trace: bool = False, functions: bool = False
) -> Iterator[GilAccount]:
    """Measure who holds the GIL, and who waits for it, inside a `with` block.

        with gil_account() as account:
            with stage("collate"):
                ...
        print(account.report().stage("MainThread", "collate").held_ratio)

    Where the sampler cannot run (no Linux, no ``/proc``, an interpreter that it does not know) the
    report has the cheap signals and says what is missing. If the sampler dies on the way, what is
    measured goes on, and `report` says so.

    Args:
        period_s: Mean time between two samples, in seconds.
        trace: Keep the last 50,000 changes of state for `write_trace`.
        functions: Name the Python functions that hold the GIL.

    Raises:
        GilAccountError: On entering, if an account of this process runs already.

    Runs on:
        The calling thread, 0.1 to 0.3 s to begin. Then nothing in this process: a child reads it
        from outside, at 5 to 8 % of one core for a period of 1 ms.
    """
    with ExitStack() as stack:
        sampler = Sampler(period_s=period_s, has_trace=trace, has_functions=functions)
        try:
            stack.enter_context(sampler)
        except SecondAccountError:
            raise
        except GilAccountError as error:
            signals = SignalsAccount(str(error))
            stack.callback(signals.close)
            yield signals
            return
        account = SampledAccount(sampler, has_trace=trace)
        stack.callback(account.close)
        yield account


class SampledAccount:
    """An account by the sampler.

    Args:
        sampler: Running.
        has_trace: Whether it keeps a trace.
    """

    def __init__(self, sampler: Sampler, *, has_trace: bool) -> None:
        self._sampler, self._has_trace = sampler, has_trace
        self._is_open = True
        self._error: GilAccountError | None = None
        self._last: tuple[GilReport, dict[str, Any]] | None = None

    def report(self) -> GilReport:
        if self._is_open:
            return make_report(self._sampler.ask("report"), self._sampler.backend)
        return self._kept()[0]

    def restart(self) -> GilReport:
        report = self.report()
        self._sampler.ask("reset")
        return report

    def trace(self) -> dict[str, Any]:
        if not self._has_trace:
            raise GilAccountError("no trace was kept. Use gil_account(trace=True).")
        return self._trace() if self._is_open else self._kept()[1]

    def write_trace(self, path: str | Path) -> None:
        write_trace(Path(path), self.trace())

    def close(self) -> None:
        """Keep the last report and trace, while threads can still be named; the sampler is about to end."""
        try:
            self._last = self.report(), self._trace() if self._has_trace else {}
        except GilAccountError as error:
            self._error = error  # it has died: `report` says so
        self._is_open = False

    def _trace(self) -> dict[str, Any]:
        names = thread_names(self._sampler.ask("report"))
        return chrome_trace(self._sampler.ask("trace"), names, marks.stage_names)

    def _kept(self) -> tuple[GilReport, dict[str, Any]]:
        if self._last is None:
            raise self._error or GilAccountError("the account has ended without a report")
        return self._last


class SignalsAccount:
    """An account by the cheap signals.

    Args:
        why: Why there is no sampler.
    """

    def __init__(self, why: str) -> None:
        self._why = why
        self._last: GilReport | None = None
        self._begin()

    def report(self) -> GilReport:
        if self._last is not None:
            return self._last
        wall_s = time.perf_counter() - self._began_s
        handoffs_per_s = None if self._handoffs is None else self._handoffs.since_first() / wall_s
        return make_signals_report(self._why, wall_s, handoffs_per_s, self._times.times())

    def restart(self) -> GilReport:
        report = self.report()
        self._begin()
        return report

    def trace(self) -> dict[str, Any]:
        raise GilAccountError(f"there is no trace, since there is no sampler: {self._why}")

    def write_trace(self, path: str | Path) -> None:
        self.trace()

    def close(self) -> None:
        """Keep the last report, and stop timing the stages."""
        self._last = self.report()
        marks.on_change = None

    def _begin(self) -> None:
        self._began_s = time.perf_counter()
        read = handoff_counter()
        self._handoffs = None if read is None else Handoffs(read)
        self._times = SharedTimes()
        marks.on_change = self._times.change
