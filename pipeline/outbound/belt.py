"""The outbound belt: every step's numbers, to the journal and on to the loggers.

`DirectOutbound` reads where the loop stands, as a plain loop does, and writes there. `BeltOutbound` starts
a read and goes on; the writer thread waits for the numbers and writes them, in order, none lost.
"""

from __future__ import annotations

import time
from collections import deque
from math import isfinite
from typing import NamedTuple, Protocol, TypeAlias

from pipeline.batch import Media, Progress, Row, Scalars
from pipeline.concurrency import Scope, Writer
from pipeline.device import Backend, Pending, PendingTensor, Readback
from pipeline.outbound.journal import Journal
from pipeline.outbound.rates import StepDone
from pipeline.outbound.saver import BestJob, SaveJob
from pipeline.settings import Settings
from pipeline.step.guard import SKIPPED
from pipeline.watch.thread_times import ThreadTimes

STAGES = ("log",)
_KEPT_S = 0.05
_CHUNK = 32  # steps between two looks at how far behind the loggers are


class Outbound(Protocol):
    """Where the loop puts its numbers.

    Attributes:
        max_lag_steps: The most steps that the loop was ahead of the loggers.
        max_lag_s: The longest time from a step's end until the loggers had its row.
        writer_cpu_s: Processor time of the writer thread, once it has ended; None if there is none.
    """

    @property
    def max_lag_steps(self) -> int: ...
    @property
    def max_lag_s(self) -> float: ...
    @property
    def writer_cpu_s(self) -> float | None: ...

    def put_step(self, done: StepDone, scalars: Scalars) -> None:
        """Take a step's scalars, on their device."""

    def put_row(self, row: Row) -> None:
        """Take a row of the host's."""

    def put_media(self, media: Media) -> None:
        """Take an image, a histogram or a text; a tensor on its device."""

    def put_progress(self, progress: Progress) -> None:
        """Take how far a validation is."""

    def put_job(self, job: SaveJob | BestJob) -> None:
        """Take a checkpoint to write: behind the numbers that came before it, so that it has them all."""

    def flush(self) -> None:
        """Return when everything put so far is in the journal and with the loggers."""

    def settle(self) -> None:
        """Write what the loop thread has kept back, however the run has ended; waits for no other thread."""


class DirectOutbound:
    """Reads each step's scalars at once, on the loop thread, and logs them there, in bursts.

    Between two steps of torch nothing of the logging is in the processor's caches, and a row costs twice
    what it does behind another. So rows are kept for some 50 ms, but for one that is not finite, and where
    somebody asked to be told of every step.
    """

    def __init__(self, backend: Backend, journal: Journal) -> None:
        self.max_lag_steps, self.max_lag_s = 0, 0.0
        self.writer_cpu_s: float | None = None
        self._read, self._journal = backend.read, journal
        self._kept: deque[tuple[StepDone, dict[str, float]]] = deque()
        self._due_s = 0.0

    def put_step(self, done: StepDone, scalars: Scalars) -> None:
        values = {
            name: value if isinstance(value, (float, int)) else self._read(value)
            for name, value in scalars.items()
        }
        self._kept.append((done, values))
        if (
            done.ended_s >= self._due_s
            or not isfinite(values["train/loss"])
            or SKIPPED in values
            or self._journal.on_step is not None
        ):
            self._due_s = done.ended_s + _KEPT_S
            self.settle()

    def settle(self) -> None:
        try:
            while self._kept:  # one that is interrupted leaves the rest for the next call
                done, values = self._kept.popleft()
                self._journal.note_step(done, values, reached=done.step)
        finally:
            self._journal.deliver()

    def put_row(self, row: Row) -> None:
        self.settle()
        self._journal.note_row(row)
        self._journal.deliver()

    def put_media(self, media: Media) -> None:
        self.settle()
        data = media.data
        self._journal.note_media(media if isinstance(data, str) else media._replace(data=data.detach().cpu()))

    def put_progress(self, progress: Progress) -> None:
        self._journal.loggers.log_progress(progress)

    def put_job(self, job: SaveJob | BestJob) -> None:
        self.settle()
        _do(job, self._journal)

    def flush(self) -> None:
        self.settle()
        self._journal.flush()


