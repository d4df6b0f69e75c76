"""One line for each epoch and validation; on a terminal, a bar below them."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any, TextIO

from tqdm import tqdm

from pipeline.batch import Row

_REFRESH_S = 0.1


class _Bar(tqdm):  # type: ignore[type-arg]
    """tqdm without what would outlive a run: its monitor thread, and its lock between processes."""

    monitor_interval = 0


class ProgressBar:
    """Show steps, epoch and loss, and what each epoch and validation gave.

    A logger like any other, so it runs where the loggers run and never reads from the device.

    Args:
        num_steps: Optimizer steps to come, or None where nobody knows.
        stream: Where it goes; standard error unless told.
    """

    def __init__(self, num_steps: int | None, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._shown_step, self._shown_at_s = 0, 0.0
        self._bar: Any = None
        self._last: Row | None = None
        if _has_room(self._stream):
            _Bar.set_lock(threading.RLock())
            self._bar = _Bar(
                total=num_steps, unit="step", mininterval=0, dynamic_ncols=True, file=self._stream
            )

    def log(self, row: Row) -> None:
        if "train/loss" not in row.values:
            self._note_epoch(row)
        else:
            self._last = row
            if self._bar is not None and time.perf_counter() - self._shown_at_s >= _REFRESH_S:
                self._show(row)

    def flush(self) -> None:
        if self._last is not None and self._bar is not None:
            self._show(self._last)

    def close(self) -> None:
        self.flush()
        if self._bar is not None:
            self._bar.close()

    def _show(self, row: Row) -> None:
        self._shown_at_s = time.perf_counter()
        loss = row.values.get("train/loss", float("nan"))
        self._bar.set_postfix_str(f"epoch {row.epoch}, loss {loss:.4g}", refresh=False)
        self._bar.update(row.step - self._shown_step)
        self._shown_step = row.step

    def _note_epoch(self, row: Row) -> None:
        words = [f"{name} {value:.4g}" for name, value in row.values.items()]
        line = " ".join([f"epoch {row.epoch} step {row.step}", *words])
        if self._bar is None:
            print(line, file=self._stream, flush=True)
        else:
            self._bar.write(line, file=self._stream)  # above the bar, where it stays


def _has_room(stream: TextIO) -> bool:
    """Say whether it is a terminal that has columns to draw in; some that programs open have none."""
    if not stream.isatty():
        return False
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except OSError:
        return True
