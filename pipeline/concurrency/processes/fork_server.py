"""The processes behind a `WorkerPool`: a fork server, a nursery for each pool, and its workers.

    this process ─ starts once ─→ fork server ─ forks ─→ nursery ─ forks ─→ workers
                                  (has torch)            (has the dataset)   (make batches)

A process with threads must not fork: a lock that another thread holds stays locked in the child for ever.
So forks are made by a process that has never had a second thread. Importing torch takes two seconds, once;
a **nursery** is forked in milliseconds, is given the dataset once, and forks workers that share it with
it, page by page, until they write to it. A worker that has died is replaced as quickly.

Nobody outlives this process. The fork server sees it end, by a descriptor of the process and not by its
parent's death, which would be reported when the *thread* ends that started it, and kills the nurseries. A
nursery whose server was killed goes on, until its pool is closed or its owner has ended. Workers are killed
by the kernel when their nursery dies, which has one thread. All are deaf to what is sent to every process
of a program and is the trainer's to handle (`ignored_signals`).
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import importlib
import importlib.util
import io
import logging
import os
import pickle
import select
import signal
import socket
import sys
import traceback
import types
from collections.abc import Callable
from multiprocessing import spawn
from typing import Any, TypeAlias

from pipeline.concurrency.processes.ignored_signals import become_deaf, hear_in_forks
from pipeline.concurrency.reimport import nothing_taken

RunWorker: TypeAlias = Callable[[socket.socket, int], None]
"""Runs in a worker, given the socket of its jobs and its number of threads."""

MAX_MESSAGE_BYTES = 1 << 16
MAX_FILES = 3
_FILES_BYTES = socket.CMSG_SPACE(MAX_FILES * array.array("i").itemsize)

_PR_SET_PDEATHSIG = 1
_nursery_pid = 0


def is_nursery() -> bool:
    """Say whether this process is a nursery or a worker of one."""
    return _nursery_pid != 0


def serve(control_file: int, owner: int, modules: list[str]) -> None:
    """Fork a nursery for each message, until the owner is gone; runs in the fork server."""
    become_deaf()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries nurseries
    try:
        control, owner_file = socket.socket(fileno=control_file), os.pidfd_open(owner)
    except ProcessLookupError:
        return  # it has ended already
    for name in modules:
        importlib.import_module(name)
    nurseries = _serve(control, owner_file)
    for nursery in nurseries:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(nursery, signal.SIGKILL)


def _serve(control: socket.socket, owner_file: int) -> set[int]:
    """Fork until there is nobody to fork for; return the nurseries, each by a descriptor of its process."""
    poller, nurseries = select.poll(), set[int]()
    for file in (control.fileno(), owner_file):
        poller.register(file, select.POLLIN)
    while True:
        ready = {file for file, _ in poller.poll()}
        for ended in ready & nurseries:
            poller.unregister(ended)
            nurseries.remove(ended)
            os.close(ended)
        if owner_file in ready:
            return nurseries
        if control.fileno() not in ready:
            continue
        message, files = receive(control)
        if not message:
            return nurseries
        if _is_open(files[0]):  # else the pool was closed before its turn came
            if (child := os.fork()) == 0:
                control.close()
                for file in (owner_file, *nurseries):
                    os.close(file)
                run_to_the_end(lambda: _nurse(files[0]))  # noqa: B023
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                nurseries.add(nursery := os.pidfd_open(child))
                poller.register(nursery, select.POLLIN)
        os.close(files[0])


def _is_open(file: int) -> bool:
    poller = select.poll()
    poller.register(file, 0)
    return not poller.poll(0)  # nothing but the end of the other side is reported


def _nurse(control_file: int) -> None:
    """Get the pool's program and data, then fork a worker for each socket that is sent."""
    with socket.socket(fileno=control_file) as control:
        _nurse_by(control)


def _nurse_by(control: socket.socket) -> None:
    global _nursery_pid
    _nursery_pid = os.getpid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with contextlib.suppress(BrokenPipeError):
        control.send(pickle.dumps(("born", os.getpid())))
    try:
        message, files = receive(control, 3 * MAX_MESSAGE_BYTES)  # with the whole environment
        preparation, environment, home, name, arguments = pickle.loads(message)
        os.environ.clear()
        os.environ.update(environment)
        with nothing_taken():
            _prepare(preparation)
            run_worker: RunWorker = getattr(importlib.import_module(home), name)(*files, *arguments)
    except BaseException as error:
        with contextlib.suppress(BrokenPipeError):
            control.send(pickle.dumps(("failed", pickled_error(error))))
        return
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # nobody wants it any more
        control.send(pickle.dumps(("ready", None)))
        _fork_workers(control, run_worker)


