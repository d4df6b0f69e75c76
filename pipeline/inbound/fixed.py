"""A place that the user named: it is not left, but one warning says so if processes cost time there."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Protocol

from pipeline.batch import Batch
from pipeline.concurrency import available_cores
from pipeline.data import Reader
from pipeline.errors import warn_harmlessly
from pipeline.inbound.decide_placement import INLINE, TEXTBOOK, Place
from pipeline.report.placement_report import PlacementReport, plain_ms
from pipeline.settings import Settings

WINDOW_S, MIN_BATCHES = 2.0, 20
HURTS_RATIO = 1.2  # in two windows one behind the other: a machine's speed changes by a tenth


class Belt(Protocol):
    """What is known of the batches that are handed over.

    Attributes:
        is_training: Whether a model is trained on them; else anything may happen between two of them.
        is_in_place: Whether they are made in the place named; else processes are still starting.
        num_pauses: Returns how often the loop did something else than train, such as validate.
    """

    is_training: bool
    is_in_place: bool
    num_pauses: Callable[[], int]


class Pinned:
    """The place that the user named.

    While worker processes start, the loop thread makes the batches, as a textbook loop does: so it is known
    what that takes. Threads that hurt are seen by the GIL, see `convoy`.

    Args:
        place: Where.
        belt: Of the batches; None compares nothing.
        clock: Of the wall, in seconds.

    Runs on:
        Loop thread.
    """

    def __init__(
        self, place: Place, belt: Belt | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._place, self._belt, self._clock = place, belt, clock
        self._in_line_ms: float | None = None
        self._num_slow = 0
        self._is_done = belt is None or place.name != "process"

    def choose(self, reader: Reader) -> Place:
        return self._place

    def goes_on(self) -> bool:
        return True

    def watch(self, batches: Generator[Batch]) -> Generator[Batch]:
        belt = self._belt
        return (
            batches if self._is_done or belt is None or not belt.is_training else self._timed(batches, belt)
        )

    @property
    def is_settled(self) -> bool:
        return True

    @property
    def report(self) -> PlacementReport:
        place = self._place
        workers, threads = place.num_workers, place.num_threads
        return PlacementReport(str(place), "by the settings", num_workers=workers, threads_per_worker=threads)

    def _timed(self, batches: Generator[Batch], belt: Belt) -> Generator[Batch]:
        """Pass the batches on, and time them a window at a time."""
        is_in_place, self._num_slow = belt.is_in_place, 0
        count, began_s, num_pauses = -MIN_BATCHES, self._clock(), belt.num_pauses()  # the first ones are slow
        for batch in batches:
            yield batch
            if self._is_done:
                continue
            count += 1
            if belt.num_pauses() != num_pauses:
                count, began_s, num_pauses, self._num_slow = (
                    min(count, 0),
                    self._clock(),
                    belt.num_pauses(),
                    0,
                )
            elif count <= 0:
                began_s = self._clock()
            elif count >= MIN_BATCHES and (spent_s := self._clock() - began_s) >= WINDOW_S * is_in_place:
                self._note(1e3 * spent_s / count, is_in_place)
                count, began_s = (0, self._clock()) if is_in_place else (count, began_s)

    def _note(self, batch_ms: float, is_in_place: bool) -> None:
        """Take what a batch and its step took."""
        if not is_in_place:
            self._in_line_ms = batch_ms
        elif self._in_line_ms is None or batch_ms <= HURTS_RATIO * self._in_line_ms:
            self._is_done = True  # later the job itself may become slower, which is not the processes' doing
        else:
            self._num_slow += 1
            self._is_done = self._num_slow == 2
            if self._is_done:
                warn_harmlessly(
                    "placement='process' costs this run time: from batch to batch it takes "
                    f"{plain_ms(batch_ms)} ms, and took {plain_ms(self._in_line_ms)} ms while processes "
                    "started and the loop thread made the batches. placement='auto' keeps processes only "
                    "where they pay."
                )


def pinned_place(settings: Settings) -> Place | None:
    """Return where the settings want batches made; None where it is to be measured."""
    num_workers = settings.num_workers or available_cores()
    if settings.placement == "thread":
        return Place("thread", num_workers)
    if settings.placement == "process":
        return Place("process", num_workers, settings.threads_per_worker)
    if settings.placement == "inline" or settings.schedule == "overlap":
        return INLINE
    return TEXTBOOK if settings.schedule == "textbook" else None
