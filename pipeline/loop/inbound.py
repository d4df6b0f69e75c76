"""The inbound belt of one source: its batches on the device, from the place where they are made best."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from typing import Any, Protocol

from pipeline.batch import Batch
from pipeline.concurrency import short_switch_interval
from pipeline.data import (
    IterableSource,
    MapReader,
    MapSource,
    Processes,
    ProcessReader,
    Reader,
    ShardedReader,
    ShardedSource,
    Source,
)
from pipeline.device import Transfer
from pipeline.errors import ConfigError, listed
from pipeline.loop.chooser import Auto
from pipeline.loop.pinned import Pinned
from pipeline.loop.placement import Place
from pipeline.loop.places import read_ahead, read_in_line
from pipeline.loop.threads import ThreadTimes
from pipeline.report.placement import PlacementReport


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

    Attributes:
        chooser: Of the place.
        is_training: Whether a model is trained on the batches, and not only evaluated.
        is_in_place: Whether batches are made where they are wanted; else processes are still starting.
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
    ) -> None:
        self._times, self.is_training, self._in_order = times, False, in_order
        self.num_pauses: Callable[[], int] = _none
        self._source, self._transfer = source, transfer
        self.chooser: Chooser = (
            Auto(self, source.name) if place is None else Pinned(_for(source, place), self)
        )
        self._depth, self._stall_timeout_s = depth, stall_timeout_s
        self._opened: Reader | None = None
        self._processes: Processes | None = None
        self._has_warned = self.is_in_place = False
        self._num_in_line = 0

    def batches(self, epoch: int, max_batches: int | None, start: int = 0) -> Generator[Batch]:
        """Open an epoch, at once, and return its batches, those before `start` left out."""
        self._opened = self._source.open(epoch, max_batches, start)
        return self._batches(self._opened)

    def state(self, position: int) -> dict[str, Any] | None:
        """Return the data's own state at a position of the epoch under way; None if it has none."""
        return self._source.state(position) if isinstance(self._source, _STATEFUL) else None

    def load_state(self, found: dict[str, Any] | None) -> None:
        """Have the epoch that is resumed opened from such a state."""
        if isinstance(self._source, _STATEFUL):
            self._source.load_state(found)

    def sample_indices(self, position: int) -> list[int] | None:
        """Return the samples of a batch of the epoch under way; None where nobody knows. Any thread."""
        is_known = isinstance(self._opened, MapReader) and position < self._opened.num_batches
        return self._opened.indices(position).tolist() if is_known else None  # type: ignore[union-attr]

    def _batches(self, opened: Reader) -> Generator[Batch]:
        with closing(opened) as reader:
            while not reader.is_exhausted:
                place = self.chooser.choose(reader)
                with (
                    closing(self._made_in(place, reader)) as made,
                    closing(self.chooser.watch(made)) as batches,
                ):
                    yield from batches

    def is_ready(self) -> bool:
        """Say whether batches are made where they are to stay: places are tried, processes take a moment."""
        return self.is_in_place and self.chooser.is_settled

    def close(self) -> None:
        """End what is kept from epoch to epoch."""
        self.stop_processes()

    def _made_in(self, place: Place, reader: Reader) -> Generator[Batch]:
        goes_on = self.chooser.goes_on
        if place.name == "process":
            return self._made_by_processes(place, reader)
        self.is_in_place = True
        if place.name != "textbook":
            if reader.is_threadable:
                ahead = self._made_ahead(reader, max(place.num_workers, 1), goes_on)
                return _switching_often(ahead) if place.switches_often else ahead
            self._warn_in_line()
        return read_in_line(reader, self._transfer, goes_on)

    def _made_ahead(self, reader: Reader, num_threads: int, goes_on: Callable[[], bool]) -> Generator[Batch]:
        return read_ahead(
            reader,
            self._transfer,
            max(self._depth, 2 * num_threads) if reader.is_random_access else self._depth,
            num_threads if reader.is_random_access else 1,
            is_fresh=self._source.makes_fresh_batches,
            in_order=self._in_order or not reader.is_random_access,
            stall_timeout_s=self._stall_timeout_s,
            goes_on=goes_on,
            times=self._times,
        )

    def _made_by_processes(self, place: Place, reader: Reader) -> Generator[Batch]:
        counts = place.num_workers, place.num_threads
        if self._processes is not None and self._processes.is_stale(self._source):  # type: ignore[arg-type]
            self.stop_processes()  # somebody has changed the dataset: give it to them anew
        self.is_in_place = self.start_processes(*counts)
        if not self.is_in_place and isinstance(reader, ShardedReader) and reader.is_behind:
            self.is_in_place = self._wait_for_processes()  # or the loop thread would read it all again
        if not self.is_in_place:  # nobody waits for them to start
            in_line = read_in_line(reader, self._transfer, lambda: not self.start_processes(*counts))
            return self._counted(in_line)
        assert isinstance(reader, MapReader | ShardedReader)
        assert isinstance(self._source, MapSource | ShardedSource)
        assert self._processes is not None
        self._source.fetcher.forget_memory()
        processes = self._processes
        depth = max(self._depth, 2 * place.num_workers * place.num_threads)
        made = ProcessReader(processes, reader, depth, self.chooser.goes_on)
        if self._transfer.runs_ahead:
            ahead = read_ahead(made, self._transfer, 2, is_leased=True, stall_timeout_s=self._stall_timeout_s)
            return _closing(made, ahead)
        return _closing(made, read_in_line(made, self._transfer))

    def _counted(self, batches: Generator[Batch]) -> Generator[Batch]:
        with closing(batches):
            for batch in batches:
                self._num_in_line += 1
                yield batch

    @property
    def placement(self) -> PlacementReport:
        """Where batches are made, and why; and how many were made elsewhere until processes had started."""
        report = self.chooser.report
        if not self._num_in_line:
            return report
        if self.is_in_place:
            waited = f"{self._num_in_line} made by the loop thread, while processes started"
            return replace(report, reason=f"{report.reason}; {waited}")
        missed = f"all {self._num_in_line} made by the loop thread: its processes were not ready in time"
        return replace(report, place="textbook", reason=f"and not {report.place}, {report.reason}; {missed}")

    def _wait_for_processes(self) -> bool:
        assert self._processes is not None
        return self._processes.wait_until_ready()

    def start_processes(self, num_workers: int, num_threads: int = 1) -> bool:
        """See that worker processes are there or on their way; say whether they are there.

        Args:
            num_workers: How many.
            num_threads: Of each.

        Raises:
            ConfigError: If the data cannot be taken to a process; it says why.
        """
        source = self._source
        if not isinstance(source, MapSource | ShardedSource):
            raise ConfigError(
                "placement=process needs samples to share out: pass a dataset with batch_size, or a "
                "DataLoader of a map-style one with num_workers=0. Batches of an iterable are made inline."
            )
        if isinstance(source, ShardedSource):
            num_workers, num_threads = min(num_workers, len(source.shards)), 1
        if self._processes is None:
            self._processes = Processes(
                source, num_workers, self._stall_timeout_s, num_threads, self._transfer.pinning
            )
            self._processes.in_order = self._in_order
        is_ready = self._processes.is_ready(num_workers, num_threads)
        if isinstance(source, ShardedSource):
            source.check_processes()
            return is_ready and source.has_begun  # what data does to itself is seen in this process first
        return is_ready

    @property
    def source(self) -> Source:
        """What batches are made from."""
        return self._source

    def stop_processes(self) -> None:
        """End the worker processes, if there are any; they are started again if they are wanted."""
        if self._processes is not None:
            self._processes.close()
            self._processes = None

    def _warn_in_line(self) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        names = listed(self._source.unhookable)
        warnings.warn(
            f"random numbers were drawn from {names} while a batch was made. Threads share that generator, "
            "so batches are made on the loop thread from here on, with the same numbers and without overlap. "
            "Draw from torch's functions that take a generator, or set placement=process.",
            stacklevel=2,
        )


_STATEFUL = (IterableSource, ShardedSource)


def _for(source: Source, place: Place) -> Place:
    """Return a place as it is for some data: a shard is read by one process, on one thread."""
    if place.name != "process" or not isinstance(source, ShardedSource):
        return place
    return Place("process", min(place.num_workers, len(source.shards)))


def _none() -> int:
    return 0


def _switching_often(batches: Generator[Batch]) -> Generator[Batch]:
    with short_switch_interval(), closing(batches):
        yield from batches


def _closing(reader: Any, batches: Generator[Batch]) -> Generator[Batch]:
    with closing(reader), closing(batches):
        yield from batches
