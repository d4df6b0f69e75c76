"""A logger that keeps its rows."""

from __future__ import annotations

import threading

from pipeline.batch import Row


class InMemoryLogger:
    """Keeps rows in a list, and the names of the threads that logged them.

    Attributes:
        rows: In the order in which they came.
        threads: The names of the threads that called `log`.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.threads: set[str] = set()
        self.is_closed = False

    def log(self, row: Row) -> None:
        self.rows.append(row)
        self.threads.add(threading.current_thread().name)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True
