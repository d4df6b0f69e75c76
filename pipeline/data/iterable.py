"""Data that yields batches itself: a DataLoader, or any iterable, run as it is."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from pipeline.batch import Batch
from pipeline.data.iterable_states import KeptStates
from pipeline.data.loader_kinds import (
    end_dead_workers,
    fetching_from,
    have_own_memory,
    is_known_kind,
    length_or_none,
)
from pipeline.data.reader import END, of_this_kind
from pipeline.errors import add_stage_note
from pipeline.randomness.generator_mode import GeneratorMode
from pipeline.randomness.generators import Watch, global_generators
from pipeline.randomness.seeds import Epoch, drawing_from, sample_seed, take_generators, times_taken

READS_OURS = ("the samples of a pipeline.Loader",)  # and so from the global generators, on the loop thread


class IterableSource:
    """A DataLoader, or any iterable of batches, run as it is.

    What it draws from torch's global generator comes from a stream of its own, seeded with ``(seed, epoch,
    rank)``, so data never draws from the generator that the model's dropout uses. Its first batch is made on
    the loop thread, which shows whether a thread can be given the stream. Where it cannot (`F.dropout` in a
    transform), or where Python's or NumPy's generator moves, the loop thread makes the batches. A DataLoader
    draws its base seed and its order from the global generator when an epoch begins, as in a plain loop.

    Args:
        batches: What yields them.
        seed: Of all epochs; None takes torch's, as it is when an epoch begins.
        name: What the user's argument is called.
        rank: Whose the draws are: ranks that read the same code get batches of their own.
    """

    def __init__(self, batches: Iterable[Batch], seed: int | None, name: str, rank: int = 0) -> None:
        self.data, self.seed, self.name, self._rank = batches, seed, name, rank
        self.num_batches: int | None = length_or_none(batches)
        self.unhookable: tuple[str, ...] = ()
        self._has_state = hasattr(batches, "state_dict") and hasattr(batches, "load_state_dict")
        self.kept: KeptStates | None = None
        self._found: dict[str, Any] | None = None
        self._reader: IterableReader | None = None
        # A loader of ours: nothing of it draws from the stream, and its epochs have numbers of their own.
        self.is_ours = bool(getattr(batches, "sets_draws_apart", False))
        self._first_epoch: int | None = None
        self.makes_fresh_batches = have_own_memory(batches)
        self.is_known_kind, self.is_function_of_index = is_known_kind(batches), False

    def roots(self) -> list[tuple[str, Any]]:
        loader: Any = self.data
        if not isinstance(loader, DataLoader):
            return [(self.name, loader)]
        names = ["sampler", "batch_sampler"]
        if not loader.num_workers:  # else they are copies in processes of the user's own
            names += ["dataset", "collate_fn"]
        return [(f"{self.name}.{each}", getattr(loader, each, None)) for each in names]

    def draw_apart(self) -> None:
        """Do nothing: no batch is made twice."""

    def open(self, epoch: int, max_batches: int | None = None, start: int = 0) -> IterableReader:
        begun = Epoch.begun(epoch, self.seed)
        draws = torch.Generator().manual_seed(sample_seed(begun.seed, epoch, self._rank))
        is_plain = type(self.data) in (list, tuple) or self.is_ours  # so nothing draws from the stream
        end_dead_workers(self.data)
        if self.is_ours:
            self._count_epochs(self.data, epoch)
        position, is_over = self._go_to(start, draws)
        iterator, limit = iter(()) if is_over else self._begin(draws), max_batches
        batches = itertools.islice(iterator, None if limit is None else limit - position)
        # The first batch: all its draws, or those of a DataLoader's dataset, whose order is drawn meanwhile.
        is_loader = isinstance(self.data, DataLoader)
        drawing = partial(fetching_from, iterator, draws) if is_loader else partial(drawing_from, draws)
        self._reader = IterableReader(self, batches, None if is_plain else draws, drawing, epoch, position)
        self._reader.limit = limit
        if self.kept is not None:
            self.kept.begin()
        if start > position and not is_plain:
            again = f"{start - position} batches of the {type(self.data).__name__} are read again"
            print(f"{again} to resume its epoch", file=sys.stderr)
        self._reader.skip(start)
        return self._reader

    def state(self, position: int) -> dict[str, Any] | None:
        """Return the iterable's own state at a position, or the newest kept before it; None if there is none.

        Runs on:
            Loop thread, between two batches. If it reads the iterable itself, the iterable is asked now.
        """
        if self.is_ours:
            return {"position": 0, "first_epoch": self._first_epoch}
        kept, reader = self.kept, self._reader
        if kept is None or reader is None:
            return None
        found = kept.newest(position)
        if (found is None or found[0] < position) and reader.stands_at(position):
            if reader.has_ended:  # it may be at its beginning again, and has no more of its epoch
                return {"position": position, "is_over": True}
            found = position, self.own_state(reader)
        return None if found is None else {"position": found[0], **found[1]}

    def own_state(self, reader: IterableReader) -> dict[str, Any]:
        """Return the iterable's state, and where the generator stands that its draws come from."""
        state = {"state": self.data.state_dict()}  # type: ignore[attr-defined]
        return state | ({} if reader.draws is None else {"draws": reader.draws.get_state()})

    def keep_states(
        self, foresees: Callable[[int], bool], check: Callable[[Any], None], num_ahead: int
    ) -> None:
        """Keep states of the iterable from here on, if it has any, for checkpoints.

        Args:
            foresees: Says whether a checkpoint will be made at a position of the epoch under way; any thread.
            check: Called with its first state, before the first step.
            num_ahead: The loop is at most so many batches behind the iterable.
        """
        if self._has_state:
            self.kept = KeptStates(foresees, check, num_ahead)

    def load_state(self, found: dict[str, Any] | None) -> None:
        """Have the next epoch opened from a state, if it is opened behind it."""
        self._found = of_this_kind(found, "position", self.name)
        if self.is_ours and self._found:
            self._first_epoch = self._found.get("first_epoch")

    def _count_epochs(self, loader: Any, epoch: int) -> None:
        """Have a loader of ours open the epoch of a run, which may be resumed; validations are the same."""
        if self._first_epoch is None:
            self._first_epoch = int(loader.epoch)
        loader.epoch = self._first_epoch + max(epoch, 0)

    def _begin(self, draws: torch.Generator) -> Iterator[Batch]:
        """Return an epoch's iterator; loop thread."""
        if isinstance(self.data, DataLoader):
            return iter(self.data)
        with drawing_from(draws):
            return iter(self.data)

    def _go_to(self, start: int, draws: torch.Generator) -> tuple[int, bool]:
        """Load the state found, its draws too, if it is of a position up to `start`.

        Returns:
            Its position, 0 if there is none; and whether the epoch has nothing behind it.
        """
        found, self._found = self._found, None
        if not self._has_state or found is None or not 0 < found["position"] <= start:
            return 0, False
        if found.get("is_over"):
            return start, True
        self.data.load_state_dict(found["state"])  # type: ignore[attr-defined]
        if found.get("draws") is not None:
            draws.set_state(found["draws"])
        return int(found["position"]), False


