"""A logger in a process of its own, for a backend that holds the GIL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pipeline.batch import Media, Row
from pipeline.concurrency import Child, ChildDiedError
from pipeline.errors import ConfigError, WorkerDiedError
from pipeline.protocols import Logger, RunInfo

_MAX_WAITING = 256  # rows, where nobody flushes


class InProcess:
    """Run a logger in a process: what is left here is pickling its rows.

        loggers=[InProcess(MlflowLogger, experiment="digits")]

    The process starts with the run, which takes it some seconds, and ends with it; a second process
    needs a core. An error of the logger comes out of the next flush but one, or of `close`.

    Args:
        factory: The logger's class, or any function of an importable module that returns one.
        arguments: Passed to it in the process.
        keywords: Passed to it in the process.

    Raises:
        ConfigError: If the process could not import `factory`.

    Runs on:
        The writer thread in ``overlap``; waits there, with the GIL released, while the process has not
        done with the rows before.
    """

    def __init__(self, factory: Callable[..., Logger], *arguments: Any, **keywords: Any) -> None:
        inner = factory.func if isinstance(factory, partial) else factory
        self._backend = getattr(inner, "__qualname__", type(inner).__name__)
        if getattr(inner, "__module__", None) == "__main__" or "<locals>" in self._backend:
            raise ConfigError(
                f"InProcess needs a factory that another process can import, got {self._backend} of the "
                "script itself. Move it to a module of its own."
            )
        self.name = f"{self._backend} (process)"
        self._make = partial(Served, factory, arguments, keywords)
        self._child: Child | None = None
        self._rows: list[tuple[Any, ...]] = []

    def open(self, info: RunInfo) -> None:
        self._child = Child(self._make)
        self._send("open", info)

    def log(self, row: Row) -> None:
        self._rows.append(tuple(row))  # pickles in half the time of a named tuple
        if len(self._rows) >= _MAX_WAITING:
            self._send_rows()

    def log_media(self, media: Media) -> None:
        self._send_rows()
        self._send("log_media", media)

    def flush(self) -> None:
        if self._rows:
            self._send_rows()

    def mark_failed(self) -> None:
        self._send("mark_failed")

    def close(self) -> None:
        if self._child is None:
            return
        try:
            self._send_rows()
            self._send("close")
            self._asking(self._child.wait)
        finally:
            self._child.close()

    def _send_rows(self) -> None:
        rows, self._rows = self._rows, []
        self._send("log_rows", rows)

    def _send(self, method: str, *arguments: Any) -> None:
        assert self._child is not None
        self._asking(partial(self._child.send, [(method, arguments)]))

    def _asking(self, ask: Callable[[], None]) -> None:
        try:
            ask()
        except ChildDiedError as error:
            raise WorkerDiedError(
                f"the process of {self._backend} ended with exit code {error.exit_code} before it had "
                "written everything. What it said stands on standard error; a negative code is a signal, "
                "-9 often that memory ran out.",
                stage="log",
            ) from error


class Served:
    """The logger in the process, and whatever it does not have made harmless."""

    def __init__(
        self, factory: Callable[..., Logger], arguments: Sequence[Any], keywords: dict[str, Any]
    ) -> None:
        self._logger: Any = factory(*arguments, **keywords)

    def log_rows(self, rows: Sequence[tuple[Any, ...]]) -> None:
        for row in rows:
            self._logger.log(Row(*row))
        self._logger.flush()

    def open(self, info: RunInfo) -> None:
        self._call_if_there("open", info)

    def log_media(self, media: Media) -> None:
        self._call_if_there("log_media", media)

    def mark_failed(self) -> None:
        self._call_if_there("mark_failed")

    def close(self) -> None:
        self._logger.close()

    def _call_if_there(self, method: str, *arguments: Any) -> None:
        bound = getattr(self._logger, method, None)
        if bound is not None:
            bound(*arguments)
