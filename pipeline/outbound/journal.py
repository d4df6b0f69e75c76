"""What a run has said so far: every step's loss, and the rows that the loggers are told."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable
from math import isfinite
from pathlib import Path

from pipeline.batch import Media, Row
from pipeline.errors import NonFiniteCause, NonFiniteError
from pipeline.loggers import LoggerGroup
from pipeline.outbound.rates import Rates, StepDone
from pipeline.report import SaveReport
from pipeline.settings import Settings
from pipeline.step.guard import BUFFERS, GRADIENTS, HUGE, LEFT_OUT, SCALED, SKIPPED, SPOILED, UPDATE

RECENT_STEPS = 256
_CAUSES: tuple[tuple[int, NonFiniteCause], ...] = (
    (GRADIENTS, "gradients"),
    (HUGE, "size"),
    (BUFFERS, "buffers"),
    (UPDATE, "update"),
)


class Journal:
    """Takes every step's numbers in order, and tells the loggers.

    Args:
        settings: How often a step makes a row, what happens to rows that come too late, and whether a
            loss that is not finite ends the run.
        loggers: Told of the rows.
        rates: Adds samples per second and the like to a row.
        last_step: Returns the step that the loop has reached.

    Attributes:
        on_nonfinite: Told of each step that was not finite; returns the file that it has written, if any.
        on_step: Told of every step's numbers, in order, a row or not; None for nobody.
        losses: Of every step, whatever becomes of its row.
        step_s: The time of every step, in seconds.
        wait_s: How much of it was spent waiting for batches.
        recent: The last steps.
        last_values: The numbers of the last step.
        num_undelivered: Rows that the loggers have not been told yet.
        num_dropped: Rows that they never will be.

    Runs on:
        The writer thread in ``overlap``, the loop thread in ``textbook``.
    """

    def __init__(
        self,
        settings: Settings,
        loggers: LoggerGroup,
        rates: Rates,
        last_step: Callable[[], int],
    ) -> None:
        self.loggers, self._rates, self._every_n = loggers, rates, settings.log_every_n_steps
        self._max_lag = settings.max_log_lag if settings.log_overflow == "drop" else None
        self._on_nonfinite = settings.on_nonfinite
        self.last_step = last_step
        self.on_step: Callable[[StepDone, dict[str, float]], None] | None = None
        self._rows: list[Row] = []
        self.on_nonfinite: Callable[[StepDone, float], Path | None] | None = None
        self.losses, self.step_s, self.wait_s = array("d"), array("d"), array("d")
        self.recent: deque[StepDone] = deque(maxlen=RECENT_STEPS)
        self.last_values: dict[str, float] = {}
        self.num_dropped = 0
        self._of_save: dict[str, float] = {}

    @property
    def num_undelivered(self) -> int:
        return len(self._rows)

    def note_step(self, done: StepDone, values: dict[str, float], *, reached: int | None = None) -> None:
        """Take a step's numbers; make a row if it is its turn.

        Args:
            done: The step.
            values: Its numbers; kept.
            reached: The step that the loop had reached when it put them here; the last one unless told.
        """
        loss = values["train/loss"]
        found = int(values.pop(SKIPPED, 0.0))
        self.losses.append(loss)
        self.step_s.append(done.step_ns / 1e9)
        self.wait_s.append(done.data_wait_ns / 1e9)
        self.recent.append(done)
        self.last_values = values
        if found & LEFT_OUT and self._on_nonfinite == "skip":
            values[SKIPPED] = 1.0
        if self.on_step is not None:
            self.on_step(done, values)
        if done.step % self._every_n == 0:
            if self._max_lag is not None and (reached or self.last_step()) - done.step > self._max_lag:
                self.num_dropped += 1
            else:
                self._rates.add_to(values, done)
                if self._of_save:
                    values |= self._of_save
                    self._of_save = {}
                self._rows.append(Row(done.step, done.epoch, values))
        if not isfinite(loss) or (found and not found & SCALED):
            self._note_nonfinite(done, loss, found)

    def _note_nonfinite(self, done: StepDone, loss: float, found: int) -> None:
        if self._on_nonfinite == "ignore":
            return
        path = None if self.on_nonfinite is None else self.on_nonfinite(done, loss)
        if self._on_nonfinite == "stop" or found & SPOILED:
            error = NonFiniteError(done.step - 1, self.last_step() - 1, loss, cause=_cause(found, loss))
            error.was_left_out, error.samples_path = bool(found & LEFT_OUT), path
            raise error

    def note_save(self, report: SaveReport) -> None:
        """Take what a checkpoint cost; it stands in the next step's row."""
        self._of_save = {"time/save_stall_ms": report.stall_s * 1e3, "time/save_ms": report.write_s * 1e3}

    def note_row(self, row: Row) -> None:
        """Take a row whose numbers the host already had; it is never dropped."""
        self._rows.append(row)

    def note_media(self, media: Media) -> None:
        """Take an image, a histogram or a text."""
        self.deliver()
        self.loggers.log_media(media)

    def deliver(self) -> None:
        """Tell the loggers of the rows so far."""
        if self._rows:
            rows, self._rows = self._rows, []
            self.loggers.log(rows)

    def flush(self) -> None:
        """Tell them, and make what was written readable by others."""
        self.deliver()
        self.loggers.flush()


def _cause(found: int, loss: float) -> NonFiniteCause:
    return "loss" if not isfinite(loss) else next((name for bit, name in _CAUSES if found & bit), "loss")
