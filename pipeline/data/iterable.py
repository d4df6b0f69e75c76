"""Data that yields batches itself: a DataLoader, or any iterable, run as it is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from pipeline.batch import Batch
from pipeline.data.generators import Watch, global_generators
from pipeline.data.randomness import GeneratorMode
from pipeline.data.reader import END
from pipeline.errors import add_stage_note
from pipeline.seeding import sample_seed


class IterableSource:
    """A DataLoader, or any iterable of batches, run as it is.

    The iterator is made and its first batch taken on the loop thread, where a DataLoader draws its
    base seed and its order from torch's global generator, just as in a plain loop. Later batches'
    torch draws come from ``(seed, epoch)``, in either schedule, so that a prefetch thread never
    draws from the generator that the model's dropout uses. Where it cannot be kept from that
    (`F.dropout` in a transform), or the first batch moves Python's or NumPy's generator, the loop thread
    makes the batches.
    """

    def __init__(self, batches: Iterable[Batch], seed: int, name: str) -> None:
        self._batches, self._seed, self.name = batches, seed, name
        self.num_batches: int | None = length_or_none(batches)
        self.unhookable: tuple[str, ...] = ()
        self.makes_fresh_batches = isinstance(batches, (list, tuple)) or (
            isinstance(batches, DataLoader)
            and (batches.num_workers > 0 or batches.collate_fn is default_collate)
        )

    def open(self, epoch: int, max_batches: int | None = None, start: int = 0) -> IterableReader:
        generator = torch.Generator().manual_seed(sample_seed(self._seed, epoch, 0))
        is_plain = type(self._batches) in (list, tuple)  # nothing that could draw
        batches = itertools.islice(iter(self._batches), max_batches)
        reader = IterableReader(self, batches, None if is_plain else GeneratorMode(generator), epoch)
        reader.skip(start)
        return reader


class IterableReader:
    """One epoch of an `IterableSource`."""

    is_random_access = False

    def __init__(
        self, source: IterableSource, batches: Iterator[Batch], mode: GeneratorMode | None, epoch: int
    ) -> None:
        self._source, self._batches, self._mode, self._epoch = source, batches, mode, epoch
        self.position, self.is_exhausted = 0, False

    @property
    def is_threadable(self) -> bool:
        return not self._source.unhookable

    def first(self) -> Batch:
        if self._mode is None or self.position > 0:
            return self.read()
        listener, watch = GeneratorMode(None), Watch(global_generators()[1:])  # torch's moves anyway
        watch.start()
        with listener:
            batch = self._next()
        found = (*listener.unhookable, *(each.name for each in watch.moved()))
        self._source.unhookable = self._source.unhookable or found
        return batch

    def read(self) -> Batch:
        if self._mode is None or self.position == 0:
            return self._next()
        with self._mode:
            return self._next()

    def skip(self, count: int) -> None:
        """Make batches and drop them, drawing what they draw; loop thread."""
        make = self.thread_maker()
        while self.position < count:
            if (self.first() if self.position == 0 else make(self.position)) is END:
                return

    def thread_maker(self) -> Callable[[int], Batch]:
        def make(position: int) -> Batch:
            batch = self.read()
            if self._mode is not None and self._mode.unhookable:
                # Too late for this batch, which cannot be made again; not for the next one.
                self._source.unhookable = tuple(self._mode.unhookable)
            return batch

        return make

    def close(self) -> None:
        self._batches = iter(())  # a DataLoader's workers end with its iterator

    def _next(self) -> Batch:
        try:
            batch = next(self._batches)
        except StopIteration:
            self.is_exhausted = True
            return END
        except Exception as error:
            add_stage_note(error, "fetch", batch=self.position, epoch=self._epoch)
            raise
        self.position += 1
        return batch


def length_or_none(data: Any) -> int | None:
    """Return the length of whatever has one."""
    try:
        return len(data)
    except TypeError:
        return None
