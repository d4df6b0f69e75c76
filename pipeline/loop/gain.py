"""What overlap wins, measured in the run itself.

The textbook loop and overlap give the same numbers, so a run may change from one to the other between two
batches, and back, without touching its result. This runs short windows of both in turn, in random order,
until there are enough of them to say how many times as fast overlap is, with an interval.

What keeps it fair: the first steps of each window do not count. A window of overlap begins with an empty
belt; the steps that fill it are among those left out. It ends before the belt is told to stop: the batches
that are left in it are used up by steps that do not count either, and so no window gets a batch that another
one has made. Those last steps, whose batch is there while nobody makes another, are the headspace.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Literal

from pipeline.batch import Batch, Media, Progress, Row, Scalars
from pipeline.data import Reader
from pipeline.inbound.belt import Inbound
from pipeline.inbound.decide_placement import TEXTBOOK, Place
from pipeline.outbound.belt import BeltOutbound, DirectOutbound
from pipeline.outbound.rates import StepDone
from pipeline.outbound.saver import BestJob, SaveJob
from pipeline.report.placement_report import PlacementReport
from pipeline.report.record import Gain
from pipeline.settings import Settings

Kind = Literal["textbook", "overlap"]

START_STEPS = 10  # of the run: allocators and caches settle
WARM_TEXTBOOK_STEPS = 3
MIN_STEPS, MAX_STEPS, WINDOW_NS = 8, 2000, 100_000_000
MAX_PAIRS, MIN_PAIRS = 20, 4
GAP_S = 1e-3  # between two steps: a validation or the like, in which a belt goes on
HEADSPACE_WAIT_RATIO = 0.05
# Student's t, two-sided 95 %, by degrees of freedom; beyond the last one the normal distribution's.
T_95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
        2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)  # fmt: skip


@dataclass
class _Window:
    kind: Kind
    warm_steps: int
    min_steps: int
    steps: list[StepDone] = field(default_factory=list)
    num_counted: int = 0  # once it is over

    def is_full(self) -> bool:
        """Whether there are enough steps, and enough time."""
        count = len(self.steps) - self.warm_steps
        if count < self.min_steps:
            return False
        return count >= MAX_STEPS or sum(done.step_ns for done in self.steps[self.warm_steps :]) >= WINDOW_NS

    @property
    def counted(self) -> list[StepDone]:
        return self.steps[self.warm_steps : self.warm_steps + self.num_counted]

    @property
    def drained(self) -> list[StepDone]:
        """The steps whose batch was there while nobody made another; the first and last left out."""
        return self.steps[self.warm_steps + self.num_counted + 1 : -1]


class GainMeter:
    """Chooses the window's schedule for each batch, and measures its steps.

    Args:
        settings: Depth of the belt, steps in flight, and the seed of the order of the windows.

    Runs on:
        Loop thread; `goes_on` is asked on others too.
    """

    def __init__(self, settings: Settings) -> None:
        self._order = random.Random(settings.seed)  # its own: no draw of the run's is moved
        self._warm_steps = settings.prefetch_depth + settings.max_steps_in_flight + 2
        self._min_steps = max(MIN_STEPS, 2 * settings.prefetch_depth)
        self._pairs: list[dict[Kind, _Window]] = []
        self._waiting: list[Kind] = []
        self._now: _Window | None = _Window("overlap", START_STEPS, 0)
        self._is_over = self._is_started = False
        self._final: Kind = "overlap"

    def measure(self, inbound: Inbound) -> None:
        """Stand in for a belt's chooser, which keeps the windows of overlap and what comes after the last.

        Steps do not count until the belt is ready: processes take a moment to start, and a place is tried
        before it is chosen.
        """
        self._chooser, self._is_ready = inbound.chooser, inbound.is_ready
        inbound.chooser = self

    @property
    def is_settled(self) -> bool:
        return self._chooser.is_settled

    @property
    def report(self) -> PlacementReport:
        return self._chooser.report

    @property
    def kind(self) -> Kind:
        """The schedule of the batches under way."""
        return self._final if self._now is None else self._now.kind

    # ---- as a chooser of places

    def choose(self, reader: Reader) -> Place:
        self._begin_window()
        return TEXTBOOK if self.kind == "textbook" else self._chooser.choose(reader)

    def goes_on(self) -> bool:
        return not self._is_over and (self.kind == "textbook" or self._chooser.goes_on())

    def watch(self, batches: Generator[Batch]) -> Generator[Batch]:
        return batches if self.kind == "textbook" else self._chooser.watch(batches)

    # ---- as a listener

    def step_done(self, done: StepDone) -> None:
        """Take a step's time, and end the window if it has enough of them."""
        window = self._now
        if window is None:
            return None
        steps = window.steps
        began_s = done.ended_s - done.step_ns / 1e9
        if not self._is_ready():
            return steps.clear()
        if steps and began_s > steps[-1].ended_s + GAP_S and not self._is_over:
            steps.clear()  # something else came between
        steps.append(done)
        if not self._is_over and window.is_full():
            window.num_counted = len(steps) - window.warm_steps
            self._is_over = True
        return None

    def gain(self) -> Gain | None:
        """Return what was measured; None where the run was too short, or its epochs are."""
        pairs = [pair for pair in self._pairs if len(pair) == 2]
        if len(pairs) < MIN_PAIRS:
            return None
        times = {kind: [_step_ms(pair[kind].counted) for pair in pairs] for kind in ("textbook", "overlap")}
        ratio, low, high = ratio_interval(times["textbook"], times["overlap"])
        counts = [pair["overlap"].num_counted for pair in pairs]
        return Gain(
            ratio=ratio,
            low=low,
            high=high,
            textbook_ms=statistics.median(times["textbook"]),
            overlap_ms=(overlap_ms := statistics.median(times["overlap"])),
            headspace_ms=min(self._headspace_ms(pairs), overlap_ms),
            num_windows=len(pairs),
            steps_per_window=int(statistics.median(counts)),
        )

    def overlap_wait_ms(self) -> float:
        """Return how long a step of overlap waited for its batch."""
        steps = [done for pair in self._pairs if "overlap" in pair for done in pair["overlap"].counted]
        return statistics.fmean(done.data_wait_ns for done in steps) / 1e6 if steps else 0.0

    def textbook_fetch_ms(self) -> float | None:
        """Return what making a step's batches takes with nothing beside it; None if nobody saw it."""
        steps = [done for pair in self._pairs if "textbook" in pair for done in pair["textbook"].counted]
        return statistics.fmean(done.data_wait_ns for done in steps) / 1e6 if steps else None

    @property
    def textbook_ratio(self) -> float:
        """The share of the measured steps that were made in textbook windows."""
        windows = [window for pair in self._pairs for window in pair.values()]
        count = sum(len(window.steps) for window in windows)
        of_textbook = sum(len(window.steps) for window in windows if window.kind == "textbook")
        return of_textbook / count if count else 0.0

    def _begin_window(self) -> None:
        if self._now is None:
            return
        if not self._is_over and self._is_started:
            self._now.steps.clear()  # its epoch ended first: once more
            return
        if self._is_started and self._now.min_steps:
            self._pairs[-1][self._now.kind] = self._now
        if self._is_started:
            self._now = self._next_window()
        self._is_started, self._is_over = True, False

    def _next_window(self) -> _Window | None:
        if not self._waiting:
            if len(self._pairs) == MAX_PAIRS:
                found = self.gain()
                self._final = "textbook" if found is not None and found.high < 1.0 else "overlap"
                return None
            self._pairs.append({})
            self._waiting = ["textbook", "overlap"]
            self._order.shuffle(self._waiting)
        kind = self._waiting.pop()
        if kind == "textbook":
            return _Window(kind, WARM_TEXTBOOK_STEPS, MIN_STEPS)
        return _Window(kind, self._warm_steps, self._min_steps)

    def _headspace_ms(self, pairs: list[dict[Kind, _Window]]) -> float:
        there = [
            done.step_ns / 1e6
            for pair in pairs
            for done in pair["overlap"].drained
            if done.data_wait_ns < HEADSPACE_WAIT_RATIO * done.step_ns
        ]
        if len(there) >= MIN_STEPS:
            return statistics.median(there)
        alone = [done.step_ns - done.data_wait_ns for pair in pairs for done in pair["textbook"].counted]
        return statistics.median(alone) / 1e6


