"""One batch made again by the loop: does it come out the same, and does it draw as much?"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from pipeline.batch import Batch
from pipeline.checks.compare import NotComparableError, Record
from pipeline.checks.limits import Limits, in_the_loop, in_turn, joined


class Reference(NamedTuple):
    """A batch that the loop made and trained on.

    Args:
        record: Of what was made.
        draws: How far each sample drew.
        grown: Names of the caches that it was put into.
    """

    record: Record
    draws: list[Any]
    grown: list[str]


class Twice(NamedTuple):
    """What making a batch again has shown.

    Args:
        num_compared: How often it was made again and compared.
        limits: Where batches may be made.
        is_other: Whether it came out differently.
    """

    num_compared: int
    limits: Limits
    is_other: bool


def made_twice(reader: Any, turn: Any, reference: Reference) -> Twice:
    """Make a batch again, as a thread would make it and then as the loop does.

    In each process, and in each order of threads, a cache would get other draws. So it counts whether what
    was kept had been drawn: then a batch draws less when it is made again, or differs.
    """
    num_compared, again = 0, reader.remake(turn, is_hooked=True)
    if again is not None:  # else it draws from what a thread cannot keep apart
        num_compared += 1
        if found := _difference(reference.record, again):
            return _other(num_compared, turn, found)
    again, draws = reader.noting_draws(partial(reader.remake, turn, is_hooked=False))
    if found := _difference(reference.record, again):
        return _other(num_compared + 1, turn, found)
    if draws == reference.draws:
        return Twice(num_compared + 1, Limits(), False)
    keeper = joined(reference.grown) or "something"
    reason = f"{keeper} keeps random numbers that were drawn as a batch was made"
    return Twice(num_compared + 1, in_turn(reason), False)


def _other(num_compared: int, turn: Any, difference: str) -> Twice:
    reason = f"batch {turn} was made twice, and the second time {difference}"
    return Twice(num_compared, in_the_loop(f"{reason}: it depends on more than its indices"), True)


def _difference(record: Record, batch: Batch) -> str:
    try:
        return record.difference(Record(batch))
    except NotComparableError as error:
        return str(error)
