"""What a `WorkerPool` keeps of its jobs and its workers, and what it says of them."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

MAX_SENT = 100  # jobs lie in the buffer of a worker's socket, which takes some 270; to fill it would block


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
    """A process of the pool that has ended, and is replaced.

    Args:
        tickets: Of the jobs that may have been under way; with several nobody knows which one it died of.
        exit_code: Of a worker, negative for a signal; None for the nursery, whose nobody knows.
    """

    tickets: tuple[int, ...]
    exit_code: int | None


@dataclass(slots=True, eq=False)
class Job:
    """What was submitted, and whom it may have killed."""

    ticket: int
    message: bytes
    is_suspect: bool = False  # a worker died when it may have been under way
    num_deaths: int = 0  # of workers that had nothing else under way


@dataclass(slots=True, eq=False)
class WorkerHandle:
    """A worker, and the jobs that it was given and has not answered."""

    requests: socket.socket
    num_threads: int
    pid: int = 0
    sent: dict[int, Job] = field(default_factory=dict)  # by ticket, in the order in which they were sent
    waiting: deque[Job] = field(default_factory=deque)

    @property
    def num_jobs(self) -> int:
        """How many it has."""
        return len(self.sent) + len(self.waiting)

    @property
    def jobs(self) -> list[Job]:
        """Those that it has, in their order."""
        return [*self.sent.values(), *self.waiting]

    def is_free_for(self, job: Job) -> bool:
        """Say whether a job may be sent; a suspect is alone with its worker."""
        if not self.sent:
            return True
        is_alone = job.is_suspect or next(iter(self.sent.values())).is_suspect
        return not is_alone and len(self.sent) < MAX_SENT
