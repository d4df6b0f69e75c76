"""The batches of an iterable dataset's shards: each shard read in its order, and again if need be.

A batch has a number in its shard. Whoever asks for a later one than comes next has those between read and
dropped; whoever asks for an earlier one has the shard begun again. So it does not matter who has read what
before: a worker that takes another's place, or a thread to which the epoch comes back, gives the same.
"""

from __future__ import annotations

import copy
import io
import itertools
import logging
import pickle
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy
import torch
from torch.utils.data import default_collate

from pipeline.batch import Batch
from pipeline.data.collate import Memory, collate_samples
from pipeline.data.fetch import COLLATING, FETCHING, CollateFn, SeedSample, plain_attributes
from pipeline.data.reader import END
from pipeline.data.recycling import RecycledMemory
from pipeline.data.worker_info import told, worker_info
from pipeline.errors import ConfigError, add_stage_note
from pipeline.randomness.seeds import Epoch, sample_seed

logger = logging.getLogger("pipeline")

_SPLIT = """    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        shard, num_shards = (0, 1) if info is None else (info.id, info.num_workers)
        for sample in itertools.islice(self.samples(), shard, None, num_shards):
            yield sample"""


@dataclass(slots=True)
class _Shard:
    """A shard as far as it has been read.

    Args:
        epoch: That is read.
        dataset: To be iterated.
        number: Of the batch that comes next.
        next: The least number that may be asked for; beyond `number` if the shard was found to have ended.
    """

    epoch: Epoch
    dataset: Any
    number: int = 0
    next: int = 0
    iterator: Iterator[Any] | None = field(default=None)
    has_ended: bool = False


