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
from collections.abc import Sequence
from typing import Any

from pipeline.concurrency.processes.fork_server import receive
from pipeline.concurrency.processes.fork_server_client import ONE_THREAD, open_nursery
from pipeline.concurrency.processes.pool_state import Answer, Death, Job, WorkerHandle
from pipeline.concurrency.processes.worker_jobs import TICKET

MAX_DEATHS = 2  # of workers by one job, and of nurseries
_CLOSE_TIMEOUT_S = 1.0


class WorkerPool:
    """Processes that answer jobs, in any order, each with one thread or several.

    It is ready some time after it was made; until then nothing waits for it.

    If a worker dies, its jobs are given to another one. If several were under way, nobody knows which one it
    died of: they are done again one at a time. A job is given up once two workers have died that had nothing
    else under way. If the nursery dies, its workers do too; another one is forked, once, and takes up all
    jobs.

    Args:
        entry: Module and function, called once; returns what each worker runs.
        files: Descriptors, the function's first arguments; kept open by their owner until this is closed.
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
        self._num_workers, self._num_threads, self._workers = num_workers, num_threads, list[WorkerHandle]()
        self._poller, self._by_file = select.poll(), dict[int, WorkerHandle]()
        self._owner, self._next_ticket, self._num_lost = os.getpid(), 0, 0
        self._left = list[list[Job]]()  # jobs of the workers of a nursery that has died
        environment = {**os.environ, **ONE_THREAD}  # as it is now, and not when the server was started
        self._program = pickle.dumps((prepare, environment, *entry, arguments))
        self._files, self._modules = list(files), modules
        self.died: list[Death] = []  # until somebody clears it
        self._open()

    def _open(self) -> None:
        self._is_ready, self._nursery = False, 0
        self._exit_codes: dict[int, int] = {}  # by process
        self._control = open_nursery(self._modules)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # seen when it should answer
            socket.send_fds(self._control, [self._program], self._files)

    def is_ready(self) -> bool:
        """Say whether the workers are there, without waiting; raises as `wait_until_ready` does."""
        return self.wait_until_ready(0)

    def wait_until_ready(self, timeout_s: float | None = None) -> bool:
        """Wait until the workers are there; say whether they are.

        Raises:
            NurseryDiedError: If it has, again.
            Exception: What went wrong where the nursery was made ready.
        """
        while not self._is_ready and _is_readable(self._control, timeout_s):
            try:
                self._start_workers()
            except NurseryDiedError as error:
                self._begin_again(error)
        return self._is_ready

    def resize(self, num_workers: int, num_threads: int = 1) -> bool:
        """Start workers or let idle ones go; return whether there are as many as wanted."""
        self._num_threads = num_threads  # of those that are started from now on
        self._num_workers = max(num_workers, 1)
        idle = [each for each in self._workers if not each.num_jobs]
        others = [each for each in idle if each.num_threads != num_threads]
        same = [each for each in idle if each.num_threads == num_threads]
        num_too_many = max(len(self._workers) - len(others) - num_workers, 0)
        for worker in [*others, *same[:num_too_many]]:
            self._let_go(worker)  # which ends it
            self._workers.remove(worker)
        try:
            while len(self._workers) < num_workers:
                self._workers.append(self._start_worker())
        except NurseryDiedError as error:
            self._begin_again(error)
        return self._is_ready

    def submit(self, message: bytes, number: int | None = None) -> int:
        """Give a job to a worker, by its number or the one with the fewest; return its ticket.

        Never waits, but for a nursery that takes another one's place.

        Args:
            message: The job.
            number: The worker's; with more workers than numbers, each number has a worker of its own.
        """
        while not self._is_ready:
            self.wait_until_ready()
        self._next_ticket += 1
        fewest = min(self._workers, key=lambda each: each.num_jobs)
        worker = fewest if number is None else self._workers[number % len(self._workers)]
        worker.waiting.append(Job(self._next_ticket, message))
        self._feed(worker)
        return self._next_ticket

    def answers(self, timeout_s: float | None) -> list[Answer]:
        """Return the answers that are there; wait for the first.

        Returns:
            An empty list after the time-out, or if a process has died, which `died` tells.

        Raises:
            NurseryDiedError: If it has, again.
        """
        if not self.wait_until_ready(timeout_s):
            return []
        answers: list[Answer] = []
        try:
            for file, _ in self._poller.poll(None if timeout_s is None else timeout_s * 1e3):
                answers += self._take(self._by_file[file])
        except NurseryDiedError as error:
            self._begin_again(error)
        return answers

    def pid_of(self, ticket: int) -> int | None:
        """Return the process that has a job, if any has."""
        jobs = ((each.pid, job) for each in self._workers for job in each.jobs)
        return next((pid for pid, job in jobs if job.ticket == ticket), None)

    def close(self) -> None:
        """Kill the workers, and wait until they are gone; in a fork of this process, only let go of them."""
        if os.getpid() == self._owner:
            self._end_nursery()
        self._control.close()
        self._let_go_of_all()

    def _let_go_of_all(self) -> None:
        for worker in [*self._by_file.values()]:
            self._let_go(worker)
        self._workers.clear()

    def _begin_again(self, error: NurseryDiedError) -> None:
        """Have another nursery forked for one that has died, and its workers with it."""
        self._left, self._is_ready = [worker.jobs for worker in self._workers] or self._left, False
        self._let_go_of_all()
        self._num_lost += 1
        if self._num_lost >= MAX_DEATHS:
            raise error
        self.died.append(Death((), None))
        self._control.close()
        self._open()

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
            error = pickle.loads(found)
            # What ended the nursery, such as SystemExit, must not end this process.
            raise error if isinstance(error, Exception) else RuntimeError(repr(error)) from error
        self._workers = [self._start_worker() for _ in range(self._num_workers)]
        self._is_ready = True
        for number, jobs in enumerate(self._left):
            worker = self._workers[number % self._num_workers]
            worker.waiting.extend(jobs)
            self._feed(worker)
        self._left = []

    def _start_worker(self) -> WorkerHandle:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                socket.send_fds(self._control, [b"%d" % self._num_threads], [theirs.fileno()])
            except (BrokenPipeError, ConnectionResetError):
                ours.close()
                raise NurseryDiedError(is_born=True) from None
        worker = WorkerHandle(ours, self._num_threads)
        self._by_file[ours.fileno()] = worker
        self._poller.register(ours, select.POLLIN)
        while not worker.pid:
            kind, *found = self._next_word()
            if kind == "died":
                self._exit_codes[found[0]] = found[1]
            else:
                worker.pid = found[0]
        return worker

    def _let_go(self, worker: WorkerHandle) -> None:
        self._poller.unregister(worker.requests)
        del self._by_file[worker.requests.fileno()]
        worker.requests.close()

    def _next_word(self) -> Any:
        message, _ = receive(self._control)
        if not message:
            raise NurseryDiedError(is_born=self._nursery != 0)
        return pickle.loads(message)

    def _feed(self, worker: WorkerHandle) -> None:
        """Send what waits, as far as it may be sent."""
        while worker.waiting and worker.is_free_for(job := worker.waiting[0]):
            try:
                worker.requests.send(TICKET.pack(job.ticket) + job.message)
            except (BrokenPipeError, ConnectionResetError):
                return  # it has died, which `answers` sees
            worker.sent[job.ticket] = worker.waiting.popleft()

    def _take(self, worker: WorkerHandle) -> list[Answer]:
        message, files = receive(worker.requests)
        if not message:
            return self._replace(worker)
        (ticket,) = TICKET.unpack_from(message)
        del worker.sent[ticket]
        self._feed(worker)
        return [Answer(ticket, message[TICKET.size :], files)]

    def _replace(self, worker: WorkerHandle) -> list[Answer]:
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
        replacement.waiting.extend(job for job in worker.jobs if job not in given_up)
        self._feed(replacement)
        return [Answer(job.ticket, b"", exit_code=exit_code) for job in given_up]


class NurseryDiedError(Exception):
    """The process that has the dataset is gone, without a word.

    Args:
        is_born: Otherwise it may be the fork server that has gone.
    """

    def __init__(self, *, is_born: bool) -> None:
        self.is_born = is_born
        super().__init__()


def _is_readable(readable: socket.socket, timeout_s: float | None) -> bool:
    poller = select.poll()
    poller.register(readable.fileno(), select.POLLIN)
    return bool(poller.poll(None if timeout_s is None else timeout_s * 1e3))
