"""The inbound belt of one source: its batches on the device, from the place where they are made best."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from pipeline.batch import Batch
from pipeline.checks import Checks, DoubtError, Limits, Trial
from pipeline.concurrency import short_switch_interval
from pipeline.data import (
    READS_OURS,
    IterableReader,
    IterableSource,
    MapReader,
    MapSource,
    Reader,
    ShardedSource,
    Source,
)
from pipeline.device import Transfer
from pipeline.inbound.auto import Auto
from pipeline.inbound.decide_placement import TEXTBOOK, Place
from pipeline.inbound.fixed import Pinned
from pipeline.inbound.process_place import ProcessPlace
from pipeline.inbound.read_ahead import brought, read_ahead, read_in_line
from pipeline.inbound.retreat import Retreat
from pipeline.report.placement_report import PlacementReport
from pipeline.watch.thread_times import ThreadTimes
from pipeline.workers import Processes


class Chooser(Protocol):
    """Says where the next batches are made; told how it went."""

    def choose(self, reader: Reader) -> Place:
        """Return a place for the batches from here on; between two places."""

    def goes_on(self) -> bool:
        """Say whether to stay in the place chosen last; asked once a batch."""

    def watch(self, batches: Generator[Batch]) -> Generator[Batch]:
        """Pass on the batches of the place chosen last."""

    @property
    def is_settled(self) -> bool:
        """Whether the place is chosen, and not only tried."""

    @property
    def report(self) -> PlacementReport:
        """What was chosen, and why."""


class Inbound:
    """Brings a source's batches to the device, an epoch at a time.

    Args:
        source: Of the batches.
        transfer: To the device.
        place: Where the user wants them made; None leaves it to measurement.
        depth: Batches that are made ahead.
        stall_timeout_s: Longest wait for a batch; None waits for ever.
        times: Told how the threads that make batches spent theirs.
        in_order: Otherwise batches of a map-style dataset are handed over as they are ready.
        is_trusted: Whether the user said that what yields batches itself may be read ahead; to name a place
            says so too.
        is_checked: Whether to look at the data, and to compare batches, before they are made ahead.

    Attributes:
        chooser: Of the place.
        checks: What may be chosen.
        is_training: Whether a model is trained on the batches, and not only evaluated.
        is_in_place: Whether batches are made where they are wanted; else processes are still starting.
        source: What the batches are made of.
        age: How many batches were handed over while the newest was being made and waited, if what yields them
            may depend on that.
        num_pauses: Returns how often the loop did something else than train, such as validate.

    Runs on:
        Loop thread.
    """

    def __init__(
        self,
        source: Source,
        transfer: Transfer,
        place: Place | None,
        depth: int,
        stall_timeout_s: float | None,
        times: ThreadTimes | None = None,
        *,
        in_order: bool = True,
        is_trusted: bool = False,
        is_checked: bool = True,
    ) -> None:
        self._times, self.is_training, self._in_order = times, False, in_order
        self.num_pauses: Callable[[], int] = int
        self.source, self._transfer = source, transfer
        self._depth, self._stall_timeout_s = depth, stall_timeout_s
        self._opened: Reader | None = None
        self._place = ProcessPlace(source, transfer, depth, stall_timeout_s, in_order=in_order)
        self._place.is_checked = is_checked
        self.is_in_place, self._num_in_line = False, 0
        self.age: int | None = None
        self._ages: deque[int] | None = None
        self._num_handed = 0
        is_trusted = is_trusted or place is not None or not is_checked
        self.checks = Checks(source, is_trusted=is_trusted, is_off=not is_checked)
        self._retreat = Retreat(self.checks, source.name, is_pinned=place is not None)
        self.chooser: Chooser = (
            Auto(self, source.name) if place is None else Pinned(_for(source, place), self)
        )

    def batches(self, epoch: int, max_batches: int | None, start: int = 0) -> Generator[Batch]:
        """Open an epoch, at once, and return its batches, those before `start` left out."""
        self._place.renew(self.checks)  # somebody may have changed the dataset: they are given it anew
        self._opened = self.source.open(epoch, max_batches, start)
        if isinstance(self._opened, IterableReader) and not self.source.is_known_kind:
            self._ages, self._num_handed = deque(), 0
            self._opened.on_begin = lambda ages=self._ages: ages.append(self._num_handed)
        return self._batches(self._opened)

    def state(self, position: int) -> dict[str, Any] | None:
        """Return the data's own state at a position of the epoch under way; None if it has none."""
        return self.source.state(position)

    def load_state(self, found: dict[str, Any] | None) -> None:
        """Have the epoch that is resumed opened from such a state."""
        self.source.load_state(found)

    def keep_states(self, foresees: Callable[[int], bool], check: Callable[[Any], None]) -> None:
        """Have the data keep states of its own for checkpoints; see `IterableSource.keep_states`."""
        if isinstance(self.source, IterableSource):
            # Beside those that wait there is one in the making, one on its way, and one in use.
            self.source.keep_states(foresees, check, self._depth + 3)

    def sample_indices(self, position: int) -> list[int] | None:
        """Return the samples of a batch of the epoch under way; None where nobody knows. Any thread."""
        is_known = isinstance(self._opened, MapReader) and position < self._opened.num_batches
        return self._opened.indices(position).tolist() if is_known else None  # type: ignore[union-attr]

    def limits(self) -> Limits:
        """Return where batches may be made, as far as is known."""
        if READS_OURS[0] in self.source.unhookable:
            self._retreat.leave_to_ours()
        return self.checks.survey()

    def _batches(self, opened: Reader) -> Generator[Batch]:
        checks = self.checks
        with closing(opened) as reader:
            while not reader.is_exhausted:
                place = self._retreat.allowed(self.chooser.choose(reader), reader)
                if checks.is_looked_at(place, reader, is_loop=place == TEXTBOOK):
                    yield from self._made_and_watched(place, reader)
                else:
                    yield from self._looked_at(place, reader)

    def _looked_at(self, place: Place, reader: Reader) -> Generator[Batch]:
        """Return some batches that the loop makes and looks at, before a place is used."""
        bring = partial(brought, transfer=self._transfer)
        batches = self.checks.looked_at(reader, bring, controls=place != TEXTBOOK)
        if place.name != "process":
            return batches
        self._place.renew(self.checks)  # they may have been starting for a while
        self.is_in_place = self._place.starts(place, self._retreat.without_processes)  # nobody waits for them
        return self._counted(batches)

    @property
    def _processes(self) -> Processes | None:
        return self._place.processes

    def _made_and_watched(self, place: Place, reader: Reader) -> Generator[Batch]:
        """Yield batches from a place until it is left, or until there is a doubt about what is made there."""
        first, count, self.checks.is_leaving = reader.position, 0, False
        try:
            with (
                closing(self._made_in(place, reader)) as made,
                closing(self.chooser.watch(made)) as timed,
                closing(self._watched(place, reader, timed)) as batches,
            ):
                for batch in batches:
                    count += 1
                    if self._ages is not None:
                        self.age = self._num_handed - self._ages.popleft()
                        self._num_handed += 1
                    yield batch
        except DoubtError as doubt:
            if reader.is_random_access:
                reader.position = first + count
            self._place.let_go(doubt)
            self._retreat.after(doubt, place, reader.position + self._depth + 2 * place.num_workers)

    def _watched(self, place: Place, reader: Reader, batches: Generator[Batch]) -> Generator[Batch]:
        if place == TEXTBOOK or not self.checks.is_of_use(reader):
            return batches
        return self.checks.watched(batches, can_go_back=reader.is_random_access and self._in_order)

    def is_ready(self) -> bool:
        """Say whether batches are made where they are to stay: places are tried, processes take a moment."""
        return self.is_in_place and self.chooser.is_settled

    def close(self) -> None:
        """End what is kept from epoch to epoch."""
        self.stop_processes()

    def _made_in(self, place: Place, reader: Reader) -> Generator[Batch]:
        if place.name == "process":
            return self._made_by_processes(place, reader)
        self.is_in_place = True
        if place.name != "textbook":
            if reader.is_threadable:
                ahead = self._made_ahead(place, reader)
                return _switching_often(ahead) if place.switches_often else ahead
            self._retreat.warn_of_draws(self.source.unhookable, reader)
        return read_in_line(reader, self._transfer, self._goes_on)

    def _goes_on(self) -> bool:
        """Say whether to stay in the place; asked once a batch."""
        return self.chooser.goes_on() and not self.checks.is_leaving

    def _made_ahead(self, place: Place, reader: Reader) -> Generator[Batch]:
        num_threads, is_in_order = max(place.num_workers, 1), self._in_order or not reader.is_random_access
        trial = self.checks.trial(place, reader)
        return read_ahead(
            reader,
            self._transfer,
            max(self._depth, 2 * num_threads) if reader.is_random_access else self._depth,
            num_threads if reader.is_random_access else 1,
            is_fresh=self.source.makes_fresh_batches,
            in_order=is_in_order,
            stall_timeout_s=self._stall_timeout_s,
            goes_on=self._goes_on,
            times=self._times,
            trial=trial if is_in_order and reader.is_random_access else Trial(),
        )

    def _made_by_processes(self, place: Place, reader: Reader) -> Generator[Batch]:
        is_there = partial(self._place.is_there, place, reader, self._retreat.without_processes)
        self.is_in_place = is_there()
        if not self.is_in_place:  # nobody waits for them to start

            def waits() -> bool:
                return self.checks.limits.has_processes and not is_there()

            return self._counted(read_in_line(reader, self._transfer, waits))
        trial = self.checks.trial(place, reader)
        compared = Trial(self.checks.comparer, reader if self._in_order else None)
        return self._place.batches(place, reader, self._goes_on, trial, compared)

    def _counted(self, batches: Generator[Batch]) -> Generator[Batch]:
        with closing(batches):
            for batch in batches:
                self._num_in_line += 1
                yield batch

    @property
    def placement(self) -> PlacementReport:
        """Where batches are made, and why; and how many were made elsewhere until processes had started."""
        limit, num_compared = self.limits().reason, self.checks.comparer.num_compared
        report = replace(
            self.chooser.report, limit=limit, num_compared=num_compared, checks_s=self.checks.spent_s
        )
        if self._retreat.has_left:
            why = f"not {report.place}: {report.limit}"
            return replace(report, place="textbook", num_workers=0, reason=why)
        if not self._num_in_line:
            return report
        if self.is_in_place:
            waited = f"the loop made {self._num_in_line} batches while processes started and were compared"
            return replace(report, reason=f"{report.reason}; {waited}")
        missed = f"all {self._num_in_line} made by the loop thread: its processes were not ready in time"
        return replace(report, place="textbook", reason=f"and not {report.place}, {report.reason}; {missed}")

    def start_processes(self, num_workers: int, num_threads: int = 1) -> bool:
        """See that worker processes are there or on their way; see `ProcessPlace`."""
        return self._place.start(num_workers, num_threads)

    def stop_processes(self) -> None:
        """End the worker processes, if there are any; they are started again if they are wanted."""
        self._place.stop()


def _for(source: Source, place: Place) -> Place:
    """Return a place as it is for some data: what has an order by one thread, a shard by one process."""
    if place.name == "thread" and not isinstance(source, MapSource):
        return Place("thread", 1)
    if place.name != "process" or not isinstance(source, ShardedSource):
        return place
    return Place("process", min(place.num_workers, len(source.shards)))


def _switching_often(batches: Generator[Batch]) -> Generator[Batch]:
    with short_switch_interval(), closing(batches):
        yield from batches