class IterableReader:
    """One epoch of an `IterableSource`.

    Args:
        source: Of the epoch.
        batches: Of the epoch, from `position` on.
        draws: What the data draws from; None for data that draws nothing.
        first_drawing: Makes the context in which the first batch is made.
        epoch: Its number.
        position: Of the first batch.

    Attributes:
        on_begin: Called when the making of a batch begins, on the thread that makes it; None for nobody.
        limit: At most so many batches are read of it; None for all.
    """

    is_random_access = False
    max_processes: int | None = 0
    on_begin: Callable[[], None] | None = None

    def __init__(
        self,
        source: IterableSource,
        batches: Iterator[Batch],
        draws: torch.Generator | None,
        first_drawing: Callable[[], AbstractContextManager[None]],
        epoch: int,
        position: int = 0,
    ) -> None:
        self._source, self._batches, self._epoch = source, batches, epoch
        self.draws, self._first_drawing = draws, first_drawing
        self._mode = GeneratorMode(draws)
        self.position, self.is_exhausted = position, False
        self._first, self._is_ahead = position, False
        self.limit: int | None = None

    @property
    def is_known(self) -> bool:
        return self.position > self._first

    @property
    def turn(self) -> int:
        return self.position

    @property
    def num_left(self) -> float:
        return math.inf

    @property
    def is_threadable(self) -> bool:
        return not self._source.unhookable

    @property
    def has_ended(self) -> bool:
        """Whether the iterable has no further batch, and not only the loop no further wish."""
        return self.is_exhausted and (self.limit is None or self.position < self.limit)

    def stands_at(self, position: int) -> bool:
        """Say whether the iterable is at a position, and no thread at work on it."""
        return self.position == position and (self.is_exhausted or not self._is_ahead)

    def first(self) -> Batch:
        self._is_ahead = True  # for a thread will go on
        return self._read()

    def _first_read(self, draws: torch.Generator) -> Batch:
        """Make the first batch, and find out what it draws from."""
        listener, watch = GeneratorMode(None), Watch(global_generators()[1:])  # torch's moves anyway
        watch.start()
        take_generators()
        num_taken = times_taken()
        with listener, self._first_drawing():
            batch = self._next()
        nested = () if times_taken() == num_taken else READS_OURS
        found = (*listener.unhookable, *(each.name for each in watch.moved()), *nested)
        self._source.unhookable = self._source.unhookable or found
        return batch

    def read(self) -> Batch:
        self._is_ahead = False
        return self._read()

    def _read(self) -> Batch:
        batch, kept = self._drawn(), self._source.kept
        if batch is not END and kept is not None and (self._is_ahead or not kept.is_checked):
            ask, is_first = partial(self._source.own_state, self), self.position == self._first + 1
            kept.made(self.position, ask, self._is_ahead, is_first)
        return batch

    def _drawn(self) -> Batch:
        """Make the next batch, its draws from the epoch's stream."""
        if self.draws is None:
            return self._next()
        if not self.is_known:
            return self._first_read(self.draws)
        with drawing_from(self.draws) if self._source.unhookable else self._mode:
            batch = self._next()
        if self._mode.unhookable:
            # Too late for this batch, which cannot be made again; not for the next one.
            self._source.unhookable = tuple(self._mode.unhookable)
        return batch

    def skip(self, count: int) -> None:
        """Make batches and drop them, drawing what they draw; loop thread."""
        make = self.thread_maker()
        while self.position < count:
            if (self.first() if self.position == self._first else make(self.position)) is END:
                return

    def thread_maker(self) -> Callable[[int], Batch]:
        self._is_ahead = True
        return lambda position: self._read()

    def close(self) -> None:
        self._batches = iter(())  # a DataLoader's workers end with its iterator

    def _next(self) -> Batch:
        if self.on_begin is not None:
            self.on_begin()
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
