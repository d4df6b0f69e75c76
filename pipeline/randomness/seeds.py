"""Random numbers of the data: `(seed, epoch, index)` to a seed, and nothing else.

Neither a worker's state nor where the generator that the model's dropout draws from stands takes part, so the
batches of a run do not depend on where, when and by whom they are made. What that generator was seeded with
is the seed, unless the user named one.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import torch

from pipeline.errors import StageError

_MASK = (1 << 64) - 1
_SHUFFLE = -1  # takes the place of a sample's index; no sample has a negative one
_TYPED_BITS = 32
_seeds_set_aside: list[int] = []
_this_thread = threading.local()
_times_taken = 0


class Moving(Protocol):
    """A generator, or what decides an order like one."""

    def get_state(self) -> torch.Tensor: ...
    def set_state(self, state: torch.Tensor) -> Any: ...


class Epoch(NamedTuple):
    """An epoch, and the seed that decides its order and its random numbers.

    Args:
        number: Counted from 0; negative where nothing is trained.
        seed: Of 64 bits.
    """

    number: int
    seed: int

    def __str__(self) -> str:
        return str(self.number)

    @classmethod
    def begun(cls, number: int, seed: int | None) -> Epoch:
        """Return an epoch that begins now; without a seed it takes what torch was seeded with."""
        return cls(number, (users_seed() if seed is None else seed) & _MASK)


def users_seed() -> int:
    """Return what torch's global generator was seeded with last: by the user, or by torch itself.

    A state that was put into it (`set_rng_state`, `fork_rng`) brings its seed along.
    """
    return _seeds_set_aside[0] if _seeds_set_aside else torch.initial_seed()


def is_typed(seed: int) -> bool:
    """Say whether a person may have set this seed: those that torch draws for itself have 64 bits."""
    return seed >> _TYPED_BITS == 0


@contextmanager
def reading_ahead() -> Iterator[None]:
    """Have this thread, which is not the loop's, leave the global generators alone inside the block."""
    _this_thread.is_ahead = True
    try:
        yield
    finally:
        _this_thread.is_ahead = False


def take_generators() -> None:
    """Note that the global generators are seeded or swapped for a while, as only the loop thread may do it.

    Raises:
        StageError: On a thread that reads ahead: the model draws from them at the same time.
    """
    global _times_taken
    if getattr(_this_thread, "is_ahead", False):
        raise StageError(
            "a pipeline.Loader (or prefetch) was begun by a thread that reads batches ahead, beside the "
            "loop, which draws from the same generators. Begin it with the first batch, or have the batches "
            "read in their turn: leave placement and schedule at auto.",
            stage="fetch",
        )
    _times_taken += 1


def times_taken() -> int:
    """Return how often that was, in this process."""
    return _times_taken


@contextmanager
def drawing_from(generator: torch.Generator) -> Iterator[None]:
    """Have torch's global generator be another one inside the block.

    All that draws on the CPU draws from it, and `torch.manual_seed` seeds it. Where the block has left it, it
    goes on the next time. Takes 10 µs.

    Runs on:
        Loop thread: torch has one global generator for all threads.
    """
    state = torch.get_rng_state()
    _seeds_set_aside.append(torch.initial_seed())
    try:
        torch.set_rng_state(generator.get_state())
        yield
    finally:
        generator.set_state(torch.get_rng_state())
        torch.set_rng_state(state)
        _seeds_set_aside.pop()


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Mix the three numbers into a seed of 63 bits.

    Neighbouring inputs give unrelated seeds, which a plain sum would not.

    Source:
        Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014): the
        finalizer of SplitMix64, applied once for each input.
    """
    return seed_in_epoch(epoch_key(seed, epoch), index)


def epoch_key(seed: int, epoch: int) -> int:
    """Mix what the samples of an epoch have in common, once for all of them."""
    return _mix(_mix(0, seed), epoch)


def seed_in_epoch(key: int, index: int) -> int:
    """Return the `sample_seed` of a sample, given the key of its epoch."""
    return _mix(key, index) >> 1


def _mix(mixed: int, part: int) -> int:
    mixed = (mixed + part + 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return mixed ^ (mixed >> 31)


def shuffle_generator(seed: int, epoch: int) -> torch.Generator:
    """Return the generator that orders one epoch's samples."""
    return torch.Generator().manual_seed(sample_seed(seed, epoch, _SHUFFLE))


def generator_states(more: Iterable[Moving] = ()) -> dict[str, Any]:
    """Return where the global generators stand: Python's, NumPy's, torch's, and those of devices in use.

    Args:
        more: Further ones, such as a DataLoader's own.
    """
    version, words, gauss = random.getstate()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "more": [each.get_state() for each in more],
    }
    if "numpy.random" in sys.modules:
        states["numpy"] = sys.modules["numpy.random"].get_state(legacy=False)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_generators(states: dict[str, Any], more: Iterable[Moving] = ()) -> None:
    """Put the generators where they stood."""
    torch.set_rng_state(states["torch"])
    python = states["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    if "numpy" in states:
        import_module("numpy.random").set_state(states["numpy"])
    if "cuda" in states and torch.cuda.is_available():
        for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, device)
    for generator, state in zip(more, states["more"], strict=False):
        generator.set_state(state)
