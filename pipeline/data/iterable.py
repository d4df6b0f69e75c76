"""Data that yields batches itself: a DataLoader, or any iterable, run as it is."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from pipeline.batch import Batch
from pipeline.data.generator_mode import GeneratorMode
from pipeline.data.generators import Watch, global_generators
from pipeline.data.kept_states import KeptStates
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
        self._has_state = hasattr(batches, "state_dict") and hasattr(batches, "load_state_dict")
        self.kept: KeptStates | None = None
        self._found: dict[str, Any] | None = None
        self._reader: IterableReader | None = None
        self.makes_fresh_batches = isinstance(batches, (list, tuple)) or (
            isinstance(batches, DataLoader)
            and (batches.num_workers > 0 or batches.collate_fn is default_collate)
        )

    def open(self, epoch: int, max_batches: int | None = None, start: int = 0) -> IterableReader:
        generator = torch.Generator().manual_seed(sample_seed(self._seed, epoch, 0))
        is_plain = type(self._batches) in (list, tuple)  # nothing that could draw
        position, is_over = self._go_to(start, generator)
        limit, iterable = max_batches, () if is_over else self._batches
        batches = itertools.islice(iter(iterable), None if limit is None else limit - position)
        mode = None if is_plain else GeneratorMode(generator)
        self._reader = IterableReader(self, batches, mode, epoch, position)
        self._reader.limit, self._reader.generator = limit, None if is_plain else generator
        if self.kept is not None:
            self.kept.begin()
        if start > position and not is_plain:
            kind = type(self._batches).__name__
            print(
                f"{start - position} batches of the {kind} are read again to resume its epoch",
                file=sys.stderr,
            )
        self._reader.skip(start)
        return self._reader

    def state(self, position: int) -> dict[str, Any] | None:
        """Return the iterable's own state at a position, or the newest kept before it; None if there is none.

        Runs on:
            Loop thread, between two batches. If it reads the iterable itself, the iterable is asked now.
        """
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
        state = {"state": self._batches.state_dict()}  # type: ignore[attr-defined]
        return state | ({} if reader.generator is None else {"generator": reader.generator.get_state()})

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
        self._found = found

    def _go_to(self, start: int, generator: torch.Generator) -> tuple[int, bool]:
        """Load the state found, if it is of a position up to `start`.

        Returns:
            Its position, 0 if there is none; and whether the epoch has nothing behind it.
        """
        found, self._found = self._found, None
        if not self._has_state or found is None or not 0 < found["position"] <= start:
            return 0, False
        if found.get("is_over"):
            return start, True
        if "generator" in found:
            generator.set_state(found["generator"])
        self._batches.load_state_dict(found["state"])  # type: ignore[attr-defined]
        return int(found["position"]), False


class IterableReader:
    """One epoch of an `IterableSource`.

    Attributes:
        limit: At most so many batches are read of it; None for all.
        generator: What the batches' draws come from; None where they cannot draw.
    """

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
        self._first, self._is_ahead = position, False
        self.limit: int | None = None
        self.generator: torch.Generator | None = None

    @property
    def is_known(self) -> bool:
        return self.position > self._first

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
        if self._mode is None or self.is_known:
            return self._read()
        listener = self._mode if self.position else GeneratorMode(None)  # a resumed epoch has drawn already
        watch = Watch(global_generators()[1:])  # torch's moves anyway
        watch.start()
        with listener:
            batch = self._next()
        found = (*listener.unhookable, *(each.name for each in watch.moved()))
        self._source.unhookable = self._source.unhookable or found
        return batch

    def read(self) -> Batch:
        self._is_ahead = False
        return self._read()

    def _read(self) -> Batch:
        if self._mode is None or not self.position:
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
        self._is_ahead = True

        def make(position: int) -> Batch:
            batch = self._read()
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
        kept = self._source.kept
        if kept is not None and (self._is_ahead or not kept.is_checked):
            ask, is_first = partial(self._source.own_state, self), self.position == self._first + 1
            kept.made(self.position, ask, self._is_ahead, is_first)
        return batch


def length_or_none(data: Any) -> int | None:
    """Return the length of whatever has one; None if it has none, or raises when it is asked.

    A DataLoader notes that it was asked, and warns later of batches beyond its length: that is put back.
    """
    noted = getattr(data, "_IterableDataset_len_called", None)
    try:
        return len(data)
    except Exception:  # a stream says in many ways that it has no length
        return None
    finally:
        if isinstance(data, DataLoader):
            data._IterableDataset_len_called = noted
