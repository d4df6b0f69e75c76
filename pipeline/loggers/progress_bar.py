"""What a run shows while it runs: a bar on a terminal or in a notebook, plain lines anywhere else.

It is a logger like any other: it runs where the loggers run, is refreshed by the rows that come, and
never reads from the device.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Protocol, TextIO

from pipeline.batch import Progress, Row
from pipeline.every import Every
from pipeline.loggers.drawing import NotebookBar, PlainLines, TerminalBar
from pipeline.protocols import RunInfo

_REFRESH_S, _LINE_S = 0.1, 10.0


class Bar(Protocol):
    """Draws how far something is."""

    def begin(self, done: int) -> None:
        """Take so much as done before: the time that is left is worked out from the rest."""

    def show(self, done: int, text: str) -> None:
        """Draw it anew."""

    def note(self, line: str) -> None:
        """Leave a line that stays."""

    def close(self) -> None:
        """Leave it as it is."""


class ProgressBar:
    """Show step, epoch, loss, samples per second, the share of data wait and the time left.

    Above the bar stays a line for each epoch and validation. A validation has a bar of its own while it
    runs. In a pipe or a file there is a line every ten seconds instead.

    Args:
        num_steps: Optimizer steps to come, or None where nobody knows.
        stream: Where it goes; standard error unless told.
        every: When to draw; ten times a second unless told, or every ten seconds in plain lines.
    """

    name = "ProgressBar"

    def __init__(
        self, num_steps: int | None, stream: TextIO | None = None, every: Every | None = None
    ) -> None:
        self._stream = stream or sys.stderr
        self._is_plain = not is_notebook() and not _has_room(self._stream)
        self._every = every or Every(seconds=_LINE_S if self._is_plain else _REFRESH_S)
        self._bar = self._make(num_steps, "step")
        self._validation: Bar | None = None
        self._last: Row | None = None
        self._is_shown = True

    def open(self, info: RunInfo) -> None:
        self._bar.begin(info.resumed_step or 0)

    def log(self, row: Row) -> None:
        if "train/loss" not in row.values:
            words = [f"{name} {value:.4g}" for name, value in row.values.items()]
            self._bar.note(" ".join([f"epoch {row.epoch} step {row.step}", *words]))
            return
        self._last, self._is_shown = row, False
        if self._every.is_due(row.step):
            self._show()

    def log_progress(self, progress: Progress) -> None:
        """Show how far a validation is; it disappears when it is done."""
        if self._is_plain:
            return  # its result is a line anyway
        if self._validation is None:
            self._validation = self._make(progress.total, "batch", leave=False)
        self._validation.show(progress.done, progress.stage)
        if progress.is_last:
            self._validation.close()
            self._validation = None

    def flush(self) -> None:
        if not self._is_plain:
            self._show()

    def close(self) -> None:
        if self._validation is not None:
            self._validation.close()
        self.flush()
        self._bar.close()

    def _make(self, total: int | None, unit: str, *, leave: bool = True) -> Bar:
        if is_notebook():
            return NotebookBar(total, unit, leave=leave)
        if self._is_plain:
            return PlainLines(total, self._stream)
        return TerminalBar(total, unit, self._stream, leave=leave)

    def _show(self) -> None:
        if self._last is not None and not self._is_shown:
            self._is_shown = True
            self._bar.show(self._last.step, _text(self._last))


def _text(row: Row) -> str:
    values = row.values
    words = [f"epoch {row.epoch}, loss {values['train/loss']:.4g}"]
    if "rate/samples_per_s" in values:
        words.append(f"{values['rate/samples_per_s']:,.0f} samples/s")
    if values.get("time/step_ms"):
        words.append(f"data wait {values['time/data_wait_ms'] / values['time/step_ms']:.0%}")
    return ", ".join(words)


def is_notebook() -> bool:
    """Say whether this is a notebook's kernel, where a terminal's control characters are no use."""
    ipython: Any = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in getattr(shell, "config", {})


def _has_room(stream: TextIO) -> bool:
    """Say whether it is a terminal that has columns to draw in; some that programs open have none."""
    if not stream.isatty():
        return False
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except OSError:
        return True