def _prepare(preparation: dict[str, Any]) -> None:
    """Do as `multiprocessing.spawn.prepare` does, but import the started script so that it can be changed.

    There its functions have other globals than the module `__main__` has: to set one would change nothing.
    """
    # A module that opens its log file when it is imported must not cut off what the script has written there.
    logging.FileHandler._open = _open_nothing  # type: ignore[method-assign, assignment]
    path, name = (preparation.pop(f"init_main_from_{each}", None) for each in ("path", "name"))
    spawn.prepare(preparation)
    if path is not None:
        with io.open_code(path) as file:
            _run_as_main(compile(file.read(), path, "exec"), __file__=path, __package__="")
    elif name is not None:
        spec: Any = importlib.util.find_spec(name)
        code = spec.loader.get_code(name)
        _run_as_main(code, __file__=spec.origin, __package__=spec.parent, __spec__=spec)


def _open_nothing(handler: logging.FileHandler) -> io.TextIOWrapper:
    return open(os.devnull, "w", encoding="utf-8")


def _run_as_main(code: types.CodeType, **names: Any) -> None:
    main = types.ModuleType("__mp_main__")
    vars(main).update(names)
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main
    exec(code, vars(main))


def _fork_workers(control: socket.socket, run_worker: RunWorker) -> None:
    workers: dict[int, int] = {}  # a process's descriptor to its number
    poller = select.poll()
    poller.register(control.fileno(), select.POLLIN)
    while True:
        for file, _ in poller.poll():
            if file in workers:
                status = os.waitpid(workers[file], 0)[1]
                control.send(pickle.dumps(("died", workers.pop(file), os.waitstatus_to_exitcode(status))))
                poller.unregister(file)
                os.close(file)
                continue
            message, files = receive(control)
            if not message:  # the pool is closed, or its owner dead
                for worker in workers.values():
                    os.kill(worker, signal.SIGKILL)
                for worker in workers.values():
                    os.waitpid(worker, 0)
                return
            if (child := os.fork()) == 0:
                control.close()
                for other in workers:
                    os.close(other)
                requests, num_threads = socket.socket(fileno=files[0]), int(message)
                run_to_the_end(lambda: _work(run_worker, requests, num_threads))  # noqa: B023
            os.close(files[0])
            file = os.pidfd_open(child)
            workers[file] = child
            poller.register(file, select.POLLIN)
            control.send(pickle.dumps(("started", child)))


def _work(run_worker: RunWorker, requests: socket.socket, num_threads: int) -> None:
    _die_with_parent()
    hear_in_forks()
    run_worker(requests, num_threads)


def run_to_the_end(run: Callable[[], None]) -> None:
    """Run in a forked process, which must never return to the code of its parent; then end it."""
    code = 1
    try:
        run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _die_with_parent() -> None:
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def receive(sender: socket.socket, max_bytes: int = MAX_MESSAGE_BYTES) -> tuple[bytes, list[int]]:
    """Return a message and the descriptors sent along; an empty message when the sender is gone."""
    try:
        message, further, _, _ = sender.recvmsg(max_bytes, _FILES_BYTES)
    except ConnectionResetError:  # that it died is told once, and before the messages that it had sent
        return receive(sender, max_bytes)
    files = array.array("i")
    for level, kind, data in further:  # mostly none: `socket.recv_fds` would take the time of the rest
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            files.frombytes(data)
    return message, list(files)


def pickled_error(error: BaseException) -> bytes:
    """Return an error as bytes that fit a message: itself if it survives that, else one with its text."""
    frames = "".join(traceback.format_exception(error))
    try:
        message = pickle.dumps(error)
        is_itself = type(pickle.loads(message)) is type(error) and len(message) < MAX_MESSAGE_BYTES // 2
    except Exception:
        is_itself = False
    if not is_itself:
        text = _cut(f"{type(error).__name__}: {error}")
        notes, error = "\n".join(map(str, getattr(error, "__notes__", []))), RuntimeError(text)
        if notes:
            error.add_note(_cut(notes))
    with contextlib.suppress(Exception):  # an exception that takes no notes still travels as itself
        error.add_note(f"raised in a process of its own:\n{_cut(frames, is_end=True)}")
    return pickle.dumps(error)


def _cut(text: str, *, is_end: bool = False) -> str:
    """Return the beginning of a text, or its end: so much that a message has room for three of them."""
    max_bytes, data = MAX_MESSAGE_BYTES // 4, text.encode(errors="replace")
    return (data[-max_bytes:] if is_end else data[:max_bytes]).decode(errors="ignore")
