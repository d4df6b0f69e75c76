"""The warning about the convoy: a loop that spends its steps winning the GIL back.

Each operation of torch gives the GIL away and must win it back. A thread that runs plain Python lets
go of it once per switch interval only, so a step of many small operations beside it takes many
intervals. The cheap signs of it are looked at every two seconds: how often the GIL changed hands, and
how long the loop thread was off its core while it computed. Only if both say that much is lost does
the sampler run for a second, to name who holds the GIL; then there is one warning, or none.
"""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from pipeline.errors import GilAccountError, warn_harmlessly
from pipeline.gil import GilAccount, GilReport, gil_account
from pipeline.gil.cheap_signals import Handoffs
from pipeline.watch.clock import COMPUTE_STAGES, STAGES, StepClock

CHECK_NS = 2_000_000_000
WINDOW_NS = 1_000_000_000
MAX_WINDOWS = 3
MIN_SAMPLES = 200
CONVOY_RATIO = 0.1  # of the loop's time lost to the GIL: worth a warning
PREFETCH_ADVICE = "Batches are made by Python code on a prefetch thread"
PROCESS_ADVICE = (
    "with placement='process' it has a GIL of its own, and placement='auto' moves it there where that pays."
)
WRITER_ADVICE = (
    "Loggers, or callbacks that are told of numbers, run much Python on the writer thread: set "
    "log_every_n_steps higher."
)
OTHER_ADVICE = (
    "Move that thread's work to a process, or make it give the GIL up sooner: sys.setswitchinterval(1e-4). "
    "An optimizer with fused=True has far fewer operations that must win the GIL back."
)


@dataclass(frozen=True)
class Convoy:
    """A loop that waits for the GIL.

    Args:
        finding: How much, and for whom.
        holder: The thread that holds it, such as ``prefetch/0`` or one of the user's.
        advice: What would end it.
    """

    finding: str
    holder: str
    advice: str

    def __str__(self) -> str:
        return f"{self.finding}. {self.advice}"


def lost_ratio(handoffs: int, switch_interval_s: float, off_core_s: float, wall_s: float) -> float:
    """Return an upper bound of the share of its time that the loop lost to the GIL.

    Args:
        handoffs: How often the GIL changed hands; the loop gets it back at every second one.
        switch_interval_s: How long it may have waited for that each time.
        off_core_s: Time in forward, backward and optimizer that the loop thread was on no core.
        wall_s: Time that all of it took.
    """
    return min(handoffs / 2 * switch_interval_s, off_core_s) / wall_s if wall_s > 0 else 0.0


def describe_convoy(
    report: GilReport, thread: str, num_steps: int, why_no_process: str = ""
) -> Convoy | None:
    """Return the convoy that an account shows, or None.

    Args:
        report: Of a window of training.
        thread: The loop thread's name.
        num_steps: Optimizer steps in the window.
        why_no_process: Why batches cannot be made in processes; empty if they can.
    """
    stages = [share for share in report.stages if share.thread == thread and share.stage in STAGES]
    waited = {share.stage: share.waiting_ratio * share.time_s for share in stages}
    if report.num_samples < MIN_SAMPLES or sum(waited.values()) < CONVOY_RATIO * report.wall_s:
        return None
    blamed: dict[str, float] = defaultdict(float)
    for share in stages:
        for name, part in share.blame.items():
            blamed[name] += part * waited[share.stage]
    blamed.pop("nobody", None)  # it was free: the loop waited for a core
    if sum(blamed.values()) < CONVOY_RATIO * report.wall_s:
        return None
    holder, stage = max(blamed, key=blamed.__getitem__), max(waited, key=waited.__getitem__)
    cost_ms = 1e3 * sum(waited.values()) / max(num_steps, 1)
    finding = (
        f"the loop waits for the GIL {sum(waited.values()) / report.wall_s:.0%} of the time, "
        f"{cost_ms:,.1f} ms a step, most of it in '{stage}', while {holder!r} holds it"
    )
    return Convoy(finding, holder, _advice(holder, why_no_process))


def _advice(holder: str, why_no_process: str) -> str:
    kind = holder.partition("/")[0]
    if kind == "writer":
        return WRITER_ADVICE
    if kind != "prefetch":
        return OTHER_ADVICE
    if why_no_process:
        return f"{PREFETCH_ADVICE}, and a process is no help: {why_no_process}. Only less of it helps."
    return f"{PREFETCH_ADVICE}: {PROCESS_ADVICE}"


def _nothing() -> str:
    return ""


class ConvoyWatch:
    """Looks for the convoy while training; warns once.

    Args:
        clock: Of the loop thread.
        handoffs: Counts how often the GIL changes hands.
        why_no_process: Returns why batches cannot be made in processes; empty if they can.

    Attributes:
        next_ns: When to look, by the clock.
        found: What was warned of.

    Runs on:
        Loop thread. A look takes a few microseconds, every two seconds; a
        sampler's window, only on suspicion and at most three times, some 0.2 s to begin.
    """

    def __init__(
        self, clock: StepClock, handoffs: Handoffs, why_no_process: Callable[[], str] = _nothing
    ) -> None:
        self._clock, self._handoffs, self._why_no_process = clock, handoffs, why_no_process
        self.found: Convoy | None = None
        self._window = ExitStack()
        self._account: GilAccount | None = None
        self._windows_left = MAX_WINDOWS
        self._begin(0)

    def look(self, step: int) -> None:
        """See whether there is a convoy; call it from `next_ns` on."""
        if self._account is not None:
            self._end_window(self._account, step)
        elif self._windows_left and self._is_suspicious():
            self._begin_window()
        self._begin(step)

    def close(self) -> None:
        """End the window, if one is open."""
        self._account = None
        self._window.close()

    def _begin(self, step: int) -> None:
        self._handoffs.since_last()
        self._began_ns, self._began_step = self._clock.since_ns, step
        self._off_core_s = self._clock.off_core_s(COMPUTE_STAGES)
        self.next_ns = self._began_ns + (CHECK_NS if self._account is None else WINDOW_NS)

    def _is_suspicious(self) -> bool:
        off_core_s = self._clock.off_core_s(COMPUTE_STAGES) - self._off_core_s
        wall_s = (self._clock.since_ns - self._began_ns) / 1e9
        handoffs = self._handoffs.since_last()
        return lost_ratio(handoffs, sys.getswitchinterval(), off_core_s, wall_s) > CONVOY_RATIO

    def _begin_window(self) -> None:
        self._windows_left -= 1
        try:
            self._account = self._window.enter_context(gil_account())
        except GilAccountError:
            self._windows_left = 0  # the user's own account is open, and says it all

    def _end_window(self, account: GilAccount, step: int) -> None:
        thread, num_steps = threading.current_thread().name, step - self._began_step
        try:
            found = describe_convoy(account.report(), thread, num_steps, self._why_no_process())
        except GilAccountError:
            found = None  # the sampler has died: no look, no warning
        self.close()
        if found is not None:
            self.found, self._windows_left = found, 0
            warn_harmlessly(str(found))
