"""What is logged and warned of in a worker process, heard in the script's.

A worker has the levels of the script's loggers, and its filters of warnings; handlers it has none. What is
not filtered goes along with the answer to the job, in a file of its own, and is given to the script's own
loggers and to its `warnings.showwarning`: so it comes to every handler there is, once, and no file is opened
twice. It is heard when the batch is taken in, in the order of the worker; what a worker said of a batch that
it died of is lost with it.
"""

from __future__ import annotations

import logging
import os
import pickle
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeAlias

Saying: TypeAlias = tuple[str, Any]
"""``("record", a LogRecord)`` or ``("warning", (message, category, file name, line))``."""


class Talk:
    """Keeps what is said in a worker until it is taken; the process's loggers and warnings say it here.

    Runs on:
        Any thread of the worker: an append, and taking from the left, are each one operation.
    """

    def __init__(self) -> None:
        self._said: deque[bytes] = deque()

    def listen(self) -> None:
        """Have this process's loggers and warnings say it here and nowhere else."""
        say_record, say_warning = self._say_record, self._say_warning

        def handle(logger: logging.Logger, record: logging.LogRecord) -> None:
            say_record(record)

        def show(
            message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None
        ) -> None:
            say_warning(message, category, filename, lineno)

        logging.Logger.handle = handle  # type: ignore[method-assign, assignment]
        warnings.showwarning = show

    def take(self) -> int | None:
        """Return the descriptor of a file with what was said, or None if nothing was."""
        if not self._said:
            return None
        said = [self._said.popleft() for _ in range(len(self._said))]
        file = os.memfd_create("talk")
        with open(os.dup(file), "wb") as writer:
            pickle.dump(said, writer, pickle.HIGHEST_PROTOCOL)
        return file

    def _say_record(self, record: logging.LogRecord) -> None:
        found = logging.makeLogRecord(vars(record))
        with suppress(Exception):  # else its handlers say so, as they do in the script
            found.msg, found.args = record.getMessage(), None
        if record.exc_info:
            found.exc_text = logging.Formatter().formatException(record.exc_info)
            found.exc_info = None
        plain = {name: each for name, each in vars(found).items() if _is_picklable(each)}
        self._said.append(pickle.dumps(("record", plain)))

    def _say_warning(self, message: Any, category: Any, filename: str, lineno: int) -> None:
        if not _is_picklable((message, category)):
            message, category = str(message), UserWarning
        self._said.append(pickle.dumps(("warning", (message, category, filename, lineno))))


def hear(file: int, known: dict[Any, Any]) -> None:
    """Give what a worker said to this process's own loggers and warnings; closes the file.

    Args:
        file: From `Talk.take`.
        known: Warnings that were shown, as modules keep them: one that several workers give is shown once.
    """
    with open(file, "rb") as reader:
        reader.seek(0)
        said = pickle.load(reader)
    for each in said:
        kind, found = pickle.loads(each)
        _HEAR[kind](found, known)


def _hear_record(found: dict[str, Any], known: dict[Any, Any]) -> None:
    logger = logging.getLogger(None if found["name"] == "root" else found["name"])
    if logger.isEnabledFor(found["levelno"]):  # the script may have changed its mind
        name = logging.getLevelName(found["levelno"])  # a level may have a name in the script alone
        logger.handle(logging.makeLogRecord(found | {"levelname": name}))


def _hear_warning(found: tuple[Any, ...], known: dict[Any, Any]) -> None:
    message, category, filename, lineno = found
    warnings.warn_explicit(message, category, filename, lineno, registry=known)


_HEAR: dict[str, Callable[[Any, dict[Any, Any]], None]] = {"record": _hear_record, "warning": _hear_warning}


def _is_picklable(found: Any) -> bool:
    if isinstance(found, (str, int, float, type(None))):
        return True
    try:
        pickle.dumps(found)
    except Exception:
        return False
    return True
