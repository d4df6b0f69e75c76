"""One batch of a map-style dataset: its samples, then collate; errors say which sample it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch.utils.data import Subset, TensorDataset, default_collate

from pipeline.batch import Batch
from pipeline.data.collate import Memory, collate_samples, select_rows
from pipeline.data.recycling import RecycledMemory
from pipeline.data.sample_order import Indices
from pipeline.errors import StageError, add_stage_note
from pipeline.gil import stage
from pipeline.randomness.seeds import Epoch, epoch_key, seed_in_epoch

CollateFn: TypeAlias = Callable[[Any], Batch]
"""Takes a list of samples, or whatever a dataset's ``__getitems__`` returns."""
SeedSample: TypeAlias = Callable[[Callable[[], int]], None]
"""Told before a sample is made; calls what it is given for the sample's seed, if it needs it."""

FETCHING, COLLATING = stage("fetch"), stage("collate")


class Fetcher:
    """Makes batches of a map-style dataset.

    Args:
        dataset: Has ``__getitem__`` for ``0 … len - 1``, or ``__getitems__`` for a list of them, whose result
            is handed to `collate_fn` as it is.
        collate_fn: Samples to batch; torch's `default_collate` unless told.

    Attributes:
        is_drawless: Whether it is known, not only observed, that no random number is drawn.
        makes_fresh_batches: Whether each batch is known to have memory of its own.
    """

    def __init__(self, dataset: Any, collate_fn: CollateFn | None) -> None:
        self.dataset = dataset
        self._collate_fn = collate_fn or default_collate
        self._memory, self._has_getitems = RecycledMemory(), _has_getitems(dataset)
        # The plain case, many times faster than sample by sample, and equal to it bit for bit.
        self.makes_fresh_batches = self._collate_fn is default_collate
        self.is_drawless = type(dataset) is TensorDataset and self.makes_fresh_batches

    def fetch(
        self,
        indices: Indices,
        epoch: Epoch,
        position: int,
        seed_sample: SeedSample | None,
        memory: Memory | None = None,
    ) -> Batch:
        """Make the batch of these samples.

        Args:
            indices: Of the samples.
            epoch: With the seed of its random numbers.
            position: The batch's place in its epoch, for the note on an error.
            seed_sample: Told before each sample is made; None where nothing is seeded.
            memory: Where its tensors are to lie; unless told, that of former batches if they are large.

        Raises:
            Exception: The dataset's own, or the collate function's, with a note.

        Runs on:
            Any thread, several at once; a worker process too.
        """
        if self.is_drawless:
            indices = torch.as_tensor(indices)
            return [select_rows(tensor, indices, memory or self._memory) for tensor in self.dataset.tensors]
        with FETCHING:
            numbers = indices.tolist() if isinstance(indices, torch.Tensor) else indices
            samples = self._samples(numbers, epoch, position, seed_sample)
        try:
            with COLLATING:
                if self.makes_fresh_batches:
                    return collate_samples(samples, memory or self._memory)
                return self._collate_fn(samples)
        except Exception as error:
            add_stage_note(error, "collate", batch=position, epoch=epoch.number)
            raise

    def forget_memory(self) -> None:
        """Let go of the memory of former batches: somebody else makes the next ones."""
        self._memory = RecycledMemory()

    def roots(self, name: str) -> list[tuple[str, Any]]:
        """Return what of the user's makes a batch; `name` is what the dataset is called."""
        collate_fn = None if self.makes_fresh_batches else self._collate_fn
        return [(name, self.dataset), ("collate_fn", collate_fn)]

    def _samples(
        self, indices: Sequence[int], epoch: Epoch, position: int, seed_sample: SeedSample | None
    ) -> Any:
        index: int | None = None
        key = 0 if seed_sample is None else epoch_key(epoch.seed, epoch.number)
        try:
            if self._has_getitems:
                if seed_sample is not None:
                    seed_sample(partial(seed_in_epoch, key, indices[0]))
                return self.dataset.__getitems__(list(indices))
            samples, dataset = [], self.dataset
            for index in indices:
                if seed_sample is not None:
                    seed_sample(partial(seed_in_epoch, key, index))
                samples.append(dataset[index])
            return samples
        except Exception as error:
            add_stage_note(error, "fetch", index=index, batch=position, epoch=epoch.number)
            if isinstance(error, StopIteration):  # it would end the generators that it passes through
                message = "the dataset raised StopIteration, which ends a loop silently. Raise IndexError."
                raise StageError(message, stage="fetch", index=index) from error
            raise


def plain_attributes(dataset: Any) -> list[tuple[str, Any]]:
    """Return the numbers, texts and flags of a dataset, and those of the datasets in it."""
    found = []
    while dataset is not None:
        attributes = getattr(dataset, "__dict__", {})
        found += [each for each in attributes.items() if isinstance(each[1], (bool, int, float, str))]
        dataset = attributes.get("dataset")
    return found


def _has_getitems(dataset: Any) -> bool:
    """Say whether a list of samples is made faster than one by one.

    torch's `Subset` offers ``__getitems__`` over any dataset; taken, it would make a sample's random
    numbers depend on its neighbours in the batch. A class of the user's is taken at its word, as a DataLoader
    does.
    """
    if type(dataset) is Subset:
        return _has_getitems(dataset.dataset)
    return bool(getattr(dataset, "__getitems__", None))
