"""Data that yields batches itself: a DataLoader, or any iterable, run as it is."""

from __future__ import annotations

import copy
import itertools
import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from pipeline.batch import Batch
from pipeline.data.generator_mode import GeneratorMode
from pipeline.data.generators import Watch, global_generators
from pipeline.data.reader import END
from pipeline.errors import add_stage_note
from pipeline.seeding import Epoch, drawing_from, sample_seed

_KEPT_STATES = 128  # more than are ever made ahead; with a greater depth batches are read again


class IterableSource:
    """A DataLoader, or any iterable of batches, run as it is.

    What it draws from torch's global generator comes from a stream of its own, which begins with the epoch
    and is seeded with ``(seed, epoch, rank)``: in either schedule, for the first batch too, so that data
    never draws from the generator that the model's dropout uses. The iterator is made and its first batch
    taken on the loop thread, which shows whether a thread can be given the stream. Where it cannot
    (`F.dropout` in a transform), or where Python's or NumPy's generator moves, the loop thread makes the
    batches. A DataLoader draws its base seed and its order from the global generator when an epoch begins,
    as in a plain loop.

    Args:
        batches: What yields them.
        seed: Of all epochs; None takes torch's, as it is when an epoch begins.
        name: What the user's argument is called.
        rank: Whose the draws are: ranks that read the same code get batches of their own.
    """

    def __init__(self, batches: Iterable[Batch], seed: int | None, name: str, rank: int = 0) -> None:
        self._batches, self.seed, self.name, self._rank = batches, seed, name, rank
        self.num_batches: int | None = length_or_none(batches)
        self.unhookable: tuple[str, ...] = ()
        self._has_state = hasattr(batches, "state_dict") and hasattr(batches, "load_state_dict")
        self._found: dict[str, Any] | None = None
        self._reader: IterableReader | None = None
        self.makes_fresh_batches = isinstance(batches, (list, tuple)) or (
            isinstance(batches, DataLoader)
            and (batches.num_workers > 0 or batches.collate_fn is default_collate)
        )
        self.is_known_kind, self.is_function_of_index = _is_known_kind(batches), False

    def roots(self) -> list[tuple[str, Any]]:
        loader: Any = self._batches
        if not isinstance(loader, DataLoader):
            return [(self.name, loader)]
        names = ["sampler", "batch_sampler"]
        if not loader.num_workers:  # else they are copies in processes of the user's own
            names += ["dataset", "collate_fn"]
        return [(f"{self.name}.{each}", getattr(loader, each, None)) for each in names]

    def draw_apart(self) -> None:
        """Do nothing: no batch is made twice."""

    @property
    def data(self) -> Iterable[Batch]:
        """What yields the batches."""
        return self._batches

    def open(self, epoch: int, max_batches: int | None = None, start: int = 0) -> IterableReader:
        begun = Epoch.begun(epoch, self.seed)
        draws = torch.Generator().manual_seed(sample_seed(begun.seed, epoch, self._rank))
        # Nothing that could draw, or a loader of ours, which sets its draws apart itself.
        is_plain = type(self._batches) in (list, tuple) or getattr(self._batches, "sets_draws_apart", False)
        position, limit = self._go_to(start, draws), max_batches
        iterator = self._begin(draws)
        batches = itertools.islice(iterator, None if limit is None else limit - position)
        # The first batch: all its draws, or those of a DataLoader's dataset, whose order is drawn meanwhile.
        is_loader = isinstance(self._batches, DataLoader)
        first_drawing = (
            partial(_fetching_from, iterator, draws) if is_loader else partial(drawing_from, draws)
        )
        self._reader = IterableReader(
            self, batches, None if is_plain else draws, first_drawing, epoch, position
        )
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
        return dict(zip(("position", "state", "draws"), kept[-1], strict=True)) if kept else None

    def load_state(self, found: dict[str, Any] | None) -> None:
        """Have the next epoch opened from a state, if it is opened behind it."""
        self._found = found

    def keep_state(self) -> Any:
        """Return the iterable's own state; None if it has none."""
        return copy.deepcopy(self._batches.state_dict()) if self._has_state else None  # type: ignore[attr-defined]

    def _begin(self, draws: torch.Generator) -> Iterator[Batch]:
        """Return an epoch's iterator; loop thread."""
        if isinstance(self._batches, DataLoader):
            return iter(self._batches)
        with drawing_from(draws):
            return iter(self._batches)

    def _go_to(self, start: int, draws: torch.Generator) -> int:
        """Load the state found, its draws too, and return its position; 0 if there is none before `start`."""
        found, self._found = self._found, None
        if not self._has_state or found is None or not 0 < found["position"] <= start:
            return 0
        self._batches.load_state_dict(found["state"])  # type: ignore[attr-defined]
        if found.get("draws") is not None:
            draws.set_state(found["draws"])
        return int(found["position"])


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
        self._draws, self._first_drawing = draws, first_drawing
        self._mode = GeneratorMode(draws)
        self.position, self.is_exhausted = position, False
        self._first = position
        # Batches are made ahead of the loop, which may be saved at any of these; older than all it never is.
        self.states: deque[tuple[int, Any, torch.Tensor | None]] = deque(maxlen=_KEPT_STATES)

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

    def first(self) -> Batch:
        if self._draws is None or self.is_known:
            return self.read()
        listener, watch = GeneratorMode(None), Watch(global_generators()[1:])  # torch's moves anyway
        watch.start()
        with listener, self._first_drawing():
            batch = self._next()
        found = (*listener.unhookable, *(each.name for each in watch.moved()))
        self._source.unhookable = self._source.unhookable or found
        return self._keep_state_of(batch)

    def read(self) -> Batch:
        if self._draws is None:
            return self._keep_state_of(self._next())
        if not self.is_known:
            return self.first()
        with drawing_from(self._draws) if self._source.unhookable else self._mode:
            batch = self._next()
        if self._mode.unhookable:
            # Too late for this batch, which cannot be made again; not for the next one.
            self._source.unhookable = tuple(self._mode.unhookable)
        return self._keep_state_of(batch)

    def skip(self, count: int) -> None:
        """Make batches and drop them, drawing what they draw; loop thread."""
        make = self.thread_maker()
        while self.position < count:
            if (self.first() if self.position == self._first else make(self.position)) is END:
                return

    def thread_maker(self) -> Callable[[int], Batch]:
        return lambda position: self.read()

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

    def _keep_state_of(self, batch: Batch) -> Batch:
        if batch is not END and (state := self._source.keep_state()) is not None:
            draws = None if self._draws is None else self._draws.get_state()
            self.states.append((self.position, state, draws))
        return batch


