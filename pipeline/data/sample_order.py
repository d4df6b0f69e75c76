"""Which samples make which batch: a function of `(seed, epoch, step)` alone, or a DataLoader's own order."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Protocol, TypeAlias

import torch
from torch.utils.data import BatchSampler

from pipeline.randomness.seeds import shuffle_generator

_BLOCK = 256


Indices: TypeAlias = "torch.Tensor | list[int]"
"""The samples of a batch: int64 ``[B]``, or as a list where a sampler gave them so."""


class Plan(Protocol):
    """The sample indices of each batch of one epoch.

    Attributes:
        num_samples: That are ordered, on all ranks; None where only a sampler knows.
    """

    num_samples: int | None

    def __len__(self) -> int:
        """Return the number of batches."""

    def indices(self, position: int) -> Indices:
        """Return the sample indices of the batch at this position.

        Runs on:
            Any thread.
        """

    def end(self) -> None:
        """Do what a plain loop does with a sampler when it asks for a batch behind the last one."""


class BatchPlan:
    """The sample indices of each batch of one epoch, on one of the ranks that share it.

    The epoch's order is dealt out to the ranks like cards, one sample each in turn, and each rank cuts what
    it has into batches. So every sample goes to one rank, the batches of a step are the next
    ``batch_size × world_size`` samples of the order, and their sizes differ by one at most. All ranks have
    the same number of batches, since a step waits for all of them: where the last step would have fewer
    samples than ranks, they go to the batches of the step before.

    Args:
        num_samples: Samples in the dataset; as many as there are ranks or more.
        batch_size: Samples per batch, on each rank.
        shuffle: Draw a permutation from ``(seed, epoch)``; in the dataset's order otherwise.
        drop_last: Leave out a last batch that is not full on every rank, and what is left over.
        seed: The run's seed; the same on all ranks.
        epoch: Counted from 0.
        rank: Whose batches these are.
        world_size: The number of ranks.
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
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_samples: int | None = num_samples
        self._share = range(rank, num_samples, world_size)
        self._batch_size = int(batch_size)
        self._num_batches = num_batches(num_samples // world_size, batch_size, drop_last)
        self._num_used = self._num_batches * self._batch_size if drop_last else len(self._share)
        self._order: torch.Tensor | None = None
        self._cut: tuple[int, tuple[torch.Tensor, ...]] = (-1, ())
        if shuffle:
            order = torch.randperm(num_samples, generator=shuffle_generator(seed, epoch))
            self._order = order[rank::world_size].contiguous()

    def __len__(self) -> int:
        return self._num_batches

    def indices(self, position: int) -> torch.Tensor:
        # Cut in one call for many batches: a slice for each would cost a step 3 µs.
        block, place = divmod(position, _BLOCK)
        cut_block, indices = self._cut
        if block != cut_block:
            indices = self._cut_block(block)
            self._cut = block, indices
        return indices[place]

    def end(self) -> None:
        """Do nothing: the order was drawn from a generator of its own."""

    def _cut_block(self, block: int) -> tuple[torch.Tensor, ...]:
        count = min(self._num_batches - block * _BLOCK, _BLOCK)
        first = block * _BLOCK * self._batch_size
        is_last = block * _BLOCK + count == self._num_batches
        last = self._num_used if is_last else first + count * self._batch_size
        numbers = self._share[first:last]
        piece = (
            torch.arange(numbers.start, numbers.stop, numbers.step)
            if self._order is None
            else self._order[first:last]
        )
        sizes = [self._batch_size] * (count - 1)
        cut: Any = piece.split([*sizes, last - first - sum(sizes)])  # type: ignore[no-untyped-call]
        return cut  # type: ignore[no-any-return]


class SamplerPlan:
    """The order of a torch sampler, taken from it as far as it is needed.

    Some of torch's samplers draw when they are made to end, too, from a generator that may be others' as
    well. So they end with the epoch, and not when their last sample is taken ahead of it.

    Args:
        batch_sampler: Says how its sampler is cut into batches. The first one is taken here, on the loop
            thread: that is where torch's samplers draw, once an epoch, from the global generator.
    """

    def __init__(self, batch_sampler: BatchSampler) -> None:
        self._num_batches, self._batch_size = len(batch_sampler), batch_sampler.batch_size
        self.num_samples: int | None = None
        self._num_left = len(batch_sampler.sampler)  # type: ignore[arg-type]
        self._samples: Iterator[Any] = iter(batch_sampler.sampler)
        self._taken: list[list[int]] = []
        self._lock = threading.Lock()
        if self._num_batches:
            self.indices(0)

    def __len__(self) -> int:
        return self._num_batches

    def indices(self, position: int) -> list[int]:
        with self._lock:
            while len(self._taken) <= position:
                size = min(self._batch_size, self._num_left)
                self._num_left -= size
                self._taken.append(_as_ints(list(islice(self._samples, size))))
            return self._taken[position]

    def end(self) -> None:
        for _ in self._samples:  # of a last batch that is left out, and whatever is drawn behind it
            pass


def _as_ints(indices: Sequence[Any]) -> list[int]:
    """Return a sampler's indices as Python's integers; they may be NumPy's, or tensors."""
    if type(indices) is list and set(map(type, indices)) == {int}:
        return indices.copy()  # a sampler may go on with its list
    return torch.tensor(indices).tolist()


def num_batches(num_samples: int, batch_size: int, drop_last: bool) -> int:
    """Count the batches of an epoch."""
    return num_samples // batch_size if drop_last else -(-num_samples // batch_size)
