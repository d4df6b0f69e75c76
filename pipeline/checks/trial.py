"""The batches of one placement, compared with the loop's before they are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from pipeline.batch import Batch
from pipeline.checks.compare import NotComparableError, Record
from pipeline.errors import StallError, WorkerDiedError


class DoubtError(Exception):
    """What is made ahead must not be used: what it is made of has changed."""


class MovedThereError(DoubtError):
    """A worker process has changed its own copy of the dataset.

    Args:
        num_unseen: How many of its batches may have been used before it looked.
        names: What has changed.
    """

    def __str__(self) -> str:
        num_unseen, names = self.args[0], ", ".join(self.args[1:4])
        used = f", and {num_unseen} batches may have been used since it looked last" if num_unseen else ""
        return f"{names} changed as batches were made in a process{used}"


class DifferenceError(DoubtError):
    """A batch came out differently in the place where batches are made."""


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


class Comparer(Protocol):
    """Compares batches, and says when it is time to."""

    def wants(self) -> bool:
        """Say whether the batch at hand is to be compared; any thread."""

    def compare(self, turn: Any, record: Record, batch: Batch) -> None:
        """Compare a batch with what the loop made; any thread."""

    def make_again(self, reader: Any, noted: Noted) -> None:
        """Make a batch in the loop and compare; loop thread."""


REPEATED: Any = object()
"""Stands for a batch that was made again, compared, and thrown away."""


class Trial:
    """Compares the batches of one place with the loop's; one without checks compares nothing.

    Attributes:
        references: What the loop has made of the batches that the place makes again, by turn.
    """

    def __init__(
        self, checks: Comparer | None = None, reader: Any = None, references: dict[Any, Record] | None = None
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
        try:
            return Noted(turn, Record(batch), send(batch))
        except NotComparableError:  # others could be compared
            return send(batch)

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
        is_other = isinstance(error, (DoubtError, WorkerDiedError, StallError))
        if turn not in self.references or is_other or not isinstance(error, Exception):
            return error
        found = DifferenceError(f"batch {turn} could not be made there: {type(error).__name__}: {error}")
        found.__cause__ = error
        return found


def _nowhere(batch: Batch) -> None:
    return None
