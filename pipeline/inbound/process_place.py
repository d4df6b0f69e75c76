"""Worker processes as a place: started without waiting, ended, and read from."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from typing import Any

from pipeline.batch import Batch
from pipeline.checks import Checks, DoubtError, MovedThereError, Trial, looking
from pipeline.data import MapReader, MapSource, Reader, ShardedReader, ShardedSource, Source
from pipeline.device import Transfer
from pipeline.errors import ConfigError
from pipeline.inbound.decide_placement import Place
from pipeline.inbound.read_ahead import read_ahead, read_checked
from pipeline.workers import Processes, ProcessReader


class ProcessPlace:
    """The worker processes of one source.

    Args:
        source: Of the batches.
        transfer: To the device.
        depth: Batches that are asked for ahead, at least.
        stall_timeout_s: Longest wait for a batch; None waits for ever.
        in_order: Otherwise batches are handed over as they are answered.

    Attributes:
        processes: Those that there are.
        is_checked: Whether workers look at what moves in their copies of a map-style dataset.
        tolerated: Names of what may move in a worker, since the loop has looked at it.

    Runs on:
        Loop thread.
    """

    def __init__(
        self,
        source: Source,
        transfer: Transfer,
        depth: int,
        stall_timeout_s: float | None,
        *,
        in_order: bool,
    ) -> None:
        self._source, self._transfer, self._depth = source, transfer, depth
        self._stall_timeout_s, self._in_order = stall_timeout_s, in_order
        self.is_checked, self.tolerated = True, frozenset[str]()
        self.processes: Processes | None = None
        self._has_made = False

    def start(self, num_workers: int, num_threads: int = 1) -> bool:
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
        if self.processes is None:
            timeout_s, pinning, look = self._stall_timeout_s, self._transfer.pinning, self._look()
            self.processes = Processes(source, num_workers, timeout_s, num_threads, pinning, look)
            self.processes.in_order = self._in_order
        is_ready = self.processes.is_ready(num_workers, num_threads)
        if isinstance(source, ShardedSource):
            source.check_processes()
            return is_ready and source.has_begun  # what data does to itself is seen in this process first
        return is_ready

    def _look(self) -> Any:
        """Return what makes a worker look at its dataset: not at shards, which move as they are read.

        Nor out of order: what was made ahead of a batch that moved something could not be made again.
        """
        is_looked_at = self.is_checked and self._in_order and isinstance(self._source, MapSource)
        return partial(looking, self._source.name, self.tolerated) if is_looked_at else None

    def stop(self) -> None:
        """End the worker processes, if there are any; they are started again if they are wanted."""
        if self.processes is not None:
            self.processes.close()
            self.processes = None

    def let_go(self, doubt: DoubtError) -> None:
        """End the worker processes, since what they were given is no longer what is wanted."""
        if isinstance(doubt, MovedThereError):
            self.tolerated |= {*doubt.args[1:]}  # unless the loop sees it move, which ends all processes
        self.stop()

    def starts(self, place: Place, forbid: Callable[[ConfigError], None]) -> bool:
        """Start processes as `start` does; where they have made batches, and can no more, forbid them.

        Such as those of a dataset that has got a connection meanwhile, which cannot be pickled.
        """
        try:
            return self.start(place.num_workers, place.num_threads)
        except ConfigError as error:
            if not self._has_made:
                raise
            forbid(error)
            return False

    def renew(self, checks: Checks) -> None:
        """End processes that were given a dataset which somebody has changed since."""
        has_changed = checks.has_changed(has_processes=self.processes is not None)
        if self.processes is not None and (has_changed or self.processes.is_stale()):
            self.stop()

    def is_there(self, place: Place, reader: Reader, forbid: Callable[[ConfigError], None]) -> bool:
        """Say whether the processes are there, or start them; wait only if the loop would read all again."""
        is_there = self.starts(place, forbid)
        has_any = self.processes is not None
        if has_any and not is_there and isinstance(reader, ShardedReader) and reader.is_behind:
            return self.processes.wait_until_ready()  # type: ignore[union-attr]
        return is_there

    def batches(
        self, place: Place, reader: Reader, goes_on: Callable[[], bool], trial: Trial, compared: Trial
    ) -> Generator[Batch]:
        """Return the batches of an epoch from its reader's position on, made by the processes that are there.

        Args:
            place: How many there are.
            reader: The epoch, which this moves.
            goes_on: Asked before each further batch is asked for.
            trial: Compares the first ones, which the loop has made before.
            compared: Compares some of the others.
        """
        assert isinstance(reader, MapReader | ShardedReader)
        assert isinstance(self._source, MapSource | ShardedSource)
        assert self.processes is not None
        self._has_made = True
        self._source.fetcher.forget_memory()
        depth = max(self._depth, 2 * place.num_workers * place.num_threads)
        position = reader.position
        made = ProcessReader(self.processes, reader, depth, goes_on, trial)
        if self._transfer.runs_ahead:
            timeout_s = self._stall_timeout_s
            ahead = read_ahead(
                made, self._transfer, 2, is_leased=True, stall_timeout_s=timeout_s, trial=compared
            )
            return _closing(made, ahead)
        return _closing(made, read_checked(made, self._transfer, compared, position))


def _closing(reader: ProcessReader, batches: Generator[Batch]) -> Generator[Batch]:
    with closing(reader), closing(batches):
        yield from batches
