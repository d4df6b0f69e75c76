"""What can be reached from a dataset: every object behind it that could change, or be a handle.

Followed are attributes, containers (some elements of long ones), functions (their closures, defaults, and the
globals that their code names), classes of the user's own, partials and bound methods. Not followed are
modules of libraries, and what is further away than `MAX_DEPTH` or than `MAX_OBJECTS` allow.
"""

from __future__ import annotations

import array
import contextvars
import ctypes
import functools
import io
import os
import types
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

from pipeline.checks.cells import (
    ArrayCell,
    BufferCell,
    Cell,
    DictCell,
    FileCell,
    GeneratorCell,
    NamesCell,
    SequenceCell,
    SetCell,
    TensorCell,
)
from pipeline.checks.kinds import GENERATORS, is_user_code, kind_of, pickles_itself
from pipeline.checks.parts import (
    Found,
    class_attributes,
    closed_over,
    elements_at,
    global_names,
    inner_indices,
    modules_of,
    names_of,
    parts_of,
    read_of_module,
)

MAX_DEPTH, MAX_OBJECTS = 12, 3000


@dataclass
class Reached:
    """What was found.

    Args:
        cells: Of each object that can change.
        bound: Handles that only the thread that opened them may use, by path.
        ordered: What must be read in turn: files, iterators, generators of random numbers.
        modules: Torch modules.
        is_cut: Whether there was more than could be looked at.
    """

    cells: list[Cell] = field(default_factory=list)
    bound: dict[str, Any] = field(default_factory=dict)
    ordered: dict[str, Any] = field(default_factory=dict)
    modules: list[torch.nn.Module] = field(default_factory=list)
    is_cut: bool = False


def reach(roots: Iterable[Found], indices: Sequence[int] = ()) -> Reached:
    """Look for everything behind some objects.

    Args:
        roots: By the name that a user has for them; what they are themselves does not count, so a dataset
            may be an iterator.
        indices: Elements of long lists that are looked at too: those of the samples that are made next.

    Runs on:
        Loop thread, while no other makes a batch. Takes some 5 µs an object.
    """
    found, seen = Reached(), dict[int, Any]()  # kept, or an address would be used again
    waiting = deque((path, each, 0, False) for path, each in roots if each is not None)
    while waiting:
        path, each, depth, is_vouched_for = waiting.popleft()
        if id(each) in seen:
            continue
        if len(seen) >= MAX_OBJECTS or depth > MAX_DEPTH:
            found.is_cut = True
            continue
        kind = kind_of(each)
        if kind == "leaf":
            continue
        seen[id(each)] = each
        if (depth and kind == "ordered") or _seeks(each):
            found.ordered[path] = each
        elif depth and kind == "bound" and not is_vouched_for:
            found.bound[path] = each
        if isinstance(each, torch.nn.Module):
            found.modules.append(each)
        found.cells.extend(_cells(path, each))
        is_vouched_for = pickles_itself(each)
        indices = [*indices, *inner_indices(each, indices)]
        try:
            parts = [*parts_of(path, each), *elements_at(path, each, indices)]
        except Exception:  # it is odd, or a thread is changing it
            found.is_cut, parts = True, []
        waiting.extend((name, part, depth + 1, is_vouched_for) for name, part in parts)
    return found


def _seeks(found: Any) -> bool:
    """Say whether this is a function of the user's that moves in a file by its number."""
    is_own = isinstance(found, types.FunctionType) and is_user_code(found.__module__)
    return is_own and "lseek" in global_names(found.__code__)


def _cells(path: str, found: Any) -> Iterator[Cell]:
    """Yield what is to be looked at of one object itself."""
    if isinstance(found, type):
        for kind in (each for each in found.__mro__ if is_user_code(each.__module__)):
            yield NamesCell(f"{kind.__name__}.", functools.partial(class_attributes, kind), kind)
        return
    if isinstance(found, torch.Tensor):
        yield TensorCell(path, found)
    elif isinstance(found, numpy.ndarray):
        yield SequenceCell(path, found.reshape(-1)) if found.dtype == object else ArrayCell(path, found)
    elif isinstance(found, GENERATORS):
        yield GeneratorCell(path, found)
    elif isinstance(found, io.IOBase):
        yield FileCell(path, found)
    elif isinstance(found, dict):
        yield DictCell(path, found)
    elif isinstance(found, (list, deque)):
        yield SequenceCell(path, found)
    elif isinstance(found, (bytearray, array.array, ctypes.Array, ctypes._SimpleCData)):
        yield BufferCell(path, found)
    elif isinstance(found, set):
        yield SetCell(path, found)
    elif isinstance(found, contextvars.ContextVar):
        yield NamesCell("", lambda: {path: found.get(None)})
    if (names := names_of(found)) is not None:
        yield NamesCell(f"{path}.", names, found)
    if isinstance(found, types.FunctionType):
        yield from _function_cells(found)


def _function_cells(function: types.FunctionType) -> Iterator[Cell]:
    if function.__closure__:
        yield NamesCell("", functools.partial(closed_over, function), _cells_of(function))
    if not is_user_code(function.__module__):
        return
    known, names = function.__globals__, global_names(function.__code__)
    if vars(function):
        yield NamesCell(f"{function.__name__}.", lambda: vars(function), function)
    read = [name for name in names if name in known and not isinstance(known[name], types.ModuleType)]
    if read:
        yield NamesCell("", lambda: {name: known.get(name) for name in read}, known)
    for path, module in modules_of(known, names).items():
        yield NamesCell(f"{path}.", functools.partial(read_of_module, module, names), module)
    if names & {"environ", "getenv"}:
        yield DictCell("os.environ", os.environ._data)  # type: ignore[attr-defined]


def _cells_of(function: types.FunctionType) -> dict[str, types.CellType]:
    return dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
