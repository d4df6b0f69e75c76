"""Where batches may be made, as far as what was found in the data tells."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from pipeline.checks.reach import Reached


class Limits(NamedTuple):
    """Where batches may be made.

    Args:
        num_threads: Besides the loop; None for any number.
        has_processes: Whether they may be made in processes.
        reason: What was found; empty if nothing was.
        remedy: What to type for more, and when that is right; empty if nothing helps.
    """

    num_threads: int | None = None
    has_processes: bool = True
    reason: str = ""
    remedy: str = ""

    def restricted(self, other: Limits) -> Limits:
        """Return what both of two allow; the first reason stands."""
        counts = [each.num_threads for each in (self, other) if each.num_threads is not None]
        has_processes = self.has_processes and other.has_processes
        first = self if self.reason else other
        return Limits(min(counts, default=None), has_processes, first.reason, first.remedy)


def in_the_loop(reason: str) -> Limits:
    """Return the limits of what only the loop may make."""
    return Limits(0, False, reason)


def in_turn(reason: str) -> Limits:
    """Return the limits of what may be made by one thread, one batch after the other."""
    return Limits(1, False, reason)


def limits_of(reached: Reached, trained: Iterable[torch.nn.Module], name: str) -> Limits:
    """Return the limits that follow from what is reachable from a dataset.

    Args:
        reached: What is.
        trained: Models that are trained on its batches.
        name: What the data is called.
    """
    parts = {id(each) for model in trained for each in model.modules()}
    if any(id(each) in parts for each in reached.modules):
        return in_the_loop(f"{name} uses the model that is trained on its batches")
    if reached.ordered:
        return in_turn(f"{_listed(reached.ordered)} can only be read in turn, by one thread")
    if reached.bound:
        return Limits(0, True, f"{_listed(reached.bound)} may only be used by the thread that opened it")
    return Limits()


def joined(names: Iterable[str]) -> str:
    """Return names in a row, each once, at most three of them."""
    unique = list(dict.fromkeys(names))
    return ", ".join(unique[:3]) + (f" and {len(unique) - 3} more" if len(unique) > 3 else "")


def _listed(found: dict[str, Any]) -> str:
    return joined(f"{path} ({type(each).__name__})" for path, each in found.items())
