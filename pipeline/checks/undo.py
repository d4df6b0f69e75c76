"""What batches that were made ahead have changed in a dataset is put back, before the loop makes them again.

A counter that begins to count in the middle of a run, or a file that is opened then, is seen by the next look
at the dataset; but the batches made ahead have counted by then. Whether it was they that changed something,
or a step, is known once the loop has made a batch itself.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy

from pipeline.checks.cells import ArrayCell, Cell, DictCell, NamesCell, SequenceCell, SetCell, TensorCell
from pipeline.checks.watch import Moved
from pipeline.errors import warn_harmlessly

_GONE: Any = object()
Made = TypeVar("Made")


class Undo:
    """Puts back what has moved while batches were made ahead, if the loop's making moves it too.

    Args:
        name: What the data is called.

    Runs on:
        Loop thread, while no other makes a batch.
    """

    def __init__(self, name: str) -> None:
        self._name, self._until = name, 0
        self._moved: Sequence[tuple[Cell, Any]] = ()
        self._names: tuple[str, ...] = ()

    def begin(self, moved: Sequence[tuple[Cell, Any]], names: Iterable[str]) -> None:
        """Take what has moved, each with what it was at the last look before, and its names."""
        self._moved, self._names, self._until = moved, tuple(names), 0

    def forget(self) -> None:
        """Let what has moved be as it is: another epoch begins."""
        self.begin((), ())

    def extend(self, until: int) -> None:
        """Hold it up to a position of the epoch: the one behind all batches that were made ahead."""
        if self._until:  # another doubt, for which nothing was taken
            self.forget()
        self._until = until

    def num_pending(self, position: int) -> int:
        """Return how many batches from a position on are to be made in the loop."""
        return max(0, self._until - position) if self._names else 0

    def make(self, make: Callable[[], Made], position: int) -> Made:
        """Make the batch at a position in the loop.

        Raises:
            Exception: The dataset's own, if it does not come from what the threads have left behind.
        """
        try:
            return make()
        except Exception:  # such as that of a connection which a thread has opened
            if not self.num_pending(position) or not self._put_back():
                raise
        return make()

    def undoes(self, moved: Iterable[Moved], position: int) -> bool:
        """Put all back, if making the batch at a position has moved some of it too; say whether it is."""
        is_same = any(each.change == "moved" and each.name.startswith(self._names) for each in moved)
        if not self.num_pending(position) or not is_same:
            return False  # perhaps a step has changed it, which holds
        if self._put_back():
            return True
        warn_harmlessly(
            f"{self._name}: what batches made ahead have changed cannot be put back. From batch {position} "
            "of this epoch on, batches may not be those of a plain loop."
        )
        return False

    def _put_back(self) -> bool:
        """Make it what it was, once; say whether all of it is."""
        are_back = [put_back(cell, before) for cell, before in self._moved]
        self._moved, self._names = (), ()
        return bool(are_back) and all(are_back)


def put_back(cell: Cell, before: Any) -> bool:
    """Make an object what it was at a look; say whether it is."""
    try:
        return _put_back(cell, before)
    except Exception:  # it cannot be set, or could not be looked at
        return False


def _put_back(cell: Cell, before: Any) -> bool:
    if isinstance(cell, NamesCell):
        _put_names_back(cell, before)
    elif isinstance(cell, (ArrayCell, TensorCell)):
        return _write(numpy.asarray(cell.found), before[-1])
    elif len(before[1]) == before[0]:
        _fill(cell, before)
    return not cell.change(before, cell.look())


def _fill(cell: Cell, before: Any) -> None:
    """Put back all that was in a container."""
    found = cell.found
    if isinstance(cell, DictCell):
        found.clear()
        found.update(zip(before[1], before[2], strict=True))
    elif isinstance(cell, SetCell):
        found.clear()
        found.update(before[1])
    elif isinstance(cell, SequenceCell) and isinstance(found, (list, deque)):
        found.clear()
        found.extend(before[1])


def _write(array: numpy.ndarray[Any, Any], data: bytes) -> bool:
    """Put back the bytes of an array, if they are all there."""
    if len(data) != array.nbytes or not array.flags.c_contiguous:
        return False
    array.reshape(-1).view("u1")[:] = numpy.frombuffer(data, "u1")
    return True


def _put_names_back(cell: NamesCell, before: Any) -> None:
    old, changed = dict(zip(*before, strict=True)), cell.changed(before, cell.look())
    if cell.found is not None and all(map(str.isidentifier, changed)):  # a table's columns are numbers
        for name in changed:
            _set(cell.found, name, old.get(name, _GONE))


def _set(holder: Any, name: str, value: Any) -> None:
    """Set an attribute, a global, or what a function closes over; or take it away."""
    if isinstance(holder, dict) and isinstance(inner := holder.get(name), types.CellType):
        _set_cell(inner, value)
    elif isinstance(holder, dict) and value is _GONE:
        holder.pop(name, None)
    elif isinstance(holder, dict):
        holder[name] = value
    elif not isinstance(holder, type) and name in getattr(holder, "__dict__", ()):
        _set(vars(holder), name, value)
    elif value is _GONE:
        delattr(holder, name)
    else:
        setattr(holder, name, value)


def _set_cell(cell: types.CellType, value: Any) -> None:
    if value is _GONE:
        del cell.cell_contents
    else:
        cell.cell_contents = value
