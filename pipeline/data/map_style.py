"""A map-style dataset: its batches depend on ``(seed, epoch, step)`` alone, and may be made in any order."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pipeline.batch import Batch
from pipeline.data.fetch import Fetcher
from pipeline.data.reader import END, of_this_kind
from pipeline.data.sample_order import Plan
from pipeline.randomness.draws import SampleRandomness, ThreadRandomness
from pipeline.randomness.generator_mode import UnhookableDrawError
from pipeline.randomness.generators import TorchGenerator
from pipeline.randomness.seeds import Epoch
from pipeline.ranks import ranks


class MapSource:
    """A map-style dataset: its batches depend on ``(seed, epoch, step)`` alone.

    Args:
        fetcher: Makes a batch of samples.
        num_batches: Of an epoch.
        make_plan: Returns the sample indices of an epoch's batches; loop thread. Told how many samples the
            epoch had when it began, if it is resumed.
        name: What the user's argument is called.
        seed: Of all epochs; None takes torch's, as it is when an epoch begins.
    """

    is_ours = False

    def __init__(
        self,
        fetcher: Fetcher,
        num_batches: int,
        make_plan: Callable[[Epoch, int | None], Plan],
        name: str,
        seed: int | None,
    ) -> None:
        self.fetcher, self._make_plan, self.name, self.seed = fetcher, make_plan, name, seed
        self.num_batches: int | None = num_batches
        self.randomness = SampleRandomness()
        self.unhookable: tuple[str, ...] = ()
        self.makes_fresh_batches = fetcher.makes_fresh_batches
        self.is_known_kind, self.is_function_of_index = True, fetcher.is_drawless
        self._found: dict[str, Any] | None = None
        self._reader: MapReader | None = None

    def roots(self) -> list[tuple[str, Any]]:
        return self.fetcher.roots(self.name)

    def draw_apart(self) -> None:
        self.randomness.isolate_all()

    def open(self, epoch: int, max_batches: int | None = None, start: int = 0) -> MapReader:
        self.randomness.drop_suspicions()
        begun, found, self._found = Epoch.begun(epoch, self.seed), self._found, None
        plan = self._make_plan(begun, found["num_samples"] if found else None)
        self.num_batches = len(plan)  # a dataset may grow from epoch to epoch
        num_batches = len(plan) if max_batches is None else min(len(plan), max_batches)
        if start:
            plan.indices(min(start, len(plan)) - 1)  # a sampler draws as it goes on
        self._reader = MapReader(self, plan, begun, num_batches, start)
        if start and found:
            self._compare_order(self._reader, found)
        return self._reader

    def state(self, position: int) -> dict[str, Any] | None:
        """Return what tells the order of the epoch under way, which is resumed at a position."""
        if self._reader is None or not position:
            return None
        plan, seed = self._reader.plan, self._reader.epoch.seed
        return {"num_samples": plan.num_samples, "seed": seed, "last": self._reader.indices(position - 1)}

    def load_state(self, found: dict[str, Any] | None) -> None:
        """Have the next epoch opened as the one that was stopped."""
        self._found = of_this_kind(found, "num_samples", self.name)

    def _compare_order(self, reader: MapReader, found: dict[str, Any]) -> None:
        """Warn if the epoch that is resumed has another order; another seed is warned of elsewhere."""
        if found["seed"] != reader.epoch.seed or ranks()[0]:  # the checkpoint has rank zero's
            return
        last = min(reader.position, len(reader.plan)) - 1
        if last != reader.position - 1 or not torch.equal(reader.indices(last), found["last"]):
            warnings.warn(
                f"{self.name} has its samples in another order than in the epoch that is resumed: its "
                "length, batch_size, shuffle or sampler is not what it was. In epoch "
                f"{reader.epoch} some are used twice and others not at all; the next ones are whole.",
                stacklevel=2,
            )


class IsolatedReader:
    """Reads batches of data whose draws come from seeds of their own, wherever they are made."""

    position: int

    def __init__(self, source: Any, randomness: SampleRandomness) -> None:
        self._source, self._randomness = source, randomness
        self._is_probed = False

    @property
    def is_known(self) -> bool:
        return self._is_probed and not self._randomness.suspects

    @property
    def is_threadable(self) -> bool:
        return not self._source.unhookable

    def first(self) -> Batch:
        self._is_probed = True
        if self.is_threadable and not self._randomness.suspects:
            try:
                return self._next(self._randomness.probe)
            except UnhookableDrawError as found:
                self._source.unhookable = found.names
        batch = self.read()
        # Draws from torch's generator can be hooked; a probe would have found those that cannot.
        drawn = tuple(name for name in self._randomness.drawn if name != TorchGenerator.name)
        self._source.unhookable = self._source.unhookable or drawn
        return batch

    def read(self) -> Batch:
        return self._next(self._randomness.on_loop_thread)

    def thread_maker(self) -> Callable[[int], Batch]:
        randomness = ThreadRandomness(self._randomness)

        def make(position: int) -> Batch:
            try:
                return self._make(position, randomness.make)
            except UnhookableDrawError as found:
                if found.is_certain:
                    self._source.unhookable = found.names
                raise

        return make

    @abstractmethod
    def _next(self, isolate: Any) -> Batch:
        """Make the next batch, and go on behind it; loop thread."""

    @abstractmethod
    def _make(self, position: int, isolate: Any) -> Batch:
        """Make the batch at a position; any thread."""


class MapReader(IsolatedReader):
    """One epoch of a `MapSource`."""

    is_random_access = True
    max_processes: int | None = None

    def __init__(self, source: MapSource, plan: Plan, epoch: Epoch, num_batches: int, start: int) -> None:
        super().__init__(source, source.randomness)
        self.plan, self.epoch = plan, epoch
        self.num_batches = num_batches
        self.position = start

    @property
    def is_exhausted(self) -> bool:
        return self.position >= self.num_batches

    @property
    def turn(self) -> int:
        return self.position

    def remake(self, position: int, *, is_hooked: bool) -> Batch | None:
        """Make a batch again, as it was made; None if a thread could not make it.

        Args:
            position: In the epoch.
            is_hooked: Make it as a thread would.

        Runs on:
            Loop thread.
        """
        if not is_hooked:
            return self._make(position, self._randomness.on_loop_thread)
        try:
            return self._make(position, self._randomness.probe)
        except UnhookableDrawError as found:
            self._source.unhookable = found.names
            return None

    def noting_draws(self, make: Callable[[], Batch]) -> tuple[Batch, list[Any]]:
        """Make a batch on the loop thread; return it, and how far each of its samples drew."""
        with self._randomness.marked() as marks:
            batch = make()
        return batch, marks[1:]  # the first one stands before the first sample

    @property
    def num_left(self) -> float:
        return self.num_batches - self.position

    def ahead(self) -> Iterator[int]:
        return iter(range(self.position, self.num_batches))

    def job(self, turn: int) -> tuple[int, torch.Tensor]:
        return turn, self.indices(turn)

    def worker(self, turn: int) -> int | None:
        return None

    def take(self, turn: int, batch: Batch) -> bool:
        self.position += 1
        return True

    def describe(self, turn: int) -> str:
        indices = self.indices(turn).tolist()
        shown = ", ".join(map(str, indices[:8])) + (", …" if len(indices) > 8 else "")
        return f"batch {turn} of epoch {self.epoch} (samples {shown})"

    def indices(self, position: int) -> torch.Tensor:
        """Return the sample indices of the batch at this position: int64 ``[B]``."""
        return torch.as_tensor(self.plan.indices(position))

    def close(self) -> None:
        if self.position >= len(self.plan):
            self.plan.end()

    def _next(self, isolate: Any) -> Batch:
        batch = self._make(self.position, isolate)
        self.position += batch is not END
        return batch

    def _make(self, position: int, isolate: Any) -> Batch:
        if position >= self.num_batches:
            return END
        fetcher, indices = self._source.fetcher, self.plan.indices(position)
        if fetcher.is_drawless:
            return fetcher.fetch(indices, self.epoch, position, None)
        return isolate(lambda seed: fetcher.fetch(indices, self.epoch, position, seed), position)
