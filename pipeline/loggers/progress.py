"""The bar on a terminal; in a pipe or a log file, one line for each epoch."""

from __future__ import annotations

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
    """Show steps, epoch, loss and the last validation.

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
        self._validated = ""
        if self._stream.isatty():
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
        words = [f"epoch {row.epoch}", f"loss {row.values.get('train/loss', float('nan')):.4g}"]
        self._bar.set_postfix_str(", ".join([*words, self._validated]).rstrip(", "), refresh=False)
        self._bar.update(row.step - self._shown_step)
        self._shown_step = row.step

    def _note_epoch(self, row: Row) -> None:
        words = {name: f"{name} {value:.4g}" for name, value in row.values.items()}
        self._validated = " ".join(text for name, text in words.items() if name.startswith("val/"))
        if self._bar is None:
            text = " ".join(words.values())
            print(f"epoch {row.epoch} step {row.step} {text}", file=self._stream, flush=True)
