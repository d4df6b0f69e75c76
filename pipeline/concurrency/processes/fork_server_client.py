"""The fork server as this process sees it: started once, and kept."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from pipeline.concurrency.processes.ignored_signals import starting_deaf

_PROGRAM = (
    "import sys; sys.path[:] = {path!r}; from pipeline.concurrency.processes.fork_server import serve; "
    "serve({file}, {owner}, {modules!r})"
)
# A library's pool of threads, started by its import, would make forks unsafe; a worker has one core.
# Where a worker is given more, because the trainer has them, they must not spin for its cores.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


class ForkServer:
    """The one process of this process that forks nurseries; it is kept, for the next run starts warm.

    It has the interpreter's options, such as ``-O`` and ``-W``, as the processes of `multiprocessing` do.

    Args:
        modules: What it imports before the first fork.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        program = _PROGRAM.format(
            path=_import_path(), file=theirs.fileno(), owner=os.getpid(), modules=list(modules)
        )
        with theirs, starting_deaf():
            self._process = subprocess.Popen(
                [sys.executable, *subprocess._args_from_interpreter_flags(), "-c", program],  # type: ignore[attr-defined]
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **ONE_THREAD},
            )
        self._control = ours
        self.owner = os.getpid()

    @property
    def is_usable(self) -> bool:
        """Whether it belongs to this process, which may be a fork, and is alive."""
        return self.owner == os.getpid() and self._process.poll() is None

    def open_nursery(self) -> socket.socket:
        """Have a nursery forked; it answers once the server has finished its imports.

        Raises:
            ServerDiedError: If the server has ended.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                socket.send_fds(self._control, [b"fork"], [theirs.fileno()])
        except (BrokenPipeError, ConnectionResetError):
            ours.close()
            raise ServerDiedError(self._process.wait()) from None
        return ours

    def let_go(self) -> None:
        """Close what this process has of a server that has ended, or that is another process's."""
        self._control.close()

    def close(self) -> None:
        """End it, and wait for it."""
        self._control.shutdown(socket.SHUT_RDWR)  # a fork of this process may have the socket too
        self._control.close()
        self._process.wait()


class ServerDiedError(Exception):
    """The fork server has ended, with this exit code; negative for a signal."""


_server: ForkServer | None = None
_server_lock = threading.Lock()


def fork_server(modules: Sequence[str] = ()) -> ForkServer:
    """Return the process's fork server, started if there is none."""
    global _server
    with _server_lock:
        if _server is not None and not _server.is_usable:
            _server.let_go()
            _server = None
        if _server is None:
            _server = ForkServer(modules)
        return _server


def open_nursery(modules: Sequence[str] = ()) -> socket.socket:
    """Have a nursery forked; by a new server, if somebody has killed the one that there was."""
    try:
        return fork_server(modules).open_nursery()
    except ServerDiedError:
        return fork_server(modules).open_nursery()


def preparation() -> dict[str, Any]:
    """Return what a fresh process needs to find the modules of this one, `__main__` left out."""
    found = {"sys_path": _import_path(), "sys_argv": list(sys.argv), "dir": os.getcwd()}
    method = multiprocessing.get_start_method(allow_none=True)  # of what a dataset starts itself
    return found if method is None else {**found, "start_method": method}


def _import_path() -> list[str]:
    return [each for each in sys.path if isinstance(each, str)]  # as the interpreter, which skips others
