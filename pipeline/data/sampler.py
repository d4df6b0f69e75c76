"""Which samples make which batch: a function of `(seed, epoch, step)` alone, or a DataLoader's own order."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch

from pipeline.seeding import shuffle_generator

_BLOCK = 256


class Plan(Protocol):
    """The sample indices of each batch of one epoch."""

    def __len__(self) -> int:
        """Return the number of batches."""

    def indices(self, position: int) -> torch.Tensor:
        """Return the sample indices of the batch at this position: int64 ``[B]``.

        Runs on:
            Any thread.
        """


class BatchPlan:
    """The sample indices of each batch of one epoch.

    Args:
        num_samples: Samples in the dataset.
        batch_size: Samples per batch.
        shuffle: Draw a permutation from ``(seed, epoch)``; in the dataset's order otherwise.
        drop_last: Leave out a last batch that is not full.
        seed: The run's seed.
        epoch: Counted from 0.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        shuffle: bool,
        drop_last: bool,
        seed: int,
        epoch: int,
    ) -> None:
        self._num_samples, self._batch_size = num_samples, batch_size
        self._num_batches = num_batches(num_samples, batch_size, drop_last)
        self._order: torch.Tensor | None = None
        self._cut: tuple[int, tuple[torch.Tensor, ...]] = (-1, ())
        if shuffle:
            self._order = torch.randperm(num_samples, generator=shuffle_generator(seed, epoch))

    def __len__(self) -> int:
        return self._num_batches

    def indices(self, position: int) -> torch.Tensor:
        # Cut in one call for many batches: a slice for each would cost a step 3 µs.
        block, place = divmod(position, _BLOCK)
        cut_block, indices = self._cut
        if block != cut_block:
            first = block * _BLOCK * self._batch_size
            last = min(first + _BLOCK * self._batch_size, self._num_samples)
            piece = torch.arange(first, last) if self._order is None else self._order[first:last]
            indices = piece.split(self._batch_size)  # type: ignore[no-untyped-call]
            self._cut = block, indices
        return indices[place]


class SamplerPlan:
    """The order of a torch batch sampler, taken from it as far as it is needed.

    Args:
        batch_sampler: Yields lists of sample indices. Its first one is taken here, on the loop thread: that
            is where torch's samplers draw, once an epoch, from the global generator.
        num_batches: How many there are.
    """

    def __init__(self, batch_sampler: Iterable[Sequence[int]], num_batches: int) -> None:
        self._num_batches = num_batches
        self._batches: Iterator[Sequence[int]] = iter(batch_sampler)
        self._taken: list[torch.Tensor] = []
        self._lock = threading.Lock()
        if num_batches:
            self.indices(0)

    def __len__(self) -> int:
        return self._num_batches

    def indices(self, position: int) -> torch.Tensor:
        with self._lock:
            while len(self._taken) <= position:
                self._taken.append(torch.tensor(next(self._batches)))
            return self._taken[position]


def num_batches(num_samples: int, batch_size: int, drop_last: bool) -> int:
    """Count the batches of an epoch."""
    return num_samples // batch_size if drop_last else -(-num_samples // batch_size)
