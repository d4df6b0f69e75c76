"""The two baselines, the textbook loop and the sensible one; and the bound, batches already there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.compare.job import Job, Log
from benchmarks.compare.workloads import Workload

READ_EVERY = 50


def loader(workload: Workload, num_workers: int, start: str | None = None) -> DataLoader[Any]:
    """Return torch's loader, its workers kept over the epochs, and started as Python does unless said."""
    return DataLoader(
        workload.dataset(),
        workload.batch_size,
        num_workers=num_workers,
        collate_fn=workload.collate_fn,
        persistent_workers=num_workers > 0,
        multiprocessing_context=start,
    )


def train(job: Job, batches: Iterable[Any], read_every: int) -> None:
    """Train as a plain loop does, reading and logging the loss every so many steps."""
    log, step = Log(), 0
    for _ in range(job.workload.num_epochs):
        for batch in batches:
            moved = job.move(batch)
            loss = job.forward(job.model, moved)
            loss.backward()
            job.optimizer.step()
            job.optimizer.zero_grad()
            step += 1
            if step % read_every == 0:
                log.write(job, step, loss)
    log.close()


def textbook(job: Job) -> None:
    """Fetch, step, read, log, at every step."""
    train(job, loader(job.workload, 0), 1)


def sensible(job: Job, num_workers: int, start: str | None = None) -> None:
    """Let worker processes fetch, and read the loss seldom."""
    train(job, loader(job.workload, num_workers, start), READ_EVERY)


def headspace(job: Job) -> None:
    """Have one epoch's first batches there already: no loader does better."""
    few = [batch for batch, _ in zip(loader(job.workload, 0), range(2), strict=False)]
    job.restart()
    train(job, Repeated(few, job.workload.num_batches), READ_EVERY)


class Repeated:
    """A few batches, over and over."""

    def __init__(self, batches: list[Any], count: int) -> None:
        self._batches, self._count = batches, count

    def __iter__(self) -> Any:
        return (self._batches[number % len(self._batches)] for number in range(self._count))


def one_thread() -> None:
    """Leave the other cores to the host's work."""
    torch.set_num_threads(1)