class SwitchedOutbound:
    """The outbound belt in windows of overlap, and a plain loop's read and log in those of textbook.

    Only one of the two touches the journal at a time: what the other has kept is written first.

    Args:
        meter: Says which, and is told of each step.
        belt: With its writer thread.
        direct: On the loop thread.
    """

    def __init__(self, meter: GainMeter, belt: BeltOutbound, direct: DirectOutbound) -> None:
        self._meter, self._belt, self._direct = meter, belt, direct
        self._is_direct = False

    @property
    def max_lag_steps(self) -> int:
        return self._belt.max_lag_steps

    @property
    def max_lag_s(self) -> float:
        return self._belt.max_lag_s

    @property
    def writer_cpu_s(self) -> float | None:
        return self._belt.writer_cpu_s

    def put_step(self, done: StepDone, scalars: Scalars) -> None:
        self._chosen().put_step(done, scalars)
        self._meter.step_done(done)

    def put_row(self, row: Row) -> None:
        self._chosen().put_row(row)

    def put_media(self, media: Media) -> None:
        self._chosen().put_media(media)

    def put_progress(self, progress: Progress) -> None:
        self._chosen().put_progress(progress)

    def put_job(self, job: SaveJob | BestJob) -> None:
        self._chosen().put_job(job)

    def flush(self) -> None:
        self._chosen().flush()

    def settle(self) -> None:
        self._direct.settle()

    def _chosen(self) -> BeltOutbound | DirectOutbound:
        is_direct = self._meter.kind == "textbook"
        if is_direct and not self._is_direct:
            self._belt.flush()
        elif self._is_direct and not is_direct:
            self._direct.settle()
        self._is_direct = is_direct
        return self._direct if is_direct else self._belt


def ratio_interval(base_ms: list[float], other_ms: list[float]) -> tuple[float, float, float]:
    """Return how many times as fast the other is than the base, pair by pair, with a 95 % interval.

    Source:
        Student's interval for the mean of the logarithms of paired ratios.
    """
    logs = [math.log(base / other) for base, other in zip(base_ms, other_ms, strict=True)]
    middle = statistics.fmean(logs)
    degrees = len(logs) - 1
    t = T_95[degrees - 1] if degrees <= len(T_95) else 1.96
    half = t * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def _step_ms(steps: list[StepDone]) -> float:
    return statistics.fmean(done.step_ns for done in steps) / 1e6
