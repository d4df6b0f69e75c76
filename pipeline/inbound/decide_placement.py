"""Where to try next, and where to stay: the decision of ``placement=auto``, as arithmetic on measurements.

A run begins in the textbook loop, where making a batch and training on it can be timed apart. What a place
would gain at best is predicted by the ceilings (`pipeline.report.ceilings`); the most promising one is
tried on the run itself, and so on, until no place is left that could be much better than the best so far.
Since the batches are the same everywhere, a trial costs a little time if it is slow, and nothing else.

Nobody can predict how long a thread's work holds the GIL; but a trial of ``inline`` shows it. If its thread
makes batches as fast as the textbook loop did, the work lets go of the GIL, and further threads may help. If
not, the loop and the thread waited for each other, and only a process helps; where there can be none, a
shorter switch interval helps a little.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from pipeline.checks import Limits
from pipeline.report.ceilings import HANDOFF_MS, StepCost, predict
from pipeline.report.placement_report import plain_ms
from pipeline.settings import PlaceName

MIN_GAIN = 0.03  # of a step; less is in the noise, and the simpler place is kept
MIN_PROCESS_GAIN = 0.08  # processes have a price besides: memory, and seconds to start
NARROW_GAIN = 0.2  # of the textbook loop's time; a win by less is looked at twice
DOUBTFUL_RATIO = 1.2
MAX_THREADS = 32  # in all, where they are shared out to processes
LATENCY_RATIO = 0.5  # from here on making a batch is waiting, which any number of threads can do


class Place(NamedTuple):
    """Where batches are made.

    Args:
        name: ``textbook`` is the loop thread itself.
        num_workers: Threads or processes; 0 where the name says it all.
        num_threads: Of each process.
        switches_often: Whether the interpreter's switch interval is 0.1 ms there, and not 5.
    """

    name: PlaceName
    num_workers: int = 0
    num_threads: int = 1
    switches_often: bool = False

    def __str__(self) -> str:
        if self.switches_often:
            return f"{self.name} (switch interval 0.1 ms)"
        each = f" ({self.num_threads} threads each)" if self.num_threads > 1 else ""
        return f"{self.name} × {self.num_workers}{each}" if self.num_workers else self.name

    @property
    def num_at_once(self) -> int:
        """Batches that are made at once."""
        return max(self.num_workers, 1) * self.num_threads


TEXTBOOK, INLINE = Place("textbook"), Place("inline")
SWITCHING = Place("inline", switches_often=True)


@dataclass(frozen=True)
class Job:
    """What was measured of a user's job in the textbook loop, in milliseconds.

    Args:
        fetch_ms: Making a batch, until it is on the device.
        fetch_core_ms: How much of that was on a core; the rest is latency.
        step_ms: Training on it.
        num_cores: Cores for this process.
        has_threads: Whether a thread can make batches with the same numbers.
        has_order: Whether batches can be made in any order, by several threads at once.
        has_processes: Whether they can be made in processes.
        max_processes: That can share in them, with one thread each; None for any number, with any.
    """

    fetch_ms: float
    fetch_core_ms: float
    step_ms: float
    num_cores: int
    has_threads: bool = True
    has_order: bool = True
    has_processes: bool = True
    max_processes: int | None = None


def next_trial(job: Job, tried: Mapping[Place, float]) -> Place | None:
    """Return the place to try next, or None if none promises enough.

    Args:
        job: As measured.
        tried: Milliseconds from batch to batch in each place tried so far; the textbook loop is one.
    """
    best_ms = min(tried.values())
    promising = [
        (ms, place)
        for place, ms in _candidates(job, tried).items()
        if place not in tried and ms < best_ms * (1 - _min_gain(place))
    ]
    return min(promising, key=lambda each: each[0])[1] if promising else None


def best_place(tried: Mapping[Place, float]) -> Place:
    """Return the fastest place; a simpler one if it is as fast but for the noise."""
    best_ms = min(tried.values())
    good = [place for place, ms in tried.items() if ms <= best_ms * (1 + MIN_GAIN)]
    simplest_first = ("textbook", "inline", "thread", "process")
    return min(good, key=lambda place: (simplest_first.index(place.name), *place[1:]))


def to_time_again(tried: Mapping[Place, float], timed_again: Container[Place]) -> Place | None:
    """Return a place to time a second time, which then counts, or None if the best one may be settled on.

    A run's first steps are slow, and a machine's speed changes by a tenth from one second to the next: the
    textbook loop may have been behind for that alone. So a place that wins narrowly has to win against a
    second window of the textbook loop, and if that is narrow too, with a second one of its own.
    """
    best = best_place(tried)
    if best == TEXTBOOK or tried[best] < (1 - NARROW_GAIN) * tried[TEXTBOOK]:
        return None
    return next((place for place in (TEXTBOOK, best) if place not in timed_again), None)


def is_doubtful(job: Job, tried: Mapping[Place, float]) -> bool:
    """Say whether the best place falls so short of what was promised that it should be tried again some time.

    Something else may have taken the cores while the places were tried.
    """
    promised = _candidates(job, {TEXTBOOK: tried[TEXTBOOK]}).values()
    return min(tried.values()) > DOUBTFUL_RATIO * min(promised, default=math.inf)


def may_be(place: Place, limits: Limits, is_threadable: bool, is_random_access: bool) -> bool:
    """Say whether what was found in the data lets its batches be made in a place."""
    if place == TEXTBOOK:
        return True
    if place.name == "process":
        return limits.has_processes
    is_one_enough = limits.num_threads == 1 and not is_random_access
    return is_threadable and (limits.num_threads is None or is_one_enough)


def why_settled(job: Job, tried: Mapping[Place, float], limits: Limits) -> str:
    """Say why batches are made in the best of the places tried, and what keeps them from others."""
    place, textbook_ms = best_place(tried), tried[TEXTBOOK]
    if place != TEXTBOOK:
        won = f"it takes {1 - tried[place] / textbook_ms:.0%} less time than the textbook loop"
        return f"{won}; {limits.reason}" if limits.reason else won
    if limits.reason:
        return limits.reason + _missed(job, textbook_ms, limits.remedy)
    others = (
        f"was more than {MIN_GAIN:.0%} faster" if len(tried) > 1 else "that can be used promises to be faster"
    )
    of_all = f"{plain_ms(job.fetch_ms)} of {plain_ms(textbook_ms)} ms"
    return f"making a batch takes {of_all}: no other place {others}"


def _missed(job: Job, now_ms: float, remedy: str) -> str:
    """Say what reading ahead would win at best, where it could not be tried, and how to have it."""
    saved = 1 - at_best_ms(replace(job, has_threads=True), INLINE) / now_ms
    if saved <= MIN_GAIN:
        return ""
    return f"; to read it ahead would take {saved:.0%} less time at best{f' ({remedy})' if remedy else ''}"


def _candidates(job: Job, tried: Mapping[Place, float]) -> dict[Place, float]:
    """Return the places worth a thought, each with the time that it would take at best."""
    found: dict[Place, float] = {}
    if job.has_threads:
        more = _more("thread", job, tried) if job.has_order else []
        threads = {place: at_best_ms(job, place) for place in more}
        found[INLINE] = at_best_ms(job, INLINE)
        if _is_latency(job) or (INLINE in tried and not _is_held_up(job, tried[INLINE])):
            found |= threads
        elif INLINE in tried and not job.has_processes:  # which would do away with the waiting for the GIL
            found[SWITCHING] = found[INLINE]
        elif INLINE not in tried:  # one thread shows whether more would help
            found[INLINE] = min([found[INLINE], *threads.values()])
    if job.has_processes and job.num_cores > 1:
        found |= {place: at_best_ms(job, place) for place in _more("process", job, tried)}
    return found


def _more(name: PlaceName, job: Job, tried: Mapping[Place, float]) -> list[Place]:
    """Return the place that makes just enough at once to keep up; then twice that, as long as it helped."""
    places = sorted((place for place in tried if place.name == name), key=lambda place: place.num_at_once)
    most = _most_at_once(job)
    if not places:
        keeps_up = math.ceil(0.95 * job.fetch_ms / max(job.step_ms, 1e-3))
        least = 2 if name == "thread" else 1  # one thread is `inline`
        return [_shared_out(name, max(least, min(keeps_up, most)), job)] if most >= least else []
    last, before = places[-1], places[-2] if len(places) > 1 else None
    has_helped = before is None or tried[last] < tried[before] * (1 - MIN_GAIN)
    further = min(2 * last.num_at_once, most)
    if not has_helped or further <= last.num_at_once:
        return []
    return [_shared_out(name, further, job, 2 * last.num_workers)]


def _shared_out(name: PlaceName, num_at_once: int, job: Job, least: int = 1) -> Place:
    """Return the place where so many batches are made at once.

    Those that are mostly waiting need no process each, but threads of as few processes as have cores, and
    GILs, enough for the rest. Where threads of this process would be in the loop's way, those are not.
    """
    if name == "thread" or job.max_processes is not None or not _is_latency(job):
        return Place(name, num_at_once)
    busy = math.ceil(0.95 * job.fetch_core_ms / max(job.step_ms, 1e-3))
    num_workers = min(max(busy, least), job.num_cores, num_at_once)
    return Place(name, num_workers, min(-(-num_at_once // num_workers), _most_at_once(job) // num_workers))


def _is_held_up(job: Job, inline_ms: float) -> bool:
    """Say whether the loop and the thread got in each other's way, which is to say, for the GIL or a core."""
    return inline_ms > 1.15 * max(job.step_ms, job.fetch_ms)


def _most_at_once(job: Job) -> int:
    if job.max_processes is not None:
        return min(job.max_processes, job.num_cores)
    return MAX_THREADS if _is_latency(job) else job.num_cores


def _is_latency(job: Job) -> bool:
    """Say whether making a batch is mostly waiting, which threads can do at once, the GIL being released."""
    return job.has_threads and job.fetch_core_ms < LATENCY_RATIO * job.fetch_ms


def at_best_ms(job: Job, place: Place) -> float:
    """Return the time from batch to batch that a place would take at best, as predicted."""
    cost = StepCost(job.step_ms, job.fetch_ms, job.fetch_core_ms, fetch_held_ms=0.0)
    counts = {"num_workers": max(place.num_workers, 1), "threads_per_worker": place.num_threads}
    ms = predict(cost, place.name, num_cores=job.num_cores, **counts).low_ms
    return ms + HANDOFF_MS[place.name]


def _min_gain(place: Place) -> float:
    return MIN_PROCESS_GAIN if place.name == "process" else MIN_GAIN