class _PendingMedia(NamedTuple):
    media: Media
    tensor: PendingTensor


_Other: TypeAlias = "Row | Progress | Media | _PendingMedia | SaveJob | BestJob"
_Item: TypeAlias = "tuple[StepDone, Pending] | _Other"


class BeltOutbound:
    """Starts a deferred read for each step; the writer thread resolves and logs it.

    Args:
        scope: Owns the writer thread, on which the loggers are closed too.
        backend: The device.
        journal: Told of everything in order.
        settings: ``max_log_lag`` bounds what may wait: beyond it the loop waits (``wait``), or the
            journal leaves rows out (``drop``), or nothing happens (``grow``).
        times: Told how the thread spent its time.
    """

    def __init__(
        self, scope: Scope, backend: Backend, journal: Journal, settings: Settings, times: ThreadTimes
    ) -> None:
        self._readback, self._journal, self._times = Readback(backend), journal, times
        self.max_lag_steps, self.max_lag_s = 0, 0.0
        self.writer_cpu_s: float | None = None
        self._writer: Writer[_Item] = Writer(
            scope,
            self._write,
            name="writer",
            max_pending=settings.max_log_lag if settings.log_overflow == "wait" else None,
            finish=self._finish,
            stall_timeout_s=settings.stall_timeout_s,
            doing=lambda: f"log ({journal.loggers.busy})",
        )

    def put_step(self, done: StepDone, scalars: Scalars) -> None:
        self._writer.put((done, self._readback.start(scalars)))

    def put_row(self, row: Row) -> None:
        self._writer.put(row)

    def put_media(self, media: Media) -> None:
        data = media.data
        if isinstance(data, str):
            self._writer.put(media)
        else:
            self._writer.put(_PendingMedia(media, self._readback.start_tensor(data)))

    def put_progress(self, progress: Progress) -> None:
        self._writer.put(progress)

    def put_job(self, job: SaveJob | BestJob) -> None:
        self._writer.put(job)

    def flush(self) -> None:
        self._writer.flush()

    def settle(self) -> None:
        """Keep nothing back: the writer has it all."""

    def _write(self, items: list[_Item]) -> None:
        with self._times.clock(STAGES):  # once a burst
            try:
                for start in range(0, len(items), _CHUNK):
                    self._write_chunk(items[start : start + _CHUNK])
            finally:
                self._journal.flush()

    def _write_chunk(self, items: list[_Item]) -> None:
        oldest: StepDone | None = None
        self._writer.num_beats += 1
        for item in items:
            if isinstance(item, (Row, Progress, Media, _PendingMedia, SaveJob, BestJob)):
                self._write_other(item)
            else:
                oldest = oldest or item[0]
                self._journal.note_step(item[0], item[1].resolve())
        self._journal.deliver()
        if oldest is not None:
            self.max_lag_s = max(self.max_lag_s, time.perf_counter() - oldest.ended_s)
            self.max_lag_steps = max(self.max_lag_steps, self._journal.last_step() - oldest.step)

    def _write_other(self, item: _Other) -> None:
        if isinstance(item, Row):
            self._journal.note_row(item)
        elif isinstance(item, Progress):
            self._journal.loggers.log_progress(item)
        elif isinstance(item, Media):
            self._journal.note_media(item)
        elif isinstance(item, (SaveJob, BestJob)):
            _do(item, self._journal)
        else:
            self._journal.note_media(item.media._replace(data=item.tensor.resolve()))

    def _finish(self) -> None:
        self._journal.loggers.close()
        self.writer_cpu_s = time.thread_time()


def _do(job: SaveJob | BestJob, journal: Journal) -> None:
    """Write a checkpoint, the rows before it first."""
    if isinstance(job, BestJob):
        job.saver.name_best(job)
        return
    journal.flush()
    job.saver.write(job, journal.losses, journal.last_values)
    journal.note_save(job.saver.reports[-1])
