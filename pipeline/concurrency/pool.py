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
from pipeline.concurrency.jobs import TICKET
from pipeline.concurrency.server import ONE_THREAD, fork_server

MAX_DEATHS = 2
_MAX_SENT = 100  # jobs lie in the buffer of a worker's socket, which takes some 270; to fill it would block
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


class Death(NamedTuple):
    """A worker that has ended.

    Args:
        tickets: Of the jobs that may have been under way; with several nobody knows which one it died of.
        exit_code: Negative for a signal.
    """

    tickets: tuple[int, ...]
    exit_code: int


@dataclass(slots=True, eq=False)
class _Job:
    ticket: int
    message: bytes
    is_suspect: bool = False  # a worker died when it may have been under way
    num_deaths: int = 0  # of workers that had nothing else under way


@dataclass(slots=True, eq=False)
class _Worker:
    requests: socket.socket
    num_threads: int
    pid: int = 0
    sent: dict[int, _Job] = field(default_factory=dict)  # by ticket, in the order in which they were sent
    waiting: deque[_Job] = field(default_factory=deque)

    @property
    def num_jobs(self) -> int:
        return len(self.sent) + len(self.waiting)

    def is_free_for(self, job: _Job) -> bool:
        """Say whether a job may be sent; a suspect is alone with its worker."""
        if not self.sent:
            return True
        is_alone = job.is_suspect or next(iter(self.sent.values())).is_suspect
        return not is_alone and len(self.sent) < _MAX_SENT


class WorkerPool:
    """Processes that answer jobs, in any order, each with one thread or several.

    It is ready some time after it was made; until then nothing waits for it.

    If a worker dies, its jobs are given to another one. If several were under way, nobody knows which one it
    died of: they are done again one at a time. A job is given up once two workers have died that had nothing
    else under way.

    Args:
        entry: Module and function, called once; returns what each worker runs.
        files: Descriptors, the function's first arguments; closed here by their owner.
        arguments: Its further arguments.
        num_workers: How many.
        modules: What the fork server imports if it must be started.
        prepare: What the nursery is prepared with; see `multiprocessing.spawn.prepare`.
        num_threads: Of each worker; it has as many jobs under way at once.

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
        num_threads: int = 1,
    ) -> None:
        self._num_workers, self._num_threads, self._workers = num_workers, num_threads, list[_Worker]()
        self._is_ready, self._next_ticket, self._nursery = False, 0, 0
        self._poller, self._by_file = select.poll(), dict[int, _Worker]()
        self._owner = os.getpid()
        self._exit_codes: dict[int, int] = {}  # by process
        self._control = fork_server(modules).open_nursery()
        environment = {**os.environ, **ONE_THREAD}  # as it is now, and not when the server was started
        data = pickle.dumps((prepare, environment, *entry, arguments))
        socket.send_fds(self._control, [data], list(files))
        self.died: list[Death] = []  # until somebody clears it

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

    def resize(self, num_workers: int, num_threads: int = 1) -> bool:
        """Start workers or let idle ones go; return whether there are as many as wanted."""
        self._num_threads = num_threads  # of those that are started from now on
        idle = [each for each in self._workers if not each.num_jobs]
        others = [each for each in idle if each.num_threads != num_threads]
        same = [each for each in idle if each.num_threads == num_threads]
        num_too_many = max(len(self._workers) - len(others) - num_workers, 0)
        for worker in [*others, *same[:num_too_many]]:
            self._let_go(worker)  # which ends it
            self._workers.remove(worker)
        while len(self._workers) < num_workers:
            self._workers.append(self._start_worker())
        return True

    def submit(self, message: bytes, number: int | None = None) -> int:
        """Give a job to a worker, by its number or the one with the fewest; return its ticket. Never waits.

        Args:
            message: The job.
            number: The worker's; with more workers than numbers, each number has a worker of its own.
        """
        self._next_ticket += 1
        fewest = min(self._workers, key=lambda each: each.num_jobs)
        worker = fewest if number is None else self._workers[number % len(self._workers)]
        worker.waiting.append(_Job(self._next_ticket, message))
        self._feed(worker)
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
        jobs = ((each.pid, job) for each in self._workers for job in [*each.sent.values(), *each.waiting])
        return next((pid for pid, job in jobs if job.ticket == ticket), None)

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
            socket.send_fds(self._control, [b"%d" % self._num_threads], [theirs.fileno()])
        worker = _Worker(ours, self._num_threads)
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

    def _feed(self, worker: _Worker) -> None:
        """Send what waits, as far as it may be sent."""
        while worker.waiting and worker.is_free_for(job := worker.waiting[0]):
            try:
                worker.requests.send(TICKET.pack(job.ticket) + job.message)
            except (BrokenPipeError, ConnectionResetError):
                return  # it has died, which `answers` sees
            worker.sent[job.ticket] = worker.waiting.popleft()

    def _take(self, worker: _Worker) -> list[Answer]:
        message, files = receive(worker.requests)
        if not message:
            return self._replace(worker)
        (ticket,) = TICKET.unpack_from(message)
        del worker.sent[ticket]
        self._feed(worker)
        return [Answer(ticket, message[TICKET.size :], files)]

    def _replace(self, worker: _Worker) -> list[Answer]:
        """Start another worker for one that has died, and give it the jobs that were left."""
        self._let_go(worker)
        while worker.pid not in self._exit_codes:
            _, pid, exit_code = self._next_word()
            self._exit_codes[pid] = exit_code
        exit_code = self._exit_codes.pop(worker.pid)
        self._workers[self._workers.index(worker)] = replacement = self._start_worker()
        suspects = [*worker.sent.values()][: worker.num_threads]  # see `answer_jobs`
        self.died.append(Death(tuple(job.ticket for job in suspects), exit_code))
        for job in suspects:
            job.is_suspect = True
            job.num_deaths += len(suspects) == 1
        given_up = [job for job in suspects if job.num_deaths >= MAX_DEATHS]
        left = [*worker.sent.values(), *worker.waiting]
        replacement.waiting.extend(job for job in left if job not in given_up)
        self._feed(replacement)
        return [Answer(job.ticket, b"", exit_code=exit_code) for job in given_up]


class NurseryDiedError(Exception):
    """The process that has the dataset is gone, without a word."""


def _is_readable(readable: socket.socket, timeout_s: float | None) -> bool:
    poller = select.poll()
    poller.register(readable.fileno(), select.POLLIN)
    return bool(poller.poll(None if timeout_s is None else timeout_s * 1e3))
