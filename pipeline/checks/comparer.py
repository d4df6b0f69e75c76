"""Compares batches with those that the loop makes: of a new place, and one now and then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.batch import Batch
from pipeline.checks.compare import NotComparableError, Record
from pipeline.checks.trial import DifferenceError, Noted

COMPARE_RATIO = 0.005  # of the run's time


class Comparer:
    """Makes batches again, as far as the run can afford it.

    Args:
        clock: Of the wall, in seconds.

    Attributes:
        num_compared: Batches that were made twice and compared.
        cost_s: Of one such making.
        spent_s: On those that were made now and then.

    Runs on:
        Loop thread, but for `wants` and `compare`, which any thread may call.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._began_s = clock, clock()
        self.num_compared, self.cost_s, self.spent_s, self._wants_one = 0, 0.0, 0.0, False

    def consider(self, now_s: float) -> None:
        """Want the next batch to be compared, if the run can afford it."""
        self._wants_one = COMPARE_RATIO * (now_s - self._began_s) > self.spent_s + self.cost_s

    def wants(self) -> bool:
        """Say whether the batch at hand is to be compared; any thread."""
        wants_one, self._wants_one = self._wants_one, False
        return wants_one

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

    def make_again(self, reader: Any, noted: Noted) -> None:
        """Make a batch that was noted again, in the loop, and compare.

        Raises:
            DifferenceError: If it came out differently.
        """
        began_s = self._clock()
        try:
            self.compare(noted.position, noted.record, reader.remake(noted.position, is_hooked=False))
        finally:
            self.cost_s = self._clock() - began_s
            self.spent_s += self.cost_s
