"""What a run does about the GIL: nothing, a watch for the convoy, or an account of the whole of it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.batch import Row
from pipeline.errors import GilAccountError, warn_harmlessly
from pipeline.gil import GilAccount, GilReport, gil_account, to_json
from pipeline.gil.cheap_signals import Handoffs
from pipeline.gil.measuring.interpreter import handoff_counter
from pipeline.gil.trace import write_trace
from pipeline.settings import GilMode
from pipeline.watch.clock import STAGES, StepClock
from pipeline.watch.convoy import Convoy, ConvoyWatch, describe_convoy

LOG_NS = 10_000_000_000


class GilWatch:
    """Watches the GIL during a run, as the setting `gil` says.

    Args:
        mode: The setting.
        clock: Of the loop thread.
        put_row: Takes a row for the loggers.
        run_dir: Where ``gil.json`` and ``gil_trace.json`` go; None writes neither.
        why_no_process: Returns why batches cannot be made in processes; empty if they can.

    Attributes:
        next_ns: When to look, by the clock.
        report: The account of the whole run, once the `with` was left, if there was one.
        trace: The same over time, in Chrome's JSON format.

    Runs on:
        Loop thread.
    """

    def __init__(
        self,
        mode: GilMode,
        clock: StepClock,
        put_row: Callable[[Row], None],
        run_dir: Path | None,
        why_no_process: Callable[[], str],
    ) -> None:
        self._mode, self._clock, self._put_row, self._run_dir = mode, clock, put_row, run_dir
        self._why_no_process = why_no_process
        self._stack = ExitStack()
        self._account: GilAccount | None = None
        self._convoy: ConvoyWatch | None = None
        self._handoffs: Handoffs | None = None
        self._of_account: Convoy | None = None
        self._has_warned = False
        self.report: GilReport | None = None
        self.trace: dict[str, Any] | None = None

    def __enter__(self) -> GilWatch:
        self.next_ns = sys.maxsize
        if self._mode == "off":
            return self
        if (read := handoff_counter()) is not None:
            self._handoffs = Handoffs(read)
        if self._mode == "account":
            self._open_account()
        elif self._handoffs is not None:
            self._convoy = ConvoyWatch(self._clock, self._handoffs, self._why_no_process)
            self._stack.callback(self._convoy.close)
        self.next_ns = self._convoy.next_ns if self._convoy else self._clock.since_ns + LOG_NS
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()
        if self._account is not None:
            self._finish(self._account)

    def look(self, step: int, epoch: int) -> None:
        """Look at the GIL; call it from `next_ns` on, so that a step costs a comparison."""
        self.next_ns = self._clock.since_ns + LOG_NS
        if self._convoy is not None:
            self._convoy.look(step)
            self.next_ns = self._convoy.next_ns
        elif self._account is not None:
            self._log(self._account, step, epoch)

    @property
    def convoy(self) -> Convoy | None:
        """The loop waiting for the GIL, if that was seen."""
        return self._of_account if self._convoy is None else self._convoy.found

    def handoffs_per_step(self, num_steps: int) -> float | None:
        """Return how often the GIL changed hands per step; None where that cannot be read."""
        if self._handoffs is None or not num_steps:
            return None
        return self._handoffs.since_first() / num_steps

    def _open_account(self) -> None:
        try:
            self._account = self._stack.enter_context(gil_account(trace=True, functions=True))
            report = self._account.report()
        except GilAccountError as error:
            self._go_on_without(error)
            return
        if report.backend == "signals":
            warn_harmlessly(f"gil='account' has no more than FitResult.stage_times: {report.doubts[0]}")

    def _log(self, account: GilAccount, step: int, epoch: int) -> None:
        """Give the loggers the loop thread's shares so far."""
        try:
            report = account.report()
        except GilAccountError as error:
            self._go_on_without(error)
            return
        if values := loop_ratios(report, threading.current_thread().name):
            self._put_row(Row(step, epoch, values))
        self._warn_of_convoy(report)

    def _finish(self, account: GilAccount) -> None:
        try:
            self.report = account.report()
            if self.report.num_samples:
                self.trace = account.trace()
            if self._run_dir is not None:
                (self._run_dir / "gil.json").write_text(to_json(self.report))
                if self.trace is not None:
                    write_trace(self._run_dir / "gil_trace.json", self.trace)
        except (GilAccountError, OSError) as error:
            self._go_on_without(error)
        else:
            self._warn_of_convoy(self.report)

    def _warn_of_convoy(self, report: GilReport) -> None:
        loop, num_steps = threading.current_thread().name, self._clock.num_steps
        self._of_account = found = describe_convoy(report, loop, num_steps, self._why_no_process())
        if found is not None and not self._has_warned:
            self._has_warned = True
            warn_harmlessly(str(found))

    def _go_on_without(self, error: Exception) -> None:
        self._account = None
        warn_harmlessly(f"training goes on without the GIL account: {error}")


def loop_ratios(report: GilReport, thread: str) -> dict[str, float]:
    """Return what the loop thread did, over all its stages, as metrics by name."""
    stages = [share for share in report.stages if share.thread == thread and share.stage in STAGES]
    time_s = sum(share.time_s for share in stages)
    if not time_s:
        return {}
    values = {
        f"gil/{kind}_ratio": sum(getattr(share, f"{kind}_ratio") * share.time_s for share in stages) / time_s
        for kind in ("held", "waiting", "native", "blocked")
    }
    return values | {f"gil/waiting_ratio/{share.stage}": share.waiting_ratio for share in stages}
