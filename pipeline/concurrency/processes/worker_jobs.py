"""A worker's side of a `WorkerPool`: jobs in, answers out, on one thread or several."""

from __future__ import annotations

import contextvars
import os
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

from pipeline.concurrency.processes.fork_server import MAX_MESSAGE_BYTES, run_to_the_end

TICKET = struct.Struct("=q")
"""What stands before a job and before its answer, since answers come in any order."""

AnswerJob: TypeAlias = Callable[[bytes], tuple[bytes, Sequence[int]]]


def answer_jobs(requests: socket.socket, answer: AnswerJob, num_threads: int) -> None:
    """Answer jobs until nobody asks any more.

    Each thread takes a job, answers it and takes the next; the kernel hands them out in the order in which
    they were sent. So those under way are always among the first that are not answered, as many as there
    are threads, and the pool knows whom to suspect if this process dies. The first job is answered before
    there is a second thread, for it may show how the others are to be answered.

    Args:
        requests: Of the pool.
        answer: Returns an answer and the descriptors to send along, which are closed here. Called by all
            threads at once.
        num_threads: The calling one among them; the further ones end with the process.

    Runs on:
        The main thread of a worker process.
    """
    if not _answer_next(requests, answer):
        return
    for number in range(1, num_threads):
        # Each has the settings that belong to a context: NumPy's errors, those of decimals. Whatever ends one
        # of them ends the process: a job that nobody answers would be waited for.
        answer_all = partial(contextvars.copy_context().run, _answer_in_turn, requests, answer)
        run = partial(run_to_the_end, answer_all)
        threading.Thread(target=run, name=f"worker/{number}", daemon=True).start()
    _answer_in_turn(requests, answer)


def _answer_in_turn(requests: socket.socket, answer: AnswerJob) -> None:
    while _answer_next(requests, answer):
        pass


def _answer_next(requests: socket.socket, answer: AnswerJob) -> bool:
    """Answer the next job; return False if there will be none."""
    if not (message := requests.recv(MAX_MESSAGE_BYTES)):
        return False
    found, files = answer(message[TICKET.size :])
    socket.send_fds(requests, [message[: TICKET.size], found], files)
    for file in files:
        os.close(file)
    return True
