"""Which placements a source's batches may have; see the package's text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from pipeline.batch import Batch
from pipeline.checks.compare import NotComparableError, Record
from pipeline.checks.comparer import Comparer
from pipeline.checks.control import Reference, made_twice
from pipeline.checks.limits import Limits, in_the_loop, in_turn, joined, limits_of
from pipeline.checks.trial import DoubtError, Trial
from pipeline.checks.undo import Undo
from pipeline.checks.watch import Moved, StateWatch
from pipeline.data import END, Reader, Source
from pipeline.errors import PipelineError, warn_harmlessly

NUM_LOOKED_AT, NUM_REFERENCES = 3, 2  # batches; the first may set up what the others use
OURS_REMEDY = "pass its data instead"
LOOK_RATIO, FULL_RATIO = 0.003, 0.001  # of the run's time


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
        comparer: Makes batches again.
        is_leaving: Whether what is being made ahead is to be the last, where it cannot be made again.
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
        self.comparer, self._spent_s = Comparer(clock), 0.0
        self._watch: StateWatch | None = None
        self._references: dict[Any, Reference] = {}
        self._verified: set[Any] = set()
        self._num_looked_at, self._full_due_s = 0, 0.0
        self._looked_at: tuple[int, int] | None = None  # the reader, and where it stood then
        self._undo = Undo(source.name)
        self._is_controlled = self.is_leaving = False

    @property
    def spent_s(self) -> float:
        """What all of this took."""
        return self._spent_s + self.comparer.spent_s

    def survey(self) -> Limits:
        """Return the limits, having searched the dataset if that was not done yet."""
        if self._watch is None and not self._is_off:
            with self._timed():
                self._watch = StateWatch(self._source.roots)
                self._restrict(limits_of(self._watch.reached, self.trained, self._source.name))
        return self.limits

    def has_changed(self, *, has_processes: bool) -> bool:
        """Say whether the dataset is no longer what it was at the last look; asked when an epoch begins."""
        self._undo.forget()  # what an epoch before has changed
        if self._watch is None or not (has_processes or self._verified):
            return False
        expected = self._watch.expected
        if not any(each.change == "moved" and each.name not in expected for each in self._moved()):
            return False
        self._verified.clear()
        return True

    def look_again(self, until: int = 0) -> None:
        """Have batches made in the loop and looked at before any place is used again.

        Args:
            until: The position behind all that were made ahead.
        """
        self._undo.extend(until)
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
        self._spent_s += self._clock() - began_s

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
            batch, draws, moved = self._made(reader)
            if batch is END:
                return
            self._look_at_making(reader, moved)
            if controls and reader.max_processes != 0:  # else it is read once, and never again
                self._keep(turn, batch, draws, [each.name for each in moved if each.change == "grown"])
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
        pending = self._undo.num_pending(reader.position)
        return max(min(wanted, max(1, half)), int(min(pending, reader.num_left)))

    def _made(self, reader: Any) -> tuple[Batch, list[Any], list[Moved]]:
        """Make the next batch; return what it drew, and what moved, too."""
        if not reader.is_random_access:
            return reader.read(), [], self._moved()
        position, make = reader.position, partial(reader.noting_draws, reader.read)
        made = self._undo.make(make, position)
        if self._undo.undoes(moved := self._moved(), position):
            reader.position = position
            made, moved = make(), self._moved()
        return *made, moved

    def _keep(self, turn: Any, batch: Batch, draws: list[Any], grown: list[str]) -> None:
        with self._timed():
            try:
                self._references[turn] = Reference(Record(batch), draws, grown)
            except NotComparableError as error:
                self._restrict(in_the_loop(str(error)))
        if len(self._references) > NUM_REFERENCES:
            del self._references[next(iter(self._references))]

    def _look_at_making(self, reader: Reader, moved: list[Moved]) -> None:
        """Draw conclusions from what moved while a batch was made."""
        assert self._watch is not None
        names = [each.name for each in moved if each.change == "moved"]
        if not reader.is_random_access:  # what is read in order anyway
            self._watch.expected.update(names)
        elif names and self._num_looked_at:
            self._restrict(in_turn(f"{joined(names)} changes as batches are made"))

    def _look_at_step(self) -> None:
        """Draw conclusions from what moved between two batches."""
        names = joined(each.name for each in self._moved() if each.change == "moved")
        if names and self._num_looked_at > 1:
            self._restrict(in_the_loop(f"{names} changes between two batches, which may depend on it"))

    def _moved(self) -> list[Moved]:
        assert self._watch is not None
        with self._timed():
            return self._watch.moved()

    def _control(self, reader: Any) -> None:
        """Make the last reference again: as a thread would make it, and as the loop does."""
        if self._is_controlled or not self._references or self._source.is_function_of_index:
            return
        turn, reference = list(self._references.items())[-1]
        began_s = self._clock()
        found = made_twice(reader, turn, reference)
        self.comparer.num_compared += found.num_compared
        self._restrict(found.limits)
        if found.is_other:
            warn_harmlessly(f"{self._source.name}: {self.limits.reason}. The loop makes the batches.")
        assert self._watch is not None
        if moved := self._watch.moved():  # a cache has these samples already, and grows no more
            self._restrict(in_turn(f"{joined(each.name for each in moved)} changes as batches are made"))
        self._is_controlled, self.comparer.cost_s = True, self._clock() - began_s
        self.comparer.spent_s += self.comparer.cost_s  # counts against what comparisons may take

    def trial(self, place: Any, reader: Reader) -> Trial:
        """Return what compares a place's batches, which begins with the last ones that the loop has made."""
        is_needless = place in self._verified or self.limits.num_threads == 1  # what moves is not made twice
        references = {} if is_needless else {turn: each.record for turn, each in self._references.items()}
        self._verified.add(place)  # or a doubt is raised before its first new batch
        self._references.clear()
        return Trial(self.comparer, reader, references)

    def watched(self, batches: Generator[Batch], can_go_back: bool) -> Generator[Batch]:
        """Pass on batches that are made ahead, looking at what moves.

        Args:
            batches: Made ahead.
            can_go_back: Whether one that was made can be made again; else `is_leaving` says so.

        Raises:
            DoubtError: Before a batch that may have been made of what was no longer as before.
        """
        assert self._watch is not None
        every_n, count, last_s, num_since_full = 1, 1, self._clock(), 1
        try:
            for batch in batches:
                now_s = self._clock()
                if count >= every_n and not self.is_leaving:
                    in_full = now_s >= self._full_due_s
                    is_quiet = self._watch.is_quiet(in_full=in_full)
                    self._spent_s += (cost_s := self._clock() - now_s)
                    if not is_quiet:
                        is_large = in_full and self._watch.is_quiet()  # what no other look has seen
                        self._leave(num_since_full if is_large else count, can_go_back)
                    if in_full:
                        self._full_due_s, num_since_full = now_s + cost_s / FULL_RATIO, 0
                    else:
                        every_n = math.ceil(cost_s * count / (LOOK_RATIO * max(now_s - last_s, 1e-6)))
                    last_s, count = now_s, 0
                count, num_since_full = count + 1, num_since_full + 1
                self.comparer.consider(now_s)
                yield batch
        except Exception as error:  # perhaps of a handle that a thread has opened
            is_other = not isinstance(error, (DoubtError, PipelineError))
            if can_go_back and is_other and not self._watch.is_quiet():
                self._leave(count, can_go_back)
            raise
        if count > 1 and not self.is_leaving and not self._watch.is_quiet():
            self._leave(count, can_go_back, is_over=True)

    def _leave(self, num_unseen: int, can_go_back: bool, *, is_over: bool = False) -> None:
        """Leave the place: at once, or after what was made ahead, which cannot be made again.

        Args:
            num_unseen: Batches since the last look, the one at hand among them.
            can_go_back: Whether that one can be made again.
            is_over: Whether that was the last.
        """
        assert self._watch is not None
        cells = self._watch.moved_cells() if can_go_back and not is_over else ()
        moved, expected = self._moved(), self._watch.expected
        names = [each.name for each in moved if each.change == "moved" and each.name not in expected]
        self._undo.begin(cells, names)
        text = f"{joined(names) or 'its state'} changed while batches were made ahead"
        if can_go_back:
            used = f", and {num_unseen - 1} of them may have been used without that change"
            raise DoubtError(text + used * (num_unseen > 1))
        self.is_leaving = True
        self.withdraw(text)
        warn_harmlessly(f"{self._source.name}: {text}; those are used up first, and may lack that change.")