class ShardFetcher:
    """Makes the batches of an iterable dataset's shards.

    Args:
        dataset: Iterated once a shard and epoch. With several shards each has a copy of its own, as in
            a DataLoader's worker; tensors and arrays are shared.
        batch_size: Samples per batch; a shard's last one may have fewer.
        drop_last: Leave out a shard's last batch if it is not full.
        collate_fn: Samples to batch; torch's `default_collate` unless told.
        num_shards: Into which the dataset splits itself, asking `torch.utils.data.get_worker_info`.

    Attributes:
        is_drawless: Whether it is known that no random number is drawn.
        makes_fresh_batches: Whether each batch is known to have memory of its own.
    """

    is_drawless = False

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        drop_last: bool,
        collate_fn: CollateFn | None,
        num_shards: int,
    ) -> None:
        self.dataset, self.num_shards = dataset, num_shards
        self.batch_size, self._drop_last = batch_size, drop_last
        self._collate_fn = collate_fn or default_collate
        self.makes_fresh_batches = self._collate_fn is default_collate
        self._memory = RecycledMemory()
        self._shards: dict[int, _Shard] = {}
        self._copies: _Copies | None = None
        self._before: tuple[Epoch, dict[str, Any]] | None = None

    def opened(self) -> ShardFetcher:
        """Return one that has read nothing yet, over the dataset as it is now."""
        opened = copy.copy(self)
        opened._shards, opened._copies, opened._before = {}, None, None
        return opened

    def close(self) -> None:
        """Let go of the iterators."""
        self._shards.clear()

    def stands_at(self, shard: int) -> int:
        """Return the number of the batch that can be made without reading another."""
        return self._shards[shard].number if shard in self._shards else 0

    def forget_memory(self) -> None:
        """Let go of the memory of former batches: somebody else makes the next ones."""
        self._memory = RecycledMemory()

    def roots(self, name: str) -> list[tuple[str, Any]]:
        """Return what of the user's makes a batch; `name` is what the dataset is called."""
        collate_fn = None if self.makes_fresh_batches else self._collate_fn
        return [(name, self.dataset), ("collate_fn", collate_fn)]

    def plain_state(self) -> list[tuple[str, Any]]:
        """Return the dataset's numbers, texts and flags, and those of the datasets in it."""
        return plain_attributes(self.dataset)

    def fetch(
        self,
        indices: torch.Tensor,
        epoch: Epoch,
        position: int,
        seed_batch: SeedSample | None,
        memory: Memory | None = None,
    ) -> Batch:
        """Make a batch of a shard, and read or begin again as far as that takes.

        Args:
            indices: The shard: int64 ``[1]``.
            epoch: With the seed of its random numbers.
            position: The batch's number in its shard.
            seed_batch: Told before each batch is read; None where nothing is seeded.
            memory: Where its tensors are to lie; unless told, that of former batches if they are large.

        Returns:
            `END` if the shard has ended before.

        Raises:
            ConfigError: If the dataset was iterated as one of several shards, and never asked which.
            Exception: The dataset's own, or the collate function's, with a note.

        Runs on:
            One thread at a time; a worker process too.
        """
        number = int(indices[0])
        with FETCHING:
            shard = self._take(number, epoch, position)
            try:
                samples = self._read_to(shard, number, position, seed_batch)
            except Exception as error:
                if not isinstance(error, ConfigError):
                    self._note(error, "fetch", number, position, epoch)
                raise
            shard.next = position + 1
        try:
            with COLLATING:
                batch = END if samples is None else self._collate(samples, memory or self._memory)
        except Exception as error:
            self._note(error, "collate", number, position, epoch)
            raise
        self._shards[number] = shard
        return batch

    def _collate(self, samples: list[Any], memory: Memory) -> Batch:
        return collate_samples(samples, memory) if self.makes_fresh_batches else self._collate_fn(samples)

    def _note(self, error: Exception, stage: str, shard: int, position: int, epoch: Epoch) -> None:
        named = shard if self.num_shards > 1 else None
        add_stage_note(error, stage, shard=named, batch=position, epoch=epoch.number)

    def _take(self, number: int, epoch: Epoch, position: int) -> _Shard:
        """Return a shard that stands before a batch; it is put back when nothing was raised."""
        shard = self._shards.pop(number, None)
        if shard is not None and shard.epoch == epoch and shard.next <= position:
            return shard
        del shard  # a generator may have a last word, which must come before the next one's first
        return self._begin(epoch)

    def _begin(self, epoch: Epoch) -> _Shard:
        if self.num_shards > 1:
            self._copies = self._copies or _Copies(self.dataset)
            return _Shard(epoch, self._copies.make())
        attributes = getattr(self.dataset, "__dict__", {})
        if self._before is None or self._before[0] != epoch:
            self._before = epoch, dict(attributes)
        else:  # an epoch begun again is the same epoch for a dataset that counts them, too
            attributes.clear()
            attributes.update(self._before[1])
        return _Shard(epoch, self.dataset)

    def _read_to(
        self, shard: _Shard, number: int, position: int, seed_batch: SeedSample | None
    ) -> list[Any] | None:
        """Read a shard up to the end of a batch; return its samples, or None if it has ended before."""
        shard_seed = sample_seed(shard.epoch.seed, shard.epoch.number, number)
        is_split = self.num_shards > 1
        info = worker_info(number, self.num_shards, shard_seed, shard.dataset) if is_split else None
        if position > shard.number:
            logger.info("reading %d batches of shard %d again", position - shard.number, number)
        samples = None
        with told(info) as thread:
            while shard.number <= position and not shard.has_ended:
                if seed_batch is not None:
                    seed_batch(partial(sample_seed, shard_seed, shard.number, 0))
                is_first = shard.iterator is None
                if shard.iterator is None:
                    shard.iterator = iter(shard.dataset)
                samples = list(itertools.islice(shard.iterator, self.batch_size))
                if is_first and is_split and not thread.was_asked:
                    raise ConfigError(_describe_unsplit(shard.dataset, self.num_shards))
                shard.has_ended = len(samples) < self.batch_size
                if not samples or (shard.has_ended and self._drop_last):
                    return None
                shard.number += 1
        return samples if shard.number == position + 1 else None


class _Copies:
    """Copies of a dataset as it was; its tensors, arrays, functions and classes are not copied.

    They are made as a worker process gets it, through its pickle.

    Raises:
        ConfigError: If it cannot be copied.
    """

    def __init__(self, dataset: Any) -> None:
        file = io.BytesIO()
        pickler = _Copier(file)
        try:
            pickler.dump(dataset)
        except Exception as error:
            raise ConfigError(
                f"num_shards of more than 1 gives each shard a copy of the dataset, but it cannot be copied: "
                f"{error}. Open files and the like in __iter__, or set num_shards=1."
            ) from error
        self._data, self._kept = file.getvalue(), pickler.kept

    def make(self) -> Any:
        return _Restorer(io.BytesIO(self._data), self._kept).load()


class _Copier(pickle.Pickler):
    _KEPT = (torch.Tensor, numpy.ndarray, type, types.FunctionType, types.ModuleType)

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.kept: list[Any] = []

    def persistent_id(self, found: Any) -> int | None:
        if not isinstance(found, self._KEPT):
            return None
        self.kept.append(found)
        return len(self.kept) - 1


class _Restorer(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, kept: list[Any]) -> None:
        super().__init__(file)
        self._kept = kept

    def persistent_load(self, number: Any) -> Any:
        return self._kept[number]


def _describe_unsplit(dataset: Any, num_shards: int) -> str:
    return (
        f"num_shards is {num_shards}, but {type(dataset).__name__} was iterated without asking which shard "
        f"it is, so it would yield every sample {num_shards} times. Set num_shards=1, or split it:\n{_SPLIT}"
    )
