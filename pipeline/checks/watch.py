"""Sees what moves behind a dataset: looks are taken around making a batch, and around a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy
import torch

from pipeline.checks.cells import Cell, Change, DictCell
from pipeline.checks.reach import Reached, reach

Roots = Callable[[], Iterable[tuple[str, Any]]]
_NUM_TRIES, _MAX_NEW = 10, 8
_HOLD_NOTHING = (torch.Tensor, numpy.ndarray, bytes, str, int, float, type(None))


class Moved(NamedTuple):
    """One thing that has changed.

    Args:
        name: As a user would write it.
        change: Whether it has only grown, as a cache does.
    """

    name: str
    change: Change


class StateWatch:
    """Compares what is reachable from a dataset with what it was at the last look.

    Args:
        roots: Returns what to begin from, by name.

    Attributes:
        reached: What was found when it was last searched for.
        expected: Names of what moves as batches are made, one after the other: it does not count.

    Runs on:
        Loop thread. Takes some 1 µs an object a look, and 5 µs an object a search.
    """

    def __init__(self, roots: Roots) -> None:
        self._roots, self.expected = roots, set[str]()
        self.search()

    def search(self, indices: Sequence[int] = ()) -> None:
        """Search again for all that is reachable, and remember what it is; samples' own parts too."""
        self.reached: Reached = reach(self._roots(), indices)
        self._cells: list[Cell] = self.reached.cells
        self._before = [_look(each) for each in self._cells]
        self._before_in_full = [_look(each, in_full=True) for each in self._cells]

    def is_quiet(self, *, in_full: bool = False) -> bool:
        """Say whether nothing has moved since the last such look or search; what has grown is taken in.

        A dict that has got a handle counts as moved. What has moved is named by `moved`, asked next.

        Args:
            in_full: Look at all of what is not very large.
        """
        last = self._before_in_full if in_full else self._before
        for number, cell in enumerate(self._cells):
            before = last[number]
            try:
                after = cell.look_in_full() if in_full else cell.look()
                if not cell.change(before, after):
                    continue
            except Exception:  # a thread is changing it, or it is odd
                after = _look(cell, in_full=in_full)
            change = _change(cell, before, after)
            if change == "moved" and not self.expected.issuperset(_names(cell, before, after)):
                return False
            last[number] = after
        return True

    def moved_cells(self) -> list[tuple[Cell, Any]]:
        """Return what has moved since the last look, each with what it was then."""
        looked_at = zip(self._cells, self._before, strict=True)
        return [each for each in looked_at if _change(*each, _look(each[0])) == "moved"]

    def moved(self) -> list[Moved]:
        """Return what has changed since this was last asked, or since a search; this is the new last look.

        It looks at all of what is not very large, where `is_quiet` looks at some of it.
        """
        found, after = [], [_look(each, in_full=True) for each in self._cells]
        for cell, old, new in zip(self._cells, self._before_in_full, after, strict=True):
            if change := _change(cell, old, new):
                found += [Moved(name, change) for name in _names(cell, old, new)]
        self._before, self._before_in_full = [_look(each) for each in self._cells], after
        if any(each.change == "moved" for each in found):
            self.search()  # what has come in is to be looked at too
        return found


def _look(cell: Cell, *, in_full: bool = False) -> Any:
    """Return what an object is, as far as it can be looked at: threads may be changing it."""
    return _tried(cell.look_in_full if in_full else cell.look, object())


def _change(cell: Cell, before: Any, after: Any) -> Change:
    try:
        change = cell.change(before, after)
    except Exception:  # what has no equality, or could not be looked at
        return "moved"
    is_dict = change == "grown" and isinstance(cell, DictCell)
    return "moved" if is_dict and _has_handle(cell, after[0] - before[0]) else change


def _has_handle(cell: Any, num_new: int) -> bool:
    """Say whether a dict has got a handle, or something that has one."""
    new = _tried(partial(cell.newest, min(num_new, _MAX_NEW)), [])
    found = reach([("", [each for each in new if not isinstance(each, _HOLD_NOTHING)])])
    return bool(found.bound or found.ordered)


def _names(cell: Cell, before: Any, after: Any) -> list[str]:
    found: list[str] = _tried(partial(cell.names, before, after), [cell.path])
    return found


def _tried(read: Callable[[], Any], otherwise: Any) -> Any:
    """Return what is read, though threads may be changing it; or something else, if it is too odd."""
    for _ in range(_NUM_TRIES):
        try:
            return read()
        except Exception:  # such as a dict that has got another key meanwhile
            continue
    return otherwise
