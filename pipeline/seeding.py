"""Random numbers of the data: `(seed, epoch, index)` to a seed, and nothing else.

Neither a worker's state nor the generator that the model's dropout draws from takes part, so the
batches of a run do not depend on where, when and by whom they are made.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch

_MASK = (1 << 64) - 1
_SHUFFLE = -1  # takes the place of a sample's index; no sample has a negative one


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


def generator_states(more: Iterable[torch.Generator] = ()) -> dict[str, Any]:
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


def restore_generators(states: dict[str, Any], more: Iterable[torch.Generator] = ()) -> None:
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
