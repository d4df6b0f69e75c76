"""A process that calls the methods of one object, in order, behind two pipes.

What holds the GIL of this process for long leaves it nothing by moving to a thread; in a process it has
a GIL of its own. The child is a fresh interpreter, not a fork: this process has threads. It ends when
its standard input does; a fork of its owner may have that too, and what the object does may hang, so it
looks at the owner's process as well. Signals that are sent to both it leaves to the owner
(`ignored_signals`).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, TypeAlias

from pipeline.concurrency.processes.fork_server import pickled_error
from pipeline.concurrency.processes.ignored_signals import become_deaf, starting_deaf

LAST_WORDS_S = 5.0  # of a process whose owner was killed
Call: TypeAlias = tuple[str, tuple[Any, ...]]

_PROGRAM = (
    "import sys; sys.path[:] = {path!r}; "
    "from pipeline.concurrency.processes.child import serve; serve({owner})"
)


class ChildDiedError(Exception):
    """The process has gone without an answer.

    Args:
        exit_code: Of the process; negative for a signal.
    """

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(f"the process ended with exit code {exit_code}")


class Child:
    """Starts the process and the object in it.

    Args:
        make: Returns the object; called in the process. Must be picklable.

    Runs on:
        The thread that calls it. `send` waits, with the GIL released, until the calls sent before have
        been made: one batch is under way at a time, which bounds what waits in the pipe.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        command = [sys.executable, "-c", _PROGRAM.format(path=sys.path, owner=os.getpid())]
        with starting_deaf():
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._is_under_way = False
        self._write(make)

    def send(self, calls: Sequence[Call]) -> None:
        """Have methods called, once the calls before have been made.

        Raises:
            ChildDiedError: If the process has gone.
            Exception: What a call before has raised.
        """
        self.wait()
        self._write(calls)

    def wait(self) -> None:
        """Return when every call has been made; raise what one of them has raised."""
        if not self._is_under_way:
            return
        self._is_under_way = False
        try:
            error = pickle.load(self._pipe(self._process.stdout))
        except EOFError:
            raise ChildDiedError(self._process.wait()) from None
        if error is not None:
            raise error

    def close(self) -> None:
        """End the process, and wait for it."""
        with contextlib.suppress(BrokenPipeError):  # it has gone already, which `wait` has said
            self._pipe(self._process.stdin).close()
        self._pipe(self._process.stdout).close()
        self._process.wait()

    def _write(self, message: Any) -> None:
        try:
            pickle.dump(message, self._pipe(self._process.stdin), pickle.HIGHEST_PROTOCOL)
            self._pipe(self._process.stdin).flush()
        except BrokenPipeError:
            raise ChildDiedError(self._process.wait()) from None
        self._is_under_way = True

    @staticmethod
    def _pipe(pipe: Any) -> BinaryIO:
        assert pipe is not None
        return pipe  # type: ignore[no-any-return]


def serve(owner: int) -> None:
    """Answer an owner's calls until it closes the pipe; runs in the process."""
    become_deaf()
    threading.Thread(target=_end_with, args=(owner,), name="owner", daemon=True).start()
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what the object prints must not get into the answers
    served: Any = None
    error: BaseException | None = None
    while True:
        try:
            message = pickle.load(requests)
        except EOFError:
            return
        except Exception as unreadable:
            message, error = (), error or unreadable
        if error is None:
            try:
                served = _handle(served, message)
            except BaseException as raised:
                error = raised
        replies.write(pickle.dumps(None) if error is None else pickled_error(error))
        replies.flush()


def _end_with(owner: int) -> None:
    """End this process when its owner has ended, but for what it may still have to write."""
    if not hasattr(os, "pidfd_open"):
        return  # not Linux
    with contextlib.suppress(ProcessLookupError):  # it has ended already
        poller = select.poll()
        poller.register(os.pidfd_open(owner), select.POLLIN)
        poller.poll()
    time.sleep(LAST_WORDS_S)
    os._exit(1)


def _handle(served: Any, message: Any) -> Any:
    """Make the object, which is what the first message asks for, or call its methods."""
    if served is None:
        return message()
    for method, arguments in message:
        getattr(served, method)(*arguments)
    return served
