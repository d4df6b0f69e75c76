"""The batches of one epoch, made one at a time, in order, on whichever thread asks.

A `Source` opens a `Reader` for each epoch. It starts on the loop thread, may go on in a prefetch
thread, and can come back; the batches are the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, default_collate

from pipeline.batch import Batch
from pipeline.data.fetch import CollateFn, Fetcher
from pipeline.data.generators import Watch, global_generators
from pipeline.data.randomness import GeneratorMode, SampleRandomness, UnhookableDrawError
from pipeline.data.sampler import BatchPlan, num_batches
from pipeline.errors import add_stage_note
from pipeline.seeding import sample_seed

END: Any = object()
"""What a reader returns after the last batch of its epoch."""


EVALUATION_EPOCH = -1
"""Takes the place of the epoch where nothing is trained, so that every validation sees the same."""


class Reader(Protocol):
    """The batches of one epoch, in order; `END` after the last one."""

    def first(self) -> Batch:
        """Make the next batch on the loop thread and find out whether a thread can make more.

        After it, `is_threadable` says so. So an epoch begins, and goes on after an
        `UnhookableDrawError`.
        """

    def read(self) -> Batch:
        """Make the next batch on the loop thread."""

    def read_in_thread(self) -> Batch:
        """Make the next batch on the prefetch thread.

        Raises:
            UnhookableDrawError: If only the loop thread can make this batch; nothing is consumed.
        """

    def close(self) -> None:
        """Let go of what the epoch holds; nothing is read afterwards."""

    @property
    def is_threadable(self) -> bool:
        """Whether, as far as is known, the prefetch thread can make the next batch."""

    @property
    def position(self) -> int:
        """The batches of the epoch made so far, by this reader or before its start."""


class Source(Protocol):
    """A user's data.

    Attributes:
        num_batches: Batches per epoch, or None where nobody knows.
        unhookable: What the data was seen to draw from that a thread cannot isolate.
        makes_fresh_batches: Whether each batch is known to have memory of its own.
    """

    num_batches: int | None
    unhookable: tuple[str, ...]
    makes_fresh_batches: bool

    def open(self, epoch: int, max_batches: int | None = None, start: int = 0) -> Reader:
        """Begin an epoch of at most so many batches; loop thread.

        Args:
            epoch: Counted from 0.
            max_batches: Of the whole epoch, those before `start` included.
            start: Batches to leave out, as a run that is resumed has used them already.
        """


class MapSource:
    """A map-style dataset: its batches depend on ``(seed, epoch, step)`` alone."""

    def __init__(
        self,
        dataset: Any,
        *,
        batch_size: int,
        shuffle: bool,
        drop_last: bool,
        collate_fn: CollateFn | None,
        seed: int,
    ) -> None:
        self._num_samples = len(dataset)
        self._batch_size, self._shuffle, self._drop_last = batch_size, shuffle, drop_last
        self._seed = seed
        self.fetcher = Fetcher(dataset, collate_fn, seed)
        self.randomness = SampleRandomness()
        self.num_batches: int | None = num_batches(self._num_samples, batch_size, drop_last)
        self.unhookable: tuple[str, ...] = ()
        self.makes_fresh_batches = collate_fn is None

    def open(self, epoch: int, max_batches: int | None = None, start: int = 0) -> MapReader:
        plan = BatchPlan(
            self._num_samples,
            batch_size=self._batch_size,
            shuffle=self._shuffle,
            drop_last=self._drop_last,
            seed=self._seed,
            epoch=epoch,
        )
        return MapReader(self, plan, epoch, _at_most(len(plan), max_batches), start)


class MapReader:
    """One epoch of a `MapSource`."""

    def __init__(
        self, source: MapSource, plan: BatchPlan, epoch: int, num_batches: int, start: int = 0
    ) -> None:
        self._source, self._plan, self._epoch = source, plan, epoch
        self._num_batches = num_batches
        self._randomness = source.randomness
        self.position = start

    @property
    def is_threadable(self) -> bool:
        return not self._source.unhookable

    def first(self) -> Batch:
        if self.is_threadable and not self._randomness.has_suspects:
            try:
                return self._next(self._randomness.probe)
            except UnhookableDrawError as found:
                self._source.unhookable = found.names
        batch = self.read()
        self._source.unhookable = self._source.unhookable or self._randomness.drawn
        return batch

    def read(self) -> Batch:
        return self._next(self._randomness.on_loop_thread)

    def read_in_thread(self) -> Batch:
        try:
            return self._next(self._randomness.in_thread)
        except UnhookableDrawError as found:
            if found.is_certain:
                self._source.unhookable = found.names
            raise

    def close(self) -> None:
        """Hold nothing."""

    def _next(self, isolate: Any) -> Batch:
        position, fetcher = self.position, self._source.fetcher
        if position >= self._num_batches:
            return END
        indices = self._plan.indices(position)
        if fetcher.is_drawless:
            batch = fetcher.fetch(indices, self._epoch, position, _no_seed)
        else:
            batch = isolate(lambda seed: fetcher.fetch(indices, self._epoch, position, seed))
        self.position = position + 1
        return batch


def _no_seed(seed: int) -> None:
    pass


class IterableSource:
    """A DataLoader, or any iterable of batches, run as it is.

    The iterator is made and its first batch taken on the loop thread, where a DataLoader draws its
    base seed and its order from torch's global generator, just as in a plain loop. Later batches'
    torch draws come from ``(seed, epoch)``, in either schedule, so that a prefetch thread never
    draws from the generator that the model's dropout uses. Where it cannot be kept from that
    (`F.dropout` in a transform), or the first batch moves Python's or NumPy's generator, the loop thread
    makes the batches.
    """

    def __init__(self, batches: Iterable[Batch], seed: int) -> None:
        self._batches, self._seed = batches, seed
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

    def __init__(
        self, source: IterableSource, batches: Iterator[Batch], mode: GeneratorMode | None, epoch: int
    ) -> None:
        self._source, self._batches, self._mode, self._epoch = source, batches, mode, epoch
        self.position = 0

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
        while self.position < count:
            if (self.first() if self.position == 0 else self.read_in_thread()) is END:
                return

    def read_in_thread(self) -> Batch:
        batch = self.read()
        if self._mode is not None and self._mode.unhookable:
            # Too late for this batch, which cannot be made again; not for the next one.
            self._source.unhookable = tuple(self._mode.unhookable)
        return batch

    def close(self) -> None:
        self._batches = iter(())  # a DataLoader's workers end with its iterator

    def _next(self) -> Batch:
        try:
            batch = next(self._batches)
        except StopIteration:
            return END
        except Exception as error:
            add_stage_note(error, "fetch", batch=self.position, epoch=self._epoch)
            raise
        self.position += 1
        return batch


def _at_most(count: int, limit: int | None) -> int:
    return count if limit is None else min(count, limit)


def length_or_none(data: Any) -> int | None:
    """Return the length of whatever has one."""
    try:
        return len(data)
    except TypeError:
        return None
