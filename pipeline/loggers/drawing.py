"""Three ways to draw how far something is."""

from __future__ import annotations

import html
import sys
import threading
import time
from typing import Any, TextIO

from tqdm import tqdm


class _Tqdm(tqdm):  # type: ignore[type-arg]
    """tqdm without what would outlive a run: its monitor thread, and its lock between processes."""

    monitor_interval = 0


class TerminalBar:
    """tqdm, drawn when it is told to.

    Args:
        total: Units to come, or None where nobody knows.
        unit: What is counted.
        stream: A terminal.
        leave: Whether it stays when it is done.
    """

    def __init__(self, total: int | None, unit: str, stream: TextIO, *, leave: bool = True) -> None:
        _Tqdm.set_lock(threading.RLock())
        self._stream = stream
        self._bar: Any = _Tqdm(
            total=total, unit=unit, mininterval=0, dynamic_ncols=True, file=stream, leave=leave
        )

    def begin(self, done: int) -> None:
        self._bar.initial = self._bar.n = done

    def show(self, done: int, text: str) -> None:
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(done - self._bar.n)

    def note(self, line: str) -> None:
        self._bar.write(line, file=self._stream)  # above the bar, where it stays

    def close(self) -> None:
        self._bar.close()


class _Pace:
    """How far, and how long it will still take at the pace so far."""

    def __init__(self, total: int | None) -> None:
        self.total, self.first, self._began_s = total, 0, time.monotonic()

    def text(self, done: int) -> str:
        spent_s = time.monotonic() - self._began_s
        if self.total is None:
            return f"{done} in {_clock(spent_s)}"
        left_s = spent_s / (done - self.first) * (self.total - done) if done > self.first else 0.0
        return f"{done}/{self.total}, {_clock(spent_s)} and {_clock(left_s)} to go"


class PlainLines:
    """A line each time, for a pipe or a file."""

    def __init__(self, total: int | None, stream: TextIO) -> None:
        self._pace, self._stream = _Pace(total), stream

    def begin(self, done: int) -> None:
        self._pace.first = done

    def show(self, done: int, text: str) -> None:
        self.note(f"step {self._pace.text(done)}: {text}")

    def note(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def close(self) -> None: ...


class NotebookBar:
    """A bar of plain HTML below the cell: it needs no widgets, so it works in every front end.

    Args:
        total: Units to come, or None where nobody knows.
        unit: What is counted.
        leave: Whether it stays when it is done.
    """

    def __init__(self, total: int | None, unit: str, *, leave: bool = True) -> None:
        self._display: Any = sys.modules["IPython"].display
        self._pace, self._unit, self._leave = _Pace(total), unit, leave
        self._handle: Any = self._display.display(self._drawn(0, ""), display_id=True)

    def begin(self, done: int) -> None:
        self._pace.first = done

    def show(self, done: int, text: str) -> None:
        self._handle.update(self._drawn(done, text))

    def note(self, line: str) -> None:
        print(line)

    def close(self) -> None:
        if not self._leave:
            self._handle.update(self._display.HTML(""))

    def _drawn(self, done: int, text: str) -> Any:
        total = self._pace.total
        bar = f'<progress value="{done}" max="{total}"></progress> ' if total else ""
        return self._display.HTML(f"{bar}{self._unit} {self._pace.text(done)} {html.escape(text)}")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
