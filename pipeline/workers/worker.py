"""What a worker process runs: jobs in, batches made straight into slots of shared memory.

Runs in processes of `concurrency.fork_server`, each with a GIL, global generators and an interpreter of its
own: there the batches of a dataset may draw from anything (see `randomness/draws.py`,
and `randomness/worker_threads.py` for more than one thread).
"""

from __future__ import annotations

import faulthandler
import signal
import socket
import struct
from collections.abc import Callable
from typing import Any

import torch

from pipeline.concurrency import answer_jobs, map_slots, pickled_error, view_slot
from pipeline.data.fetch import Fetcher, SeedSample
from pipeline.data.reader import END
from pipeline.data.recycling import keep_freed_memory
from pipeline.data.shard_fetch import ShardFetcher
from pipeline.randomness.seeds import Epoch
from pipeline.randomness.worker_threads import Isolation
from pipeline.workers.packing import Arena, Packed, pack, unpack, view
from pipeline.workers.process_settings import ProcessSettings
from pipeline.workers.worker_logs import Talk

JOB = struct.Struct("=qQqqqq")
"""Epoch, its seed, position, samples in the batch, offset of the slot, its bytes."""
ANSWER = struct.Struct("=??qqq")
"""Whether it is a batch; whether the last file is what was said meanwhile (`worker_logs`); the skeleton's
offset and bytes; the bytes that a slot should have had. Without a batch an error follows, or nothing if the
shard has ended."""


def open_worker(
    payload: int,
    slots: int,
    stacks: int,
    offset: int,
    nbytes: int,
    settings: ProcessSettings,
    make_look: Callable[[Any], Callable[[], None]] | None,
) -> Callable[[socket.socket, int], None]:
    """Take the dataset, once for all workers; return what each of them runs.

    Args:
        payload: A file with globals and a `Fetcher` or `ShardFetcher`, packed.
        slots: The file of the slots.
        stacks: A file to which a worker that gets SIGUSR1 writes where it stands.
        offset: Of the skeleton in the payload.
        nbytes: Of the skeleton.
        settings: Of the script's process.
        make_look: Returns what is called after each batch, and raises if it must not be used.

    Runs on:
        The nursery.
    """
    torch.set_num_threads(1)  # this process forks, and must not have threads
    settings.apply()
    _, fetcher = unpack(Packed(offset, nbytes, payload, 0), None, is_private=True)
    settings.apply()  # what was imported with the dataset may have set something

    def run(requests: socket.socket, num_threads: int) -> None:
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        settings.apply_in_worker()
        keep_freed_memory()
        worker = Worker(fetcher, slots, num_threads, None if make_look is None else make_look(fetcher))
        worker.talk.listen()
        answer_jobs(requests, worker.answer, num_threads)

    return run


class Worker:
    """Makes the batches that a process is asked for.

    Args:
        fetcher: Makes them of samples.
        slots: The file of the slots.
        num_threads: That call `answer`, at once.
        look: Called after each batch; raises if it must not be used.

    Attributes:
        talk: What was said and goes along with the next answer.
    """

    def __init__(
        self,
        fetcher: Fetcher | ShardFetcher,
        slots: int,
        num_threads: int,
        look: Callable[[], None] | None = None,
    ) -> None:
        self._fetcher, self._memory, self._look = fetcher, map_slots(slots), look
        self._isolation, self.talk = Isolation(num_threads), Talk()

    def answer(self, job: bytes) -> tuple[bytes, list[int]]:
        """Return the answer to a job, and descriptors: of what did not fit its slot, and of what was said."""
        files: list[int] = []
        try:
            head, further = self._answer(job, files), b""
        except BaseException as error:
            head, further = (False, 0, 0, 0), pickled_error(error)
        if (talk := self.talk.take()) is not None:
            files.append(talk)
        return ANSWER.pack(head[0], talk is not None, *head[1:]) + further, files

    def _answer(self, job: bytes, files: list[int]) -> tuple[bool, int, int, int]:
        number, seed, position, count, offset, nbytes = JOB.unpack(job)
        slot = view_slot(self._memory, offset, nbytes)
        # The indices come first in the slot and stay: another worker may have to do it again.
        indices = view(slot, 0, torch.int64, count)
        arena = Arena(slot, start=indices.nbytes)
        if (batch := self._make(arena, indices, Epoch(number, seed), position)) is END:
            return False, 0, 0, 0
        if self._look is not None:
            self._look()
        packed = pack(batch, arena)
        if packed.overflow >= 0:
            files.append(packed.overflow)
        return True, packed.offset, packed.nbytes, packed.wanted_bytes

    def _make(self, arena: Arena, indices: torch.Tensor, epoch: Epoch, position: int) -> Any:
        fetcher = self._fetcher
        if fetcher.is_drawless:
            return fetcher.fetch(indices, epoch, position, None, arena)

        def make(seed_sample: SeedSample | None) -> Any:
            arena.clear()  # what was made before in vain
            return fetcher.fetch(indices, epoch, position, seed_sample, arena)

        return self._isolation.make(make)
