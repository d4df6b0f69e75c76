"""Which samples make which batch: a function of `(seed, epoch, step)` alone, or a DataLoader's own order."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import torch

from pipeline.seeding import shuffle_generator

_BLOCK = 256


Indices: TypeAlias = "torch.Tensor | list[int]"
"""The samples of a batch: int64 ``[B]``, or as a list where a sampler gave them so."""


class Plan(Protocol):
    """The sample indices of each batch of one epoch."""

    def __len__(self) -> int:
        """Return the number of batches."""

    def indices(self, position: int) -> Indices:
        """Return the sample indices of the batch at this position.

        Runs on:
            Any thread.
        """


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
        self._share = range(rank, num_samples, world_size)
        self._batch_size = int(batch_size)
        self._num_batches = num_batches(num_samples // world_size, batch_size, drop_last)
        self._num_samples = self._num_batches * self._batch_size if drop_last else len(self._share)
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

    def _cut_block(self, block: int) -> tuple[torch.Tensor, ...]:
        count = min(self._num_batches - block * _BLOCK, _BLOCK)
        first = block * _BLOCK * self._batch_size
        is_last = block * _BLOCK + count == self._num_batches
        last = self._num_samples if is_last else first + count * self._batch_size
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
    """The order of a torch batch sampler, taken from it as far as it is needed.

    Args:
        batch_sampler: Yields lists of sample indices. Its first one is taken here, on the loop thread: that
            is where torch's samplers draw, once an epoch, from the global generator.
        num_batches: How many there are.
    """

    def __init__(self, batch_sampler: Iterable[Sequence[int]], num_batches: int) -> None:
        self._num_batches = num_batches
        self._batches: Iterator[Sequence[int]] = iter(batch_sampler)
        self._taken: list[list[int]] = []
        self._lock = threading.Lock()
        if num_batches:
            self.indices(0)

    def __len__(self) -> int:
        return self._num_batches

    def indices(self, position: int) -> list[int]:
        with self._lock:
            while len(self._taken) <= position:
                self._taken.append(_as_ints(next(self._batches)))
            return self._taken[position]


def _as_ints(indices: Sequence[Any]) -> list[int]:
    """Return a sampler's indices as Python's integers; they may be NumPy's, or tensors."""
    if type(indices) is list and set(map(type, indices)) == {int}:
        return indices.copy()  # a sampler may go on with its list
    return torch.tensor(indices).tolist()


def num_batches(num_samples: int, batch_size: int, drop_last: bool) -> int:
    """Count the batches of an epoch."""
    return num_samples // batch_size if drop_last else -(-num_samples // batch_size)
