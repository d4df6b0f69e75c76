"""Sees what moves behind a dataset: looks are taken around making a batch, and around a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from pipeline.checks.cells import Cell, Change, DictCell
from pipeline.checks.kinds import kind_of
from pipeline.checks.reach import Reached, reach

Roots = Callable[[], Iterable[tuple[str, Any]]]


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

    Runs on:
        Loop thread. Takes some 1 µs an object a look, and 5 µs an object a search.
    """

    def __init__(self, roots: Roots) -> None:
        self._roots = roots
        self.search()

    def search(self, indices: Sequence[int] = ()) -> None:
        """Search again for all that is reachable, and remember what it is; samples' own parts too."""
        self.reached: Reached = reach(self._roots(), indices)
        self._cells: list[Cell] = self.reached.cells
        self._before = [each.look() for each in self._cells]
        self._before_in_full = [each.look_in_full() for each in self._cells]

    def is_quiet(self) -> bool:
        """Say whether nothing has moved since the last look or search; what has grown is taken in.

        A dict that has got a handle counts as moved. What has moved is named by `moved`, asked next.
        """
        for number, cell in enumerate(self._cells):
            before, after = self._before[number], cell.look()
            if (change := cell.change(before, after)) == "moved" or (change and _has_handle(cell)):
                return False
            if change:
                self._before[number] = after
        return True

    def moved(self) -> list[Moved]:
        """Return what has changed since this was last asked, or since a search; this is the new last look.

        It looks at all of what is not very large, where `is_quiet` looks at some of it.
        """
        found, after = [], [each.look_in_full() for each in self._cells]
        for cell, old, new in zip(self._cells, self._before_in_full, after, strict=True):
            if change := cell.change(old, new):
                is_handle = _has_handle(cell)
                found.append(Moved(cell.name(old, new), "moved" if is_handle else change))
        self._before, self._before_in_full = [each.look() for each in self._cells], after
        if any(each.change == "moved" for each in found):
            self.search()  # what has come in is to be looked at too
        return found


def _has_handle(cell: Cell) -> bool:
    return isinstance(cell, DictCell) and kind_of(cell.newest()) in ("bound", "ordered")
