"""An epoch whose batches worker processes make, as a `Reader`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.batch import Batch
from pipeline.data.reader import END, Repeated, TurnReader
from pipeline.workers.processes import Processes


class ProcessReader:
    """An epoch, its batches made by worker processes; a `Reader`.

    Args:
        processes: That make them.
        reader: The epoch, which this moves.
        depth: Batches that are asked for ahead.
        goes_on: Asked before each further batch is; once not, those asked for are the last.
        repeated: Batches to ask for first, that are not read.
    """

    is_random_access, is_threadable, is_known = False, True, True
    max_processes: int | None = None
    turn: Any = None

    def __init__(
        self,
        processes: Processes,
        reader: TurnReader,
        depth: int,
        goes_on: Callable[[], bool],
        repeated: Repeated | None = None,
    ) -> None:
        self._reader, self._batches = reader, processes.batches(reader, depth, goes_on, repeated)
        self.position = reader.position

    @property
    def is_exhausted(self) -> bool:
        return self._reader.is_exhausted

    def first(self) -> Batch:
        return self.read()

    def read(self) -> Batch:
        return next(self._batches, END)

    def thread_maker(self) -> Callable[[int], Batch]:
        return lambda position: self.read()

    def close(self) -> None:
        self._batches.close()
