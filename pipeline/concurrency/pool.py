"""Worker processes that answer jobs: given to the least busy, done again where one has died.

A job and its answer are short messages, and at most one descriptor; what is large lies in shared memory.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pipeline.concurrency.fork_server import receive
from pipeline.concurrency.server import ONE_THREAD, fork_server

MAX_DEATHS = 2
_CLOSE_TIMEOUT_S = 1.0


class Answer(NamedTuple):
    """What a worker has answered, or that workers died of the job.

    Args:
        ticket: Of the job.
        message: The worker's; empty if workers died.
        files: Descriptors sent along; whoever takes the answer closes them.
        exit_code: Of the last worker that died of it; negative for a signal.
    """

    ticket: int
    message: bytes
    files: Sequence[int] = ()
    exit_code: int | None = None


@dataclass(slots=True, eq=False)
class _Worker:
    requests: socket.socket
    pid: int = 0
    jobs: deque[tuple[int, bytes]] = field(default_factory=deque)


class WorkerPool:
    """Processes that answer jobs, in any order.

    It is ready some time after it was made; until then nothing waits for it.

    Args:
        entry: Module and function, called once; returns what each worker runs.
        files: Descriptors, the function's first arguments; closed here by their owner.
        arguments: Its further arguments.
        num_workers: How many.
        modules: What the fork server imports if it must be started.
        prepare: What the nursery is prepared with; see `multiprocessing.spawn.prepare`.

    Runs on:
        One thread, but for `close`.
    """

    def __init__(
        self,
        entry: tuple[str, str],
        files: Sequence[int],
        arguments: Sequence[Any],
        num_workers: int,
        modules: Sequence[str],
        prepare: dict[str, Any],
    ) -> None:
        self._num_workers, self._workers = num_workers, list[_Worker]()
        self._is_ready, self._next_ticket, self._nursery = False, 0, 0
        self._poller, self._by_file = select.poll(), dict[int, _Worker]()
        self._deaths: dict[int, int] = {}
        self._owner = os.getpid()
        self._exit_codes: dict[int, int] = {}  # by process
        self._control = fork_server(modules).open_nursery()
        environment = {**os.environ, **ONE_THREAD}  # as it is now, and not when the server was started
        data = pickle.dumps((prepare, environment, *entry, arguments))
        socket.send_fds(self._control, [data], list(files))
        self.died: list[tuple[int, int]] = []  # a job's ticket and its worker's exit code

    def is_ready(self) -> bool:
        """Say whether the workers are there, without waiting; raises as `wait_until_ready` does."""
        return self.wait_until_ready(0)

    def wait_until_ready(self, timeout_s: float | None = None) -> bool:
        """Wait until the workers are there; say whether they are.

        Raises:
            Exception: What went wrong where the nursery was made ready.
        """
        while not self._is_ready and _is_readable(self._control, timeout_s):
            self._start_workers()
        return self._is_ready

    def resize(self, num_workers: int) -> bool:
        """Start workers or let idle ones go; return whether there are as many as wanted."""
        while len(self._workers) < num_workers:
            self._workers.append(self._start_worker())
        for worker in [each for each in self._workers if not each.jobs][: len(self._workers) - num_workers]:
            self._let_go(worker)  # which ends it
            self._workers.remove(worker)
        return True

    def submit(self, message: bytes, number: int | None = None) -> int:
        """Give a job to a worker, by its number or the one with the fewest; return its ticket. Never waits.

        Args:
            message: The job.
            number: The worker's; jobs of one number go to one worker, whatever their number and the workers'.
        """
        self._next_ticket += 1
        fewest = min(self._workers, key=lambda each: len(each.jobs))
        worker = fewest if number is None else self._workers[number % len(self._workers)]
        self._send(worker, self._next_ticket, message)
        return self._next_ticket

    def answers(self, timeout_s: float | None) -> list[Answer]:
        """Return the answers that are there; wait for the first.

        Returns:
            An empty list after the time-out, or if a worker has died, which `died` tells.
        """
        ready = self._poller.poll(None if timeout_s is None else timeout_s * 1e3)
        return [answer for file, _ in ready for answer in self._take(self._by_file[file])]

    def pid_of(self, ticket: int) -> int | None:
        """Return the process that has a job, if any has."""
        return next((each.pid for each in self._workers for job in each.jobs if job[0] == ticket), None)

    def close(self) -> None:
        """Kill the workers, and wait until they are gone; in a fork of this process, only let go of them."""
        if os.getpid() == self._owner:
            self._end_nursery()
        self._control.close()
        for worker in self._workers:
            self._let_go(worker)
        self._workers.clear()

    def _end_nursery(self) -> None:
        with contextlib.suppress(OSError, NurseryDiedError):
            if self._is_ready:
                self._control.shutdown(socket.SHUT_WR)
                while _is_readable(self._control, _CLOSE_TIMEOUT_S):
                    self._next_word()  # until the nursery has ended, which it does after every worker
            while _is_readable(self._control, 0):  # it is not ready, or does not hear
                if (word := self._next_word())[0] == "born":
                    self._nursery = word[1]
            if self._nursery:
                os.kill(self._nursery, signal.SIGKILL)
        with contextlib.suppress(OSError):  # a nursery that has not been forked yet never will be
            self._control.shutdown(socket.SHUT_RDWR)

    def _start_workers(self) -> None:
        kind, found = self._next_word()
        if kind == "born":
            self._nursery = found
            return
        if kind == "failed":
            raise pickle.loads(found)
        self._workers = [self._start_worker() for _ in range(self._num_workers)]
        self._is_ready = True

    def _start_worker(self) -> _Worker:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(self._control, [b"fork"], [theirs.fileno()])
        worker = _Worker(ours)
        self._by_file[ours.fileno()] = worker
        self._poller.register(ours, select.POLLIN)
        while not worker.pid:
            kind, *found = self._next_word()
            if kind == "died":
                self._exit_codes[found[0]] = found[1]
            else:
                worker.pid = found[0]
        return worker

    def _let_go(self, worker: _Worker) -> None:
        self._poller.unregister(worker.requests)
        del self._by_file[worker.requests.fileno()]
        worker.requests.close()

    def _next_word(self) -> Any:
        message, _ = receive(self._control)
        if not message:
            raise NurseryDiedError
        return pickle.loads(message)

    def _send(self, worker: _Worker, ticket: int, message: bytes) -> None:
        worker.jobs.append((ticket, message))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `answers` sees that it died
            worker.requests.send(message)

    def _take(self, worker: _Worker) -> list[Answer]:
        message, files = receive(worker.requests)
        if message:
            return [Answer(worker.jobs.popleft()[0], message, files)]
        return self._replace(worker)

    def _replace(self, worker: _Worker) -> list[Answer]:
        """Start another worker for one that has died, and give it the jobs that were left."""
        self._let_go(worker)
        while worker.pid not in self._exit_codes:
            _, pid, exit_code = self._next_word()
            self._exit_codes[pid] = exit_code
        exit_code, jobs = self._exit_codes.pop(worker.pid), worker.jobs
        self._workers[self._workers.index(worker)] = replacement = self._start_worker()
        given_up = []
        if jobs:
            ticket = jobs[0][0]  # the one under way: a worker answers in order
            self.died.append((ticket, exit_code))
            self._deaths[ticket] = self._deaths.get(ticket, 0) + 1
            if self._deaths[ticket] >= MAX_DEATHS:
                jobs.popleft()
                given_up.append(Answer(ticket, b"", exit_code=exit_code))
        for ticket, message in jobs:
            self._send(replacement, ticket, message)
        return given_up


class NurseryDiedError(Exception):
    """The process that has the dataset is gone, without a word."""


def _is_readable(readable: socket.socket, timeout_s: float | None) -> bool:
    poller = select.poll()
    poller.register(readable.fileno(), select.POLLIN)
    return bool(poller.poll(None if timeout_s is None else timeout_s * 1e3))
