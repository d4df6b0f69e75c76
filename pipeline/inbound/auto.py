"""``placement=auto`` at work: it times the batches, tries places, stays in the best, and looks again.

It lives in the inbound belt's iterator: what passes between two requests of the loop is a step, what
passes inside is the wait for a batch. That costs a step three looks at the clock.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import replace

from pipeline.batch import Batch
from pipeline.concurrency import available_cores
from pipeline.data import Reader
from pipeline.errors import PipelineError
from pipeline.inbound.decide_placement import (
    INLINE,
    TEXTBOOK,
    Job,
    Place,
    best_place,
    is_doubtful,
    may_be,
    next_trial,
    to_time_again,
    why_settled,
)
from pipeline.inbound.read_ahead import Workers
from pipeline.report.placement_report import PlacementReport

LOOK_S, TRIAL_S, WATCH_S, SEE_MS = 0.05, 0.3, 2.0, 50.0
MIN_BATCHES, WARM_UP_BATCHES = 6, 2  # of a place: threads start, belts fill, memory is first touched
GIVE_UP_RATIO = 1.5  # a trial that is so much slower than the best ends at once
CHANGED_RATIO = 1.3  # a job so much slower than when its place was chosen is looked at again
FIRST_PAUSE_S = 10.0  # before it is looked at again; doubled each time

logger = logging.getLogger("pipeline")


class Auto:
    """Chooses where batches are made by what was measured on this run.

    Args:
        workers: Where processes come from.
        name: What the batches are for, in the log.
        clock: Of the wall, in seconds.

    Runs on:
        Loop thread, but for `goes_on`, which only reads a flag.
    """

    def __init__(self, workers: Workers, name: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._workers, self._name, self._clock = workers, name, clock
        self._pause_s, self._settled_s, self._is_doubtful = FIRST_PAUSE_S, 0.0, False
        self._tried: dict[Place, float] = {}
        self._timed_again: set[Place] = set()
        self._place, self._pauses_seen = TEXTBOOK, 0
        self._seen_s: float | None = None
        self._reader: Reader | None = None
        self._has_said = False
        self._num_shards = 0  # of data that another place first reads again, shard by shard
        self._look()

    def choose(self, reader: Reader) -> Place:
        """Return a place for the batches from here on."""
        self._num_shards = 0 if reader.is_random_access else reader.max_processes or 0
        self._reader, self._is_over = reader, False
        self._let_processes_go()  # not before: the last batches came from them
        if not self._may_be(self._place, reader):
            self._tried = {place: ms for place, ms in self._tried.items() if self._may_be(place, reader)}
            self._move(reader)
            self._is_over = False
        return self._place

    def _may_be(self, place: Place, reader: Reader) -> bool:
        """Say whether batches may be made in a place."""
        return may_be(place, self._workers.limits(), reader.is_threadable, reader.is_random_access)

    def goes_on(self) -> bool:
        """Say whether to stay in the place chosen last."""
        return not self._is_over

    def watch(self, batches: Generator[Batch]) -> Generator[Batch]:
        """Pass on the batches of the place chosen last, and time them; once settled, only many together."""
        clock, core = self._clock, self._core_s
        self._num_unseen, self._seen_s = 0, None  # what was between two epochs is no time of the place
        num_pauses = self._workers.num_pauses()
        asked_s, asked_core_s = clock(), core()
        for batch in batches:
            if self._is_quiet:
                yield batch
                self._num_unseen += 1
                if self._num_unseen == self._see_every:
                    self._see()
                    num_pauses = self._workers.num_pauses()
                    asked_s, asked_core_s = clock(), core()
                continue
            there_s, there_core_s = clock(), core()
            yield batch
            done_s = clock()
            if (count := self._workers.num_pauses()) == num_pauses:
                self._note(there_s - asked_s, done_s - there_s, there_core_s - asked_core_s)
            num_pauses = count  # a step with a validation behind it says nothing of the place
            asked_s, asked_core_s = done_s, core()

    @property
    def is_settled(self) -> bool:
        """Whether the place is chosen, and not only tried."""
        return self._settled_ms is not None and not self._wanted_processes and not self._is_over

    @property
    def report(self) -> PlacementReport:
        """What was chosen, and why."""
        job = self._job
        times = ("fetch_ms", "fetch_core_ms", "step_ms") if job is not None else ()
        return PlacementReport(
            str(self._place),
            self._reason,
            tried_ms={str(place): ms for place, ms in self._tried.items()},
            is_settled=self.is_settled,
            obstacle=self._obstacle,
            num_workers=self._place.num_workers,
            threads_per_worker=self._place.num_threads,
            **{name: getattr(job, name) for name in times},
        )

    def _look(self, reason: str = "the first batches are timed in the textbook loop") -> None:
        """Begin again, in the textbook loop."""
        self._tried, self._timed_again = {}, set()
        self._job: Job | None = None
        self._has_processes, self._obstacle = True, ""
        self._wanted_processes: Place | None = None
        self._reason = f"not settled: {reason}"
        self._begin(TEXTBOOK)

    def _begin(self, place: Place, *, settled_ms: float | None = None) -> None:
        """Begin to time a place; one that was settled on only in order to see it change."""
        self._is_over = place != self._place  # else it goes on, with its threads and what they have made
        self._place, self._settled_ms, self._num_slow, self._trial_s = place, settled_ms, 0, 0.0
        self._is_quiet = settled_ms is not None and not self._wanted_processes
        self._see_every = 1 if settled_ms is None else max(1, min(int(SEE_MS / max(settled_ms, 1e-3)), 64))
        self._num_unseen, self._seen_s = 0, None
        self._restart(0 if self._is_quiet else -WARM_UP_BATCHES - self._num_shards)

    def _restart(self, num_batches: int) -> None:
        self._num_batches, self._wait_s, self._step_s, self._wait_core_s = num_batches, 0.0, 0.0, 0.0

    def _note(self, wait_s: float, step_s: float, wait_core_s: float) -> None:
        """Count a batch."""
        if self._is_over:
            return  # what was made ahead is being used up
        self._num_batches += 1
        if self._is_hopeless(wait_s + step_s):
            self._num_batches, self._wait_s, self._step_s = 1, wait_s, step_s
            self._record()
            return
        if self._num_batches <= 0:
            return
        self._wait_s += wait_s
        self._step_s += step_s
        self._wait_core_s += wait_core_s
        if self._is_timed() if self._settled_ms is None else self._has_news(self._settled_ms):
            self._record()

    def _see(self) -> None:
        """Count the batches since the last time, if nothing else was done meanwhile."""
        now_s, num_pauses = self._clock(), self._workers.num_pauses()
        before_s, pauses_before = self._seen_s, self._pauses_seen
        self._seen_s, self._pauses_seen = now_s, num_pauses
        num_batches, self._num_unseen = self._num_unseen, 0
        if before_s is None or num_pauses != pauses_before or self._settled_ms is None:
            return
        self._num_batches += num_batches
        self._wait_s += now_s - before_s
        if self._has_news(self._settled_ms):
            self._record()

    def _core_s(self) -> float:
        """Return what this thread was on a core, as long as that is of interest."""
        return time.thread_time() if self._job is None else 0.0

    def _is_timed(self) -> bool:
        """Say whether the place that is tried has been timed."""
        spent_s = self._wait_s + self._step_s
        return self._num_batches >= MIN_BATCHES and spent_s >= (TRIAL_S if self._tried else LOOK_S)

    def _is_hopeless(self, last_s: float) -> bool:
        """Say whether the place that is tried is so slow that there is no need to time it."""
        if not self._tried or self._place in self._tried or self._settled_ms is not None:
            return False
        if self._num_shards and self._num_batches <= 0:
            return False
        self._trial_s += last_s
        num_batches = self._num_batches + WARM_UP_BATCHES
        return self._trial_s * 1e3 > GIVE_UP_RATIO * min(self._tried.values()) * (num_batches + 3)

    def _has_news(self, settled_ms: float) -> bool:
        """Say whether the processes that were waited for are there, or the job has changed."""
        if self._wanted_processes and self._start_processes(self._wanted_processes) is not False:
            return True
        if self._num_shards or (spent_s := self._wait_s + self._step_s) < WATCH_S:
            return False  # deep in an epoch another place would first have to read all of it
        is_slow = spent_s * 1e3 > CHANGED_RATIO * settled_ms * self._num_batches
        self._num_slow = self._num_slow + 1 if is_slow else 0
        self._restart(0)
        has_reason = self._num_slow >= 2 or self._is_doubtful
        if not has_reason or self._clock() - self._settled_s < self._pause_s:
            return False
        self._pause_s *= 2
        self._job = None
        return True

    def _record(self) -> None:
        """Write down what the time in the place has shown, and go on."""
        if self._settled_ms is None:
            self._tried[self._place] = 1e3 * (self._wait_s + self._step_s) / self._num_batches
        elif self._job is None:
            logger.info("%s: measured again", self._name)
            self._look("places are timed again, the textbook loop first")
            return
        assert self._reader is not None
        self._move(self._reader)

    def _move(self, reader: Reader) -> None:
        """Begin the next trial, or one again, or settle."""
        self._job = self._measured(reader)
        self._wanted_processes = None
        while (trial := next_trial(self._job, self._tried)) is not None:
            has_started = trial.name != "process" or self._start_processes(trial)
            if has_started:
                self._reason = "not settled: it was on trial"
                self._begin(trial)
                return
            if has_started is False:  # not yet: the best place so far, until they are there
                self._wanted_processes = trial
                break
            self._job = replace(self._job, has_processes=False)
        waits = self._num_shards or self._wanted_processes  # those that start take the cores meanwhile
        again = None if waits else to_time_again(self._tried, self._timed_again)
        if again is None:
            self._settle()
            return
        self._reason = f"not settled: {best_place(self._tried)} won narrowly, and both are timed again"
        self._timed_again.add(again)
        if again == TEXTBOOK:
            self._job = None  # measured anew, too
        self._begin(again)

    def _measured(self, reader: Reader) -> Job:
        job = self._job or Job(
            1e3 * self._wait_s / self._num_batches,
            1e3 * self._wait_core_s / self._num_batches,
            1e3 * self._step_s / self._num_batches,
            available_cores(),
            has_order=reader.is_random_access,
            max_processes=reader.max_processes,
        )
        return replace(
            job,
            has_threads=self._may_be(INLINE, reader),
            has_processes=self._has_processes and self._workers.limits().has_processes,
        )

    def _start_processes(self, place: Place) -> bool | None:
        """Say whether processes are there; None if they never will be."""
        try:
            return self._workers.start_processes(place.num_workers, place.num_threads)
        except PipelineError as error:
            logger.info("%s: no worker processes: %s", self._name, error)
            self._obstacle = str(error)
            self._has_processes = False
            return None

    def _let_processes_go(self) -> None:
        """End processes that nobody wants any more."""
        if self.is_settled and self._place.name != "process":
            self._workers.stop_processes()

    def _settle(self) -> None:
        assert self._job is not None
        place = best_place(self._tried)
        self._settled_s, self._is_doubtful = self._clock(), is_doubtful(self._job, self._tried)
        self._begin(place, settled_ms=self._tried[place])
        if self._wanted_processes:
            self._reason = "not settled: it is used until worker processes have started"
            return
        self._let_processes_go()
        limits = self._workers.limits()
        self._reason = why_settled(self._job, self._tried, limits)
        if limits.remedy and limits.remedy in self._reason and not self._has_said:
            self._has_said = True
            print(self._reason, file=sys.stderr)
        logger.info("%s: batches made in %s", self._name, self.report)