@contextmanager
def _fetching_from(loader: Any, draws: torch.Generator) -> Iterator[None]:
    """Have a DataLoader's iterator make its batches, but not draw its order, from a generator of their own.

    It has what makes them in this process in an attribute, as do torchdata's; other loaders, and those with
    workers, are left alone.
    """
    fetcher = getattr(loader, "_dataset_fetcher", None)
    if fetcher is None:
        yield
        return
    loader._dataset_fetcher = _Fetcher(fetcher, draws)
    try:
        yield
    finally:
        loader._dataset_fetcher = fetcher


class _Fetcher:
    """A DataLoader's fetcher that draws from a generator of its own."""

    def __init__(self, fetcher: Any, draws: torch.Generator) -> None:
        self._fetcher, self._draws = fetcher, draws

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fetcher, name)

    def fetch(self, index: Any) -> Any:
        with drawing_from(self._draws):
            return self._fetcher.fetch(index)


_KNOWN_LOADERS = ("torch.utils.data", "torchdata", "spdl", "grain", "webdataset")


def _is_known_kind(batches: Any) -> bool:
    """Say whether batches come from a loader whose code is known, or lie there."""
    return (
        type(batches) in (list, tuple)
        or isinstance(batches, DataLoader)
        or any(type(batches).__module__.startswith(name) for name in _KNOWN_LOADERS)
    )


def length_or_none(data: Any) -> int | None:
    """Return the length of whatever has one."""
    try:
        return len(data)
    except TypeError:
        return None
