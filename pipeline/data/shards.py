"""An iterable dataset in logical shards, whose number does not depend on that of the workers.

Batches come from the shards in turn, as from a DataLoader with as many workers; a shard that has ended is
left out. So the order depends on the data alone, which shard's turn it is on how many batches each had, and
a batch on its shard and its number there: any process that has the dataset can make it.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from pipeline.batch import Batch
from pipeline.data.map_style import IsolatedReader
from pipeline.data.reader import END
from pipeline.data.shard_fetch import ShardFetcher
from pipeline.errors import ConfigError, listed
from pipeline.randomness.draws import SampleRandomness
from pipeline.randomness.seeds import Epoch


class Turn(NamedTuple):
    """A batch, by its shard and its number there."""

    shard: int
    number: int


class ShardedSource:
    """An iterable dataset with a batch size: its batches depend on ``(seed, epoch, shard, number)`` alone.

    Args:
        fetcher: Makes the batches of a shard.
        shards: That are read here.
        num_batches: Of an epoch, if that is known.
        name: What the user's argument is called.
        seed: Of all epochs; None takes torch's, as it is when an epoch begins.

    Attributes:
        has_begun: Whether a batch has been made in this process, which shows what kind of data it is.
        own_changes: The dataset's attributes that change as it is iterated.
    """

    is_ours = False

    def __init__(
        self,
        fetcher: ShardFetcher,
        shards: Sequence[int],
        num_batches: int | None,
        name: str,
        seed: int | None,
    ) -> None:
        self.seed = seed
        self.fetcher, self.shards, self.num_batches, self.name = fetcher, shards, num_batches, name
        self.randomness = SampleRandomness()
        self.unhookable: tuple[str, ...] = ()
        self.makes_fresh_batches = fetcher.makes_fresh_batches
        self.is_known_kind, self.is_function_of_index = True, False
        self.has_begun, self.own_changes = False, list[str]()
        self._found: dict[str, Any] | None = None
        self._reader: ShardedReader | None = None

    def roots(self) -> list[tuple[str, Any]]:
        return self.fetcher.roots(self.name)

    def draw_apart(self) -> None:
        self.randomness.isolate_all()

    def open(self, epoch: int, max_batches: int | None = None, start: int = 0) -> ShardedReader:
        self.randomness.drop_suspicions()
        self._reader = reader = ShardedReader(self, Epoch.begun(epoch, self.seed), max_batches)
        found, self._found = self._found, None
        if start:
            kind = type(self.fetcher.dataset).__name__
            print(f"{start} batches of the {kind} are read again to resume its epoch", file=sys.stderr)
            reader.go_to(start, found)
        return reader

    def state(self, position: int) -> dict[str, Any] | None:
        """Return how many batches the shards have, as far as is known: of the epoch under way."""
        if self._reader is None:
            return None
        lengths = dict(self._reader.lengths)
        return {
            "num_shards": self.fetcher.num_shards,
            "batch_size": self.fetcher.batch_size,
            "lengths": [lengths.get(shard, -1) for shard in self.shards],
            "shards": list(self.shards),
        }

    def load_state(self, found: dict[str, Any] | None) -> None:
        """Have the next epoch opened with such knowledge.

        Raises:
            ConfigError: If there were more shards, or fewer.
        """
        before = (found or {}).get("num_shards", self.fetcher.num_shards)
        if before != self.fetcher.num_shards:
            raise ConfigError(
                f"num_shards was {before} and is {self.fetcher.num_shards}, but the epoch that is resumed "
                f"has its order from it. Set num_shards={before}."
            )
        before = (found or {}).get("batch_size", self.fetcher.batch_size)
        if before != self.fetcher.batch_size:
            warnings.warn(
                f"batch_size was {before} and is {self.fetcher.batch_size}: of the epoch that is resumed as "
                "many batches are left out as were used, so that samples are used twice, or not at all.",
                stacklevel=4,
            )
        self._found = found

    def check_processes(self) -> None:
        """Refuse data that a process would not iterate as the trainer's does.

        Raises:
            ConfigError: Saying which of the dataset's attributes change.
        """
        if self.own_changes:
            raise ConfigError(
                f"{type(self.fetcher.dataset).__name__} changes its own {listed(self.own_changes)} as it "
                "is iterated, which a process would not share with the trainer's. Keep that in local "
                "variables of __iter__, or set placement=inline."
            )


class ShardedReader(IsolatedReader):
    """One epoch of a `ShardedSource`.

    Attributes:
        lengths: The batches of each shard that was found to have ended.
    """

    is_random_access = False

    def __init__(self, source: ShardedSource, epoch: Epoch, max_batches: int | None) -> None:
        super().__init__(source, source.randomness)
        self.epoch, self.position = epoch, 0
        self._end = math.inf if max_batches is None else max_batches
        self._fetcher = source.fetcher.opened()
        self._state = self._fetcher.plain_state()
        self._turns = deque(Turn(shard, 0) for shard in source.shards)
        self.lengths: dict[int, int] = {}
        self.max_processes: int | None = len(source.shards)

    @property
    def is_exhausted(self) -> bool:
        return not self._turns or self.position >= self._end

    @property
    def num_left(self) -> float:
        return self._end - self.position

    @property
    def turn(self) -> Turn | None:
        return next(self.ahead(), None)

    @property
    def is_behind(self) -> bool:
        """Whether batches must be read again before the next one can be made in this process."""
        return any(self._fetcher.stands_at(turn.shard) < turn.number for turn in self._turns)

    def go_to(self, position: int, state: dict[str, Any] | None) -> None:
        """Leave batches out.

        Args:
            position: Of the batch to go on with.
            state: Of a reader that was there; without it batches are made and dropped.
        """
        shards = [turn.shard for turn in self._turns]
        if state is None or state.get("shards") != shards:
            while self.position < position and self.read() is not END:
                pass
            return
        self.lengths = {shard: n for shard, n in zip(shards, state["lengths"], strict=True) if n >= 0}
        while self.position < position and not self.is_exhausted:
            turn = self._turns[0]
            self.take(turn, END if self._has_ended(turn) else None)

    def ahead(self) -> Iterator[Turn]:
        turns = deque(self._turns)
        while turns:
            turn = turns.popleft()
            if not self._has_ended(turn):
                turns.append(Turn(turn.shard, turn.number + 1))
                yield turn

    def job(self, turn: Turn) -> tuple[int, torch.Tensor]:
        return turn.number, torch.tensor([turn.shard])

    def worker(self, turn: Turn) -> int | None:
        return self._source.shards.index(turn.shard)  # type: ignore[no-any-return]

    def take(self, turn: Turn, batch: Batch) -> bool:
        if batch is END:
            if turn.shard not in self.lengths or turn.number < self.lengths[turn.shard]:
                self.lengths[turn.shard] = turn.number
            self._turns = deque(each for each in self._turns if each.shard != turn.shard)
            return False
        assert self._turns[0] == turn
        self._turns.popleft()
        self._turns.append(Turn(turn.shard, turn.number + 1))
        self.position += 1
        return True

    def describe(self, turn: Turn) -> str:
        where = f" of shard {turn.shard}" if self._fetcher.num_shards > 1 else ""
        return f"batch {turn.number}{where} of epoch {self.epoch}"

    def close(self) -> None:
        self._fetcher.close()

    def _has_ended(self, turn: Turn) -> bool:
        return turn.number >= self.lengths.get(turn.shard, math.inf)

    def _next(self, isolate: Any) -> Batch:
        return self._make(self.position, isolate)

    def _make(self, position: int, isolate: Any) -> Batch:
        while not self.is_exhausted:
            turn = self._turns[0]
            batch = END if self._has_ended(turn) else self._fetched(turn, isolate)
            if self.take(turn, batch):
                return batch
        return END

    def _fetched(self, turn: Turn, isolate: Any) -> Batch:
        number, shard = self.job(turn)
        batch = isolate(lambda seed: self._fetcher.fetch(shard, self.epoch, number, seed), turn)
        if not self._source.has_begun:
            self._source.has_begun = True
            now = dict(self._fetcher.plain_state())
            before = dict(self._state)
            self._source.own_changes = sorted(
                name for name in now.keys() | before.keys() if now.get(name) != before.get(name)
            )
        return batch
