"""The outbound belt: every step's numbers, to the journal and on to the loggers.

`DirectOutbound` reads and writes where the loop stands, as a plain loop does. `BeltOutbound` starts
a read and goes on; the writer thread waits for the numbers and writes them, in order, none lost.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from math import isfinite
from typing import NamedTuple, Protocol, TypeAlias

import torch

from pipeline.batch import Row, Scalars
from pipeline.concurrency import Scope, Writer
from pipeline.device import Backend, Pending, Readback
from pipeline.errors import NonFiniteError, add_stage_note
from pipeline.gil import stage
from pipeline.protocols import Logger
from pipeline.settings import Settings

LOGGING = stage("log")


class StepDone(NamedTuple):
    """What the loop knows of a step that it has queued, its device scalars apart.

    Args:
        step: Optimizer steps finished with this one.
        epoch: Its epoch.
        step_s: Time since the step before it was queued, in seconds.
        data_wait_s: How much of that was spent waiting for batches.
    """

    step: int
    epoch: int
    step_s: float
    data_wait_s: float


class Journal:
    """Keeps what a run has said so far and tells the loggers.

    Args:
        settings: How often a step makes a row, and whether a loss that is not finite ends the run.
        loggers: Told of each row.
        last_step: Returns the step that the loop has reached.

    Runs on:
        The writer thread in ``overlap``, the loop thread in ``textbook``.
    """

    def __init__(
        self,
        settings: Settings,
        loggers: Sequence[Logger],
        last_step: Callable[[], int],
    ) -> None:
        self._loggers, self._every_n = loggers, settings.log_every_n_steps
        self._stops_on_nonfinite = settings.on_nonfinite == "stop"
        self._last_step = last_step
        self.losses = array("d")
        self.last_values: dict[str, float] = {}

    def note_step(self, done: StepDone, values: dict[str, float]) -> None:
        """Take a step's numbers; write a row if it is its turn."""
        loss = values["train/loss"]
        self.losses.append(loss)
        self.last_values = values
        if done.step % self._every_n == 0:
            values["time/step_ms"] = done.step_s * 1e3
            values["time/data_wait_ms"] = done.data_wait_s * 1e3
            self.note_row(Row(done.step, done.epoch, values))
        if self._stops_on_nonfinite and not isfinite(loss):
            raise NonFiniteError(done.step - 1, self._last_step() - 1, loss)

    def note_row(self, row: Row) -> None:
        """Write a row whose numbers the host already had."""
        for logger in self._loggers:
            try:
                logger.log(row)
            except Exception as error:
                add_stage_note(error, f"log ({type(logger).__name__})", step=row.step)
                raise

    def flush(self) -> None:
        """Make what was written readable by others."""
        for logger in self._loggers:
            logger.flush()


class Outbound(Protocol):
    """Where the loop puts its numbers."""

    def put_step(self, done: StepDone, scalars: Scalars) -> None:
        """Take a step's scalars, on their device."""

    def put_row(self, row: Row) -> None:
        """Take a row of the host's."""

    def flush(self) -> None:
        """Return when everything put so far is in the journal and with the loggers."""


class DirectOutbound:
    """Reads each step's scalars at once and logs them, on the loop thread."""

    def __init__(self, backend: Backend, journal: Journal) -> None:
        self._read, self._journal = backend.read, journal

    def put_step(self, done: StepDone, scalars: Scalars) -> None:
        values = {
            name: self._read(value) if isinstance(value, torch.Tensor) else value
            for name, value in scalars.items()
        }
        self._journal.note_step(done, values)

    def put_row(self, row: Row) -> None:
        self._journal.note_row(row)

    def flush(self) -> None:
        self._journal.flush()


_Item: TypeAlias = "tuple[StepDone, Pending] | Row"


class BeltOutbound:
    """Starts a deferred read for each step; the writer thread resolves and logs it."""

    def __init__(self, scope: Scope, backend: Backend, journal: Journal) -> None:
        self._readback, self._journal = Readback(backend), journal
        self._writer: Writer[_Item] = Writer(scope, self._write, name="writer")

    def put_step(self, done: StepDone, scalars: Scalars) -> None:
        self._writer.put((done, self._readback.start(scalars)))

    def put_row(self, row: Row) -> None:
        self._writer.put(row)

    def flush(self) -> None:
        self._writer.flush()

    @LOGGING
    def _write(self, items: list[_Item]) -> None:
        try:
            for item in items:
                if isinstance(item, Row):
                    self._journal.note_row(item)
                else:
                    self._journal.note_step(item[0], item[1].resolve())
        finally:
            self._journal.flush()
