"""Data that yields batches itself: a DataLoader, or any iterable, run as it is."""

from __future__ import annotations

import copy
import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from pipeline.batch import Batch
from pipeline.data.generator_mode import GeneratorMode
from pipeline.data.generators import Watch, global_generators
from pipeline.data.reader import END
from pipeline.errors import add_stage_note
from pipeline.seeding import sample_seed

_KEPT_STATES = 128  # more than are ever made ahead; with a greater depth batches are read again


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
        self._has_state = hasattr(batches, "state_dict") and hasattr(batches, "load_state_dict")
        self._found: dict[str, Any] | None = None
        self._reader: IterableReader | None = None
        self.makes_fresh_batches = isinstance(batches, (list, tuple)) or (
            isinstance(batches, DataLoader)
            and (batches.num_workers > 0 or batches.collate_fn is default_collate)
        )

    def open(self, epoch: int, max_batches: int | None = None, start: int = 0) -> IterableReader:
        generator = torch.Generator().manual_seed(sample_seed(self._seed, epoch, 0))
        is_plain = type(self._batches) in (list, tuple)  # nothing that could draw
        _let_dead_workers_go(self._batches)
        position, limit = self._go_to(start), max_batches
        batches = itertools.islice(iter(self._batches), None if limit is None else limit - position)
        mode = None if is_plain else GeneratorMode(generator)
        self._reader = IterableReader(self, batches, mode, epoch, position)
        if start > position and not is_plain:
            kind = type(self._batches).__name__
            print(
                f"{start - position} batches of the {kind} are read again to resume its epoch",
                file=sys.stderr,
            )
        self._reader.skip(start)
        return self._reader

    def state(self, position: int) -> dict[str, Any] | None:
        """Return the newest state that the iterable gave of itself, up to a position; None if it has none."""
        kept = (
            []
            if self._reader is None
            else [each for each in list(self._reader.states) if each[0] <= position]
        )
        return {"position": kept[-1][0], "state": kept[-1][1]} if kept else None

    def load_state(self, found: dict[str, Any] | None) -> None:
        """Have the next epoch opened from a state, if it is opened behind it."""
        self._found = found

    def keep_state(self) -> Any:
        """Return the iterable's own state; None if it has none."""
        return copy.deepcopy(self._batches.state_dict()) if self._has_state else None  # type: ignore[attr-defined]

    def _go_to(self, start: int) -> int:
        """Load the state found, and return its position; 0 if there is none before `start`."""
        found, self._found = self._found, None
        if not self._has_state or found is None or not 0 < found["position"] <= start:
            return 0
        self._batches.load_state_dict(found["state"])  # type: ignore[attr-defined]
        return int(found["position"])


class IterableReader:
    """One epoch of an `IterableSource`."""

    is_random_access = False
    max_processes: int | None = 0

    def __init__(
        self,
        source: IterableSource,
        batches: Iterator[Batch],
        mode: GeneratorMode | None,
        epoch: int,
        position: int = 0,
    ) -> None:
        self._source, self._batches, self._mode, self._epoch = source, batches, mode, epoch
        self.position, self.is_exhausted = position, False
        self._first = position
        # Batches are made ahead of the loop, which may be saved at any of these; older than all it never is.
        self.states: deque[tuple[int, Any]] = deque(maxlen=_KEPT_STATES)

    @property
    def is_known(self) -> bool:
        return self.position > self._first

    @property
    def is_threadable(self) -> bool:
        return not self._source.unhookable

    def first(self) -> Batch:
        if self._mode is None or self.is_known:
            return self.read()
        listener, watch = GeneratorMode(None), Watch(global_generators()[1:])  # torch's moves anyway
        watch.start()
        with listener:
            batch = self._next()
        found = (*listener.unhookable, *(each.name for each in watch.moved()))
        self._source.unhookable = self._source.unhookable or found
        return batch

    def read(self) -> Batch:
        if self._mode is None or self.position == self._first:
            return self._next()
        with self._mode:
            return self._next()

    def skip(self, count: int) -> None:
        """Make batches and drop them, drawing what they draw; loop thread."""
        make = self.thread_maker()
        while self.position < count:
            if (self.first() if self.position == self._first else make(self.position)) is END:
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
        if (state := self._source.keep_state()) is not None:
            self.states.append((self.position, state))
        return batch


def _let_dead_workers_go(batches: Any) -> None:
    """Have a DataLoader that keeps its workers start others, if one of those that it has is dead."""
    kept = getattr(batches, "_iterator", None) if isinstance(batches, DataLoader) else None
    if any(not worker.is_alive() for worker in getattr(kept, "_workers", [])):
        batches._iterator = None


def length_or_none(data: Any) -> int | None:
    """Return the length of whatever has one."""
    try:
        return len(data)
    except TypeError:
        return None
