"""What a worker process runs: jobs in, batches made straight into slots of shared memory.

Runs in processes of `concurrency.fork_server`, each with a GIL, global generators and an interpreter of its
own: there the batches of a dataset may draw from anything (see `data/randomness.py`, and `data/isolation.py`
for more than one thread).
"""

from __future__ import annotations

import faulthandler
import signal
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.concurrency import answer_jobs, map_slots, pickled_error, view_slot
from pipeline.data.fetch import Fetcher, SeedSample
from pipeline.data.isolation import Isolation
from pipeline.data.packing import Arena, Packed, pack, unpack, view
from pipeline.data.reader import END
from pipeline.data.recycling import keep_freed_memory
from pipeline.data.shard_fetch import ShardFetcher
from pipeline.seeding import Epoch

JOB = struct.Struct("=qQqqqq")
"""Epoch, its seed, position, samples in the batch, offset of the slot, its bytes."""
ANSWER = struct.Struct("=?qqq")
"""Whether it is a batch; the skeleton's offset and bytes; the bytes that a slot should have had. Without
a batch an error follows, or nothing if the shard has ended."""


@dataclass(frozen=True)
class TorchDefaults:
    """Settings of a process that decide what a dataset's torch operations return."""

    dtype: torch.dtype
    matmul_precision: str
    is_deterministic: bool
    warns_only: bool
    num_threads: int

    @classmethod
    def of_process(cls) -> TorchDefaults:
        """Return those of this process."""
        return cls(
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.get_num_threads(),
        )

    def apply(self) -> None:
        """Make them those of this process, but for the number of threads."""
        torch.set_default_dtype(self.dtype)
        torch.set_float32_matmul_precision(self.matmul_precision)
        if self.is_deterministic != torch.are_deterministic_algorithms_enabled():  # imports for a second
            torch.use_deterministic_algorithms(self.is_deterministic, warn_only=self.warns_only)


def open_worker(
    payload: int, slots: int, stacks: int, offset: int, nbytes: int, defaults: TorchDefaults
) -> Callable[[socket.socket, int], None]:
    """Take the dataset, once for all workers; return what each of them runs.

    Args:
        payload: A file with a `Fetcher` or `ShardFetcher`, packed.
        slots: The file of the slots.
        stacks: A file to which a worker that gets SIGUSR1 writes where it stands.
        offset: Of the skeleton in the payload.
        nbytes: Of the skeleton.
        defaults: Of the trainer's process.

    Runs on:
        The nursery.
    """
    torch.set_num_threads(1)  # this process forks, and must not have threads
    defaults.apply()
    fetcher = unpack(Packed(offset, nbytes, payload, 0), None, is_private=True)

    def run(requests: socket.socket, num_threads: int) -> None:
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        torch.set_num_threads(defaults.num_threads)
        keep_freed_memory()
        answer_jobs(requests, Worker(fetcher, slots, num_threads).answer, num_threads)

    return run


class Worker:
    """Makes the batches that a process is asked for.

    Args:
        fetcher: Makes them of samples.
        slots: The file of the slots.
        num_threads: That call `answer`, at once.
    """

    def __init__(self, fetcher: Fetcher | ShardFetcher, slots: int, num_threads: int) -> None:
        self._fetcher, self._memory = fetcher, map_slots(slots)
        self._isolation = Isolation(num_threads)

    def answer(self, job: bytes) -> tuple[bytes, list[int]]:
        """Return the answer to a job, and the descriptor of what did not fit its slot, if there is any."""
        try:
            number, seed, position, count, offset, nbytes = JOB.unpack(job)
            slot = view_slot(self._memory, offset, nbytes)
            # The indices come first in the slot and stay: another worker may have to do it again.
            indices = view(slot, 0, torch.int64, count)
            arena = Arena(slot, start=indices.nbytes)
            if (batch := self._make(arena, indices, Epoch(number, seed), position)) is END:
                return ANSWER.pack(False, 0, 0, 0), []
            packed = pack(batch, arena)
            files = [packed.overflow] if packed.overflow >= 0 else []
            return ANSWER.pack(True, packed.offset, packed.nbytes, packed.wanted_bytes), files
        except BaseException as error:
            return ANSWER.pack(False, 0, 0, 0) + pickled_error(error), []

    def _make(self, arena: Arena, indices: torch.Tensor, epoch: Epoch, position: int) -> Any:
        fetcher = self._fetcher
        if fetcher.is_drawless:
            return fetcher.fetch(indices, epoch, position, None, arena)

        def make(seed_sample: SeedSample | None) -> Any:
            arena.clear()  # what was made before in vain
            return fetcher.fetch(indices, epoch, position, seed_sample, arena)

        return self._isolation.make(make)
