"""Which placements a source's batches may have; see the package's text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pipeline.batch import Batch
from pipeline.checks.compare import NotComparableError, Record
from pipeline.checks.limits import Limits, in_the_loop, in_turn, joined, limits_of
from pipeline.checks.trial import DifferenceError, DoubtError, Noted, Trial
from pipeline.checks.watch import StateWatch
from pipeline.data import END, Reader, Source
from pipeline.errors import warn_harmlessly

NUM_LOOKED_AT, NUM_REFERENCES = 3, 2  # batches; the first may set up what the others use
OURS_REMEDY = "pass its data instead"
LOOK_RATIO, COMPARE_RATIO = 0.003, 0.005  # of the run's time


class Checks:
    """Looks at one source's data, and compares its batches.

    Args:
        source: Of the batches.
        is_trusted: Whether the user said that what yields batches itself may be read ahead.
        is_off: Whether the user knows better: then nothing is looked at.
        clock: Of the wall, in seconds.

    Attributes:
        limits: As far as is known.
        trained: The models that are trained on the batches, if that is known.
        num_compared: Batches that were made twice and compared.
        is_leaving: Whether what is being made ahead is to be the last, where it cannot be made again.
        spent_s: On all of this.

    Runs on:
        Loop thread, but for `wants` and `compare`, which any thread may call.
    """

    def __init__(
        self,
        source: Source,
        *,
        is_trusted: bool,
        is_off: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._source, self._is_trusted, self._is_off, self._clock = source, is_trusted, is_off, clock
        self.limits, self.trained = Limits(), list[torch.nn.Module]()
        if not is_trusted and not source.is_known_kind:
            self.limits = Limits(
                0,
                False,
                f"{source.name} yields batches itself, and what it yields may depend on the step before",
                "placement='inline' reads it ahead: set it if no batch depends on what a step changes",
            )
        if source.is_ours:
            reason = f"{source.name} is a pipeline.Loader or prefetch, which reads ahead itself"
            self.limits = Limits(0, False, reason, OURS_REMEDY)
        self.num_compared, self.spent_s = 0, 0.0
        self._watch: StateWatch | None = None
        self._references: dict[Any, Record] = {}
        self._verified: set[Any] = set()
        self._num_looked_at = 0
        self._looked_at: tuple[int, int] | None = None  # the reader, and where it stood then
        self._is_controlled = self._has_differed = self._wants_one = self.is_leaving = False
        self._began_s, self._compare_s, self._cost_s = clock(), 0.0, 0.0

    def survey(self) -> Limits:
        """Return the limits, having searched the dataset if that was not done yet."""
        if self._watch is None and not self._is_off:
            with self._timed():
                self._watch = StateWatch(self._source.roots)
                self._restrict(limits_of(self._watch.reached, self.trained, self._source.name))
        return self.limits

    def has_changed(self) -> bool:
        """Say whether the dataset is no longer what it was at the last look; asked between two epochs."""
        if self._watch is None or not any(each.change == "moved" for each in self._watch.moved()):
            return False
        self._verified.clear()
        return True

    def look_again(self) -> None:
        """Have batches made in the loop and looked at before any place is used again."""
        self._verified.clear()
        self._looked_at, self._num_looked_at = None, 0

    def withdraw(self, reason: str, remedy: str = "") -> None:
        """Have batches made in the loop from here on, for good."""
        self.limits = Limits(0, False, reason, remedy)

    def _restrict(self, found: Limits) -> None:
        self.limits = self.limits.restricted(found)
        if self.limits.num_threads == 1:
            self._source.draw_apart()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began_s = self._clock()
        yield
        self.spent_s += self._clock() - began_s

    def is_of_use(self, reader: Reader) -> bool:
        """Say whether there is anything to look at: not where it is settled how an iterable is read."""
        is_open = reader.is_random_access or (self._source.is_known_kind and not self._is_trusted)
        return is_open and not self._is_off

    def is_looked_at(self, place: Any, reader: Reader, *, is_loop: bool) -> bool:
        """Say whether batches may be made in a place now: after a look at some that the loop makes.

        The loop itself is a place where the first batches are looked at.
        """
        if not self.is_of_use(reader) or place in self._verified or (is_loop and self._looked_at is not None):
            return True
        return self._num_looked_at >= NUM_LOOKED_AT and self._looked_at == (id(reader), reader.position)

    def looked_at(
        self, reader: Any, brought: Callable[[Batch], Batch], *, controls: bool
    ) -> Generator[Batch]:
        """Make some batches in the loop and look at what moves meanwhile.

        Args:
            reader: One epoch's batches.
            brought: Brings a batch to the device.
            controls: Whether to make the last one again, since batches are to be made elsewhere.
        """
        self.survey()
        assert self._watch is not None
        self._watch.search()
        self._references.clear()
        self._looked_at = id(reader), reader.position
        for _ in range(self._num_to_look_at(reader)):
            turn = reader.turn
            if reader.is_random_access:
                self._watch.search(reader.indices(turn).tolist())  # a sample may be changed as it is made
            batch = reader.read()
            if batch is END:
                return
            self._look_at_making(reader)
            if controls and reader.max_processes != 0:  # else it is read once, and never again
                self._keep(turn, batch)
            self._num_looked_at += 1  # the loop may be left with this one
            yield brought(batch)
            self._look_at_step()
        self._restrict(limits_of(self._watch.reached, self.trained, self._source.name))
        self._looked_at = id(reader), reader.position
        is_enough = self._num_looked_at >= NUM_LOOKED_AT
        if controls and is_enough and reader.is_random_access and self.limits.num_threads != 1:
            self._control(reader)

    def _num_to_look_at(self, reader: Any) -> int:
        wanted = max(NUM_LOOKED_AT - self._num_looked_at, NUM_REFERENCES)
        half = int(min(reader.num_left, 2 * wanted)) // 2  # of an epoch that is short
        return min(wanted, max(1, half))

    def _keep(self, turn: Any, batch: Batch) -> None:
        with self._timed():
            try:
                self._references[turn] = Record(batch)
            except NotComparableError as error:
                self._restrict(in_the_loop(str(error)))
        if len(self._references) > NUM_REFERENCES:
            del self._references[next(iter(self._references))]

    def _look_at_making(self, reader: Reader) -> None:
        """Draw conclusions from what moved while a batch was made: but for what is read in order anyway."""
        names = self._moved()
        if names and self._num_looked_at and reader.is_random_access:
            self._restrict(in_turn(f"{names} changes as batches are made"))

    def _look_at_step(self) -> None:
        """Draw conclusions from what moved between two batches."""
        names = self._moved()
        if names and self._num_looked_at > 1:
            self._restrict(in_the_loop(f"{names} changes between two batches, which may depend on it"))

    def _moved(self) -> str:
        assert self._watch is not None
        with self._timed():
            return joined(each.name for each in self._watch.moved() if each.change == "moved")

    def _control(self, reader: Any) -> None:
        """Make the last reference again: as a thread would make it, and as the loop does."""
        if self._is_controlled or not self._references or self._source.is_function_of_index:
            return
        turn, record = list(self._references.items())[-1]
        began_s = self._clock()
        again = reader.remake(turn, is_hooked=True)
        if again is not None:  # else it draws from what a thread cannot keep apart
            self._conclude(turn, record.difference(Record(again)))
        if not self._has_differed:
            self._conclude(turn, record.difference(Record(reader.remake(turn, is_hooked=False))))
        assert self._watch is not None
        if moved := self._watch.moved():  # a cache has these samples already, and grows no more
            self._restrict(in_turn(f"{joined(each.name for each in moved)} changes as batches are made"))
        self._is_controlled, self._cost_s = True, self._clock() - began_s
        self._compare_s += self._cost_s
        self.spent_s += self._cost_s

    def _conclude(self, turn: Any, difference: str) -> None:
        self.num_compared += 1
        if difference:
            self._has_differed = True
            self.withdraw(
                f"batch {turn} was made twice, and the second time {difference}: "
                "it depends on more than its indices"
            )
            warn_harmlessly(f"{self._source.name}: {self.limits.reason}. The loop makes the batches.")

    def trial(self, place: Any, reader: Reader) -> Trial:
        """Return what compares a place's batches, which begins with the last ones that the loop has made."""
        is_needless = place in self._verified or self.limits.num_threads == 1  # what moves is not made twice
        references = {} if is_needless else dict(self._references)
        self._verified.add(place)  # or a doubt is raised before its first new batch
        self._references.clear()
        return Trial(self, reader, references)

    def compare(self, turn: Any, record: Record, batch: Batch) -> None:
        """Compare a batch with the loop's.

        Raises:
            DifferenceError: If they differ.
        """
        try:
            difference = record.difference(Record(batch))
        except NotComparableError as error:
            difference = str(error)
        self.num_compared += 1
        if difference:
            raise DifferenceError(f"batch {turn} came out differently there: {difference}")

    def watched(self, batches: Generator[Batch], can_go_back: bool) -> Generator[Batch]:
        """Pass on batches that are made ahead, looking at what moves.

        Args:
            batches: Made ahead.
            can_go_back: Whether one that was made can be made again; else `is_leaving` says so.

        Raises:
            DoubtError: Before a batch that may have been made of what was no longer as before.
        """
        assert self._watch is not None
        every_n, count, last_s = 1, 1, self._clock()
        self.is_leaving = False
        for batch in batches:
            now_s = self._clock()
            if count >= every_n and not self.is_leaving:
                is_quiet = self._watch.is_quiet()
                self.spent_s += (cost_s := self._clock() - now_s)
                if not is_quiet:
                    self._leave(count, can_go_back)
                every_n = math.ceil(cost_s * count / (LOOK_RATIO * max(now_s - last_s, 1e-6)))
                last_s, count = now_s, 0
            count += 1
            budget_s = COMPARE_RATIO * (now_s - self._began_s)
            self._wants_one = budget_s > self._compare_s + self._cost_s
            yield batch
        if count > 1 and not self.is_leaving and not self._watch.is_quiet():
            self._leave(count, can_go_back)

    def _leave(self, num_unseen: int, can_go_back: bool) -> None:
        """Leave the place: at once, or after what was made ahead, which cannot be made again.

        Args:
            num_unseen: Batches since the last look, the one at hand among them.
            can_go_back: Whether that one can be made again.
        """
        text = f"{self._moved() or 'its state'} changed while batches were made ahead"
        if can_go_back and num_unseen == 1:
            raise DoubtError(text)
        if can_go_back:
            raise DoubtError(f"{text}, and {num_unseen - 1} of them may have been used without that change")
        self.is_leaving = True
        self.withdraw(text)
        warn_harmlessly(f"{self._source.name}: {text}; those are used up first, and may lack that change.")

    def wants(self) -> bool:
        """Say whether the batch at hand is to be compared; any thread."""
        wants_one, self._wants_one = self._wants_one, False
        return wants_one

    def make_again(self, reader: Any, noted: Noted) -> None:
        """Make a batch that was noted again, in the loop, and compare.

        Raises:
            DifferenceError: If it came out differently.
        """
        began_s = self._clock()
        try:
            self.compare(noted.position, noted.record, reader.remake(noted.position, is_hooked=False))
        finally:
            self._cost_s = self._clock() - began_s
            self._compare_s += self._cost_s
            self.spent_s += self._cost_s
