"""Which placements a source's batches may have, found by looking and comparing, for the length of a run.

1. **Looked for.** What is reachable from the dataset is searched for handles, iterators and generators of random
   numbers, and for the model that is trained (`reach`).
2. **Looked at.** Before batches are made in a new place, the loop makes `NUM_LOOKED_AT` more of them itself. What
   moves while a batch is made, and what moves between two of them, keeps the batches in the loop (`watch`).
3. **Made twice.** The loop makes the last of these a second time, as a thread would. If it comes out differently,
   it is no function of its indices, and stays in the loop. What moves is never made twice.
4. **Compared.** The new place begins with the last `NUM_REFERENCES` of these batches. They are compared bit for
   bit with those that were trained on, and thrown away.
5. **Watched.** As long as batches are made ahead, what is reachable is looked at before each one is handed over,
   and now and then the loop makes one again, to be compared before it is used. Both together take less than
   a hundredth of the run's time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any, NamedTuple

import torch

from pipeline.batch import Batch
from pipeline.checks.compare import NotComparableError, Record
from pipeline.checks.watch import Moved, StateWatch
from pipeline.data import END, IterableReader, Reader, Source

NUM_LOOKED_AT, NUM_REFERENCES = 3, 2
LOOK_RATIO, COMPARE_RATIO = 0.004, 0.005  # of the run's time


class Doubt(Exception):
    """What is made ahead must not be used: what it is made of has changed."""


class DifferenceError(Doubt):
    """A batch came out differently in the place where batches are made."""


class Limits(NamedTuple):
    """Where batches may be made.

    Args:
        num_threads: Besides the loop; None for any number.
        has_processes: Whether they may be made in processes.
        reason: What was found; empty if nothing was.
    """

    num_threads: int | None = None
    has_processes: bool = True
    reason: str = ""


class Noted(NamedTuple):
    """A batch that is to be compared before it is used.

    Args:
        position: In its epoch.
        record: Of what was made.
        sent: The batch, on its way to the device.
    """

    position: int
    record: Record
    sent: Any


class Checks:
    """Looks at one source's data, and compares its batches.

    Args:
        source: Of the batches.
        is_trusted: Whether the user said that batches may be made ahead of what yields them itself.
        clock: Of the wall, in seconds.

    Attributes:
        limits: As far as is known.
        trained: The model that is trained on the batches, if that is known.
        num_compared: Batches that were made twice and compared.
        spent_s: On all of this.

    Runs on:
        Loop thread, but for `wants` and `compare`, which any thread may call.
    """

    def __init__(
        self, source: Source, *, is_trusted: bool, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._source, self._is_trusted, self._clock = source, is_trusted, clock
        self.limits, self.trained = self._of_kind(), list[torch.nn.Module]()
        self.num_compared, self.spent_s = 0, 0.0
        self._watch: StateWatch | None = None
        self._references: dict[Any, Record] = {}
        self._verified: set[Any] = set()
        self._is_controlled = self._wants_one = False
        self._looked_at: tuple[int, int] | None = None  # the reader, and where it stood then
        self._has_differed = False
        self._began_s, self._compare_s, self._cost_s = clock(), 0.0, 0.0

    # ---- looked for

    def survey(self) -> Limits:
        """Return the limits, having searched the dataset if that was not done yet."""
        if self._watch is None:
            began_s = self._clock()
            self._watch = StateWatch(self._source.roots)
            self._restrict(self._of_reached())
            if self.limits.num_threads == 1:
                self._source.draw_apart()
            self.spent_s += self._clock() - began_s
        return self.limits

    def has_changed(self) -> bool:
        """Say whether the dataset is no longer what it was when it was last looked at; between two epochs."""
        return self._watch is not None and not self._watch.is_quiet()

    def withdraw(self, reason: str) -> None:
        """Have batches made in the loop from here on, for good."""
        self.limits = Limits(0, False, reason)

    def _of_kind(self) -> Limits:
        if self._is_trusted or self._source.is_known_kind:
            return Limits()
        return Limits(
            0,
            False,
            f"{self._source.name} is an iterable of the user's, which may depend on what a step changes, so it is "
            "read in its turn. To read it ahead, set placement='inline'",
        )

    def _of_reached(self) -> Limits:
        assert self._watch is not None
        reached = self._watch.reached
        trained = {id(each) for model in self.trained for each in model.modules()}
        if any(id(each) in trained for each in reached.modules):
            return Limits(0, False, f"{self._source.name} uses the model that is trained on its batches")
        if reached.ordered:
            return Limits(1, False, f"{_listed(reached.ordered)} can only be read in turn, by one thread")
        if reached.bound:
            return Limits(0, True, f"{_listed(reached.bound)} may only be used by the thread that opened it")
        return Limits()

    def _restrict(self, found: Limits) -> None:
        """Take further limits in; the first reason stands."""
        counts = [each.num_threads for each in (self.limits, found) if each.num_threads is not None]
        self.limits = Limits(
            min(counts, default=None),
            self.limits.has_processes and found.has_processes,
            self.limits.reason or found.reason,
        )

    # ---- looked at, in the loop

    def is_looked_at(self, place: Any, reader: Reader, *, is_loop: bool) -> bool:
        """Say whether batches may be made in a place now: after a look at some that the loop makes.

        The loop itself is a place where the first batches are looked at.
        """
        if not self.is_of_use(reader) or (is_loop and self._looked_at is not None):
            return True
        return place in self._verified or self._looked_at == (id(reader), reader.position)

    def is_of_use(self, reader: Reader) -> bool:
        """Say whether there is anything to look at: not where it is settled how an iterable is read."""
        return reader.is_random_access or (self._source.is_known_kind and not self._is_trusted)

    def looked_at(self, reader: Any, yields: Callable[[Batch], Batch], *, controls: bool) -> Generator[Batch]:
        """Make some batches in the loop and look at what moves meanwhile.

        Args:
            reader: One epoch's batches.
            yields: Brings a batch to the device.
            controls: Whether to make the last one again, since batches are to be made elsewhere.
        """
        self.survey()
        assert self._watch is not None
        watch = self._watch
        watch.search()
        self._looked_at = id(reader), reader.position
        self._references.clear()
        for number in range(NUM_LOOKED_AT):
            turn = reader.turn
            if (batch := self._read(reader)) is END:
                return
            self._take_in(watch.moved(), is_made=True, is_first=number == 0, is_in_order=not reader.is_random_access)
            self._keep(turn, batch)
            yield yields(batch)
            self._take_in(watch.moved(), is_made=False, is_first=number == 0)
        self._restrict(self._of_reached())
        self._looked_at = id(reader), reader.position
        if controls and reader.is_random_access and self.limits.num_threads != 1:
            self._control(reader)

    def _read(self, reader: Any) -> Batch:
        """Make the next batch once: what an iterable draws is found out meanwhile."""
        return reader.first() if isinstance(reader, IterableReader) and not reader.is_known else reader.read()

    def _keep(self, turn: Any, batch: Batch) -> None:
        began_s = self._clock()
        try:
            self._references[turn] = Record(batch)
        except NotComparableError as error:
            self._restrict(Limits(0, False, str(error)))
        if len(self._references) > NUM_REFERENCES:
            del self._references[next(iter(self._references))]
        self.spent_s += self._clock() - began_s

    def _take_in(self, moved: list[Moved], *, is_made: bool, is_first: bool, is_in_order: bool = False) -> None:
        """Draw conclusions from what moved while a batch was made, or between two."""
        names = _joined([each.name for each in moved if each.change == "moved"])
        if not names or is_first:  # the first batch may set up what the others use
            return
        if is_made and not is_in_order:
            self._restrict(Limits(1, False, f"{names} changes as batches are made"))
            self._source.draw_apart()
        elif not is_made:
            self._restrict(Limits(0, False, f"{names} changes between two batches, which may depend on it"))

    def _control(self, reader: Any) -> None:
        """Make the last reference again: as a thread would make it, or else as a process would."""
        if self._is_controlled or not self._references or self._source.is_function_of_index:
            return
        assert self._watch is not None
        turn, record = list(self._references.items())[-1]
        began_s = self._clock()
        again = reader.remake(turn, is_hooked=True)
        if again is not None:  # else it draws from what a thread cannot keep apart
            self._conclude(turn, record.difference(Record(again)))
        if not self._has_differed:
            self._conclude(turn, record.difference(Record(reader.remake(turn, is_hooked=False))))
        if moved := self._watch.moved():
            self._restrict(Limits(1, False, f"{_joined([each.name for each in moved])} changes as batches are made"))
        self._is_controlled = True
        self._cost_s = self._clock() - began_s
        self.spent_s += self._cost_s

    def _conclude(self, turn: Any, difference: str) -> None:
        self.num_compared += 1
        if difference:
            self._has_differed = True
            self.withdraw(
                f"batch {turn} was made twice, and the second time {difference}: it depends on more than its indices"
            )

    # ---- compared, in a new place

    def trial(self, place: Any, reader: Reader) -> Trial:
        """Return what compares the batches of a place, which begins with the last ones that the loop has made."""
        is_needless = place in self._verified or self.limits.num_threads == 1  # what moves is not made twice
        references = {} if is_needless else dict(self._references)
        return Trial(self, reader, references)

    def verify(self, place: Any) -> None:
        """Note that a place has made the references as the loop did."""
        self._verified.add(place)
        self._references.clear()

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

    # ---- watched

    def watched(self, batches: Generator[Batch], can_go_back: bool) -> Generator[Batch]:
        """Pass on batches that are made ahead, looking at what moves.

        Args:
            batches: Made ahead.
            can_go_back: Whether one that was made can be made again.

        Raises:
            Doubt: Before a batch that may have been made of what was no longer as before.
        """
        assert self._watch is not None
        every_n, count, last_s = 1, 1, self._clock()
        for batch in batches:
            now_s = self._clock()
            if count >= every_n:
                is_quiet = self._watch.is_quiet()
                self.spent_s += (cost_s := self._clock() - now_s)
                if not is_quiet:
                    raise Doubt(self._change(count if can_go_back else 0))
                every_n = math.ceil(cost_s * count / (LOOK_RATIO * max(now_s - last_s, 1e-6)))
                last_s, count = now_s, 0
            count += 1
            budget_s = COMPARE_RATIO * (now_s - self._began_s)
            self._wants_one = budget_s > self._compare_s + self._cost_s
            yield batch

    def _change(self, num_unseen: int) -> str:
        """Say what has moved, and which batches it may have come too late for; 0 for all that were made ahead."""
        assert self._watch is not None
        names = _joined([each.name for each in self._watch.moved() if each.change == "moved"])
        text = f"{names or 'its state'} changed while batches were made ahead"
        if num_unseen > 1:
            return f"{text}; the last {num_unseen - 1} before this one may have been made of what was before"
        return text if num_unseen else f"{text}; some were made of what was before"

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


class Trial:
    """Compares the batches of one place with the loop's; one without checks compares nothing.

    Attributes:
        references: What the loop has made of the batches that the place makes again, by turn.
    """

    def __init__(
        self, checks: Checks | None = None, reader: Any = None, references: dict[Any, Record] | None = None
    ) -> None:
        self._checks = checks if reader is not None and reader.is_random_access else None
        self._all, self._reader, self.references = checks, reader, references or {}

    @property
    def turns(self) -> list[Any]:
        return list(self.references)

    def take(self, turn: Any, open_batch: Callable[[], Batch]) -> None:
        """Compare a batch that a process has made again.

        Raises:
            DifferenceError: If it differs from the loop's, or was not made.
        """
        try:
            batch = open_batch()
        except Exception as error:
            raise self.blamed(turn, error) from error
        self.hand_on(turn, batch, _nowhere)

    def hand_on(self, turn: Any, batch: Batch, send: Callable[[Batch], Any]) -> Any:
        """Return a batch on its way to the device; `REPEATED` in place of one that was made again.

        Raises:
            DifferenceError: If that one differs from the loop's.

        Runs on:
            The thread that makes batches, or takes them from processes.
        """
        if turn in self.references:
            assert self._all is not None
            self._all.compare(turn, self.references[turn], batch)
            return REPEATED
        if self._checks is None or not self._checks.wants():
            return send(batch)
        return Noted(turn, Record(batch), send(batch))

    def settle(self, noted: Noted) -> Any:
        """Compare a batch that was noted with the loop's, made now, and return it; loop thread.

        Raises:
            DifferenceError: If they differ.
        """
        assert self._checks is not None
        self._checks.make_again(self._reader, noted)
        return noted.sent

    def blamed(self, turn: Any, error: BaseException) -> BaseException:
        """Return the error that ends a place: its own, if the loop had made that batch without one."""
        if turn not in self.references or isinstance(error, Doubt) or not isinstance(error, Exception):
            return error
        found = DifferenceError(f"batch {turn} could not be made there: {type(error).__name__}: {error}")
        found.__cause__ = error
        return found


def _nowhere(batch: Batch) -> None:
    return None


REPEATED: Any = object()
"""Stands for a batch that was made again, compared, and thrown away."""


def _listed(found: dict[str, Any]) -> str:
    return _joined([f"{path} ({type(each).__name__})" for path, each in found.items()])


def _joined(names: Iterable[str]) -> str:
    unique = list(dict.fromkeys(names))
    return ", ".join(unique[:3]) + (f" and {len(unique) - 3} more" if len(unique) > 3 else "")
