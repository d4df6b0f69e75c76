"""The batches of one epoch, made one at a time, on whichever thread asks.

A `Source` opens a `Reader` for each epoch. It starts on the loop thread, may go on in prefetch
threads, and can come back; the batches are the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from pipeline.batch import Batch
from pipeline.randomness.seeds import Epoch

END: Any = object()
"""What a reader returns after the last batch of its epoch."""


EVALUATION_EPOCH = -1
"""Takes the place of the epoch where nothing is trained, so that every validation sees the same."""


def of_this_kind(found: dict[str, Any] | None, key: str, name: str) -> dict[str, Any] | None:
    """Return the state of data that a run is resumed from; None, with a warning, if it is of another kind.

    Args:
        found: In the checkpoint.
        key: What a state of this kind has.
        name: What the data is called.
    """
    if found is None or key in found:
        return found
    warnings.warn(
        f"{name} is of another kind than in the run that is resumed, in the middle of an epoch. Of that "
        "epoch some samples may be used twice and others not at all; the next ones are whole.",
        stacklevel=2,
    )
    return None


class Reader(Protocol):
    """The batches of one epoch, in order; `END` after the last one.

    Attributes:
        position: Of the batch that is made next, in its epoch; counted from 0.
        is_random_access: Whether batches may be made in any order, by several threads.
        is_known: Whether all is known that `first` would find out.
        max_processes: That can share in the batches; None for any number.
        turn: Which batch is made next, as its source counts them; with random access, its position.
    """

    position: int
    is_random_access: bool
    max_processes: int | None

    @property
    def turn(self) -> Any: ...

    def first(self) -> Batch:
        """Make the next batch on the loop thread and find out whether a thread can make more.

        After it, `is_threadable` says so. So an epoch begins, and goes on after an
        `UnhookableDrawError`.
        """

    def read(self) -> Batch:
        """Make the next batch on the loop thread."""

    def thread_maker(self) -> Callable[[int], Batch]:
        """Return what makes the batch at a position, for one thread that is not the loop thread.

        It raises an UnhookableDrawError if only the loop thread can make this batch; nothing is
        consumed then. Without random access the positions must be asked for in order.
        """

    def close(self) -> None:
        """Let go of what the epoch holds; nothing is read afterwards."""

    @property
    def is_known(self) -> bool: ...

    @property
    def is_threadable(self) -> bool:
        """Whether, as far as is known, a thread can make the next batch."""

    @property
    def is_exhausted(self) -> bool:
        """Whether it is known that there is no further batch."""


class TurnReader(Reader, Protocol):
    """A reader whose batches worker processes can make.

    A batch is asked for by its *turn*, which its reader alone understands.

    Attributes:
        epoch: That is read.
    """

    epoch: Epoch

    @property
    def num_left(self) -> float:
        """At most so many batches are left."""

    def ahead(self) -> Iterator[Any]:
        """Return the turns that come next, as far as anybody knows."""

    def job(self, turn: Any) -> tuple[int, torch.Tensor]:
        """Return what a worker's fetcher is asked: a position, and indices as int64 ``[B]``."""

    def worker(self, turn: Any) -> int | None:
        """Return which worker is to make it; None for whichever has the least to do."""

    def take(self, turn: Any, batch: Batch) -> bool:
        """Go on behind what was made at a turn; say whether it is a batch."""

    def describe(self, turn: Any) -> str:
        """Name a turn's batch."""


class Repeated(Protocol):
    """Takes batches that were made in the loop before, and are made in a process once more."""

    @property
    def turns(self) -> Sequence[Any]:
        """Which batches."""

    def take(self, turn: Any, open_batch: Callable[[], Batch]) -> None:
        """Look at one; to open it raises what the dataset raised."""


class Source(Protocol):
    """A user's data.

    Attributes:
        name: What the user's argument is called.
        num_batches: Batches per epoch, or None where nobody knows.
        unhookable: What the data was seen to draw from that a thread cannot isolate.
        makes_fresh_batches: Whether each batch is known to have memory of its own.
        is_known_kind: Whether nothing but the data decides its batches, and so they may be made ahead. What
            an iterator of the user's own does between two batches, nobody can see.
        is_function_of_index: Whether a batch is known to depend on its indices alone.
        is_ours: Whether it is a belt of ours, which has threads of its own.
        seed: Of all epochs; None takes torch's, as it is when an epoch begins.
    """

    name: str
    seed: int | None
    num_batches: int | None
    unhookable: tuple[str, ...]
    makes_fresh_batches: bool
    is_known_kind: bool
    is_function_of_index: bool
    is_ours: bool

    def roots(self) -> list[tuple[str, Any]]:
        """Return the objects of the user's that make a batch, each with a name."""

    def draw_apart(self) -> None:
        """Have every batch made once, even if it should be seen to draw random numbers."""

    def open(self, epoch: int, max_batches: int | None = None, start: int = 0) -> Reader:
        """Begin an epoch; loop thread.

        Args:
            epoch: Counted from 0.
            max_batches: Of the whole epoch, those before `start` included.
            start: Batches to leave out, as a run that is resumed has used them already.
        """

    def state(self, position: int) -> dict[str, Any] | None:
        """Return what a checkpoint needs to open the epoch under way at a position; None if nothing."""

    def load_state(self, found: dict[str, Any] | None) -> None:
        """Have the next epoch opened with that."""
