"""What can be reached from a dataset: every object behind it that could change, or be a handle.

Followed are attributes, containers (some elements of long ones), functions (their closures, defaults, and the
globals that their code names), classes of the user's own, partials and bound methods. Not followed are
modules of libraries, and what is further away than `MAX_DEPTH` or than `MAX_OBJECTS` allow.
"""

from __future__ import annotations

import array
import ctypes
import functools
import io
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    sampled,
)
from pipeline.checks.kinds import GENERATORS, is_user_code, kind_of, pickles_itself

MAX_DEPTH, MAX_OBJECTS = 12, 3000
_TORCHS_OWN = frozenset(vars(torch.nn.Module()))
_MODULE_FIELDS = ("_parameters", "_buffers", "_modules")  # what a torch module has of its own
_OF_CLASS = (types.FunctionType, types.MemberDescriptorType, property, classmethod, staticmethod)
_Found = tuple[str, Any]


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


def reach(roots: Iterable[_Found], indices: Sequence[int] = ()) -> Reached:
    """Look for everything behind some objects.

    Args:
        roots: By the name that a user has for them; what they are themselves does not count, so a dataset
            may be an iterator.
        indices: Elements of long lists that are looked at too: those of the samples that are made next.

    Runs on:
        Loop thread, while no other makes a batch. Takes some 5 µs an object.
    """
    found, seen = Reached(), set[int]()
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
        seen.add(id(each))
        if (depth and kind == "ordered") or _seeks(each):
            found.ordered[path] = each
        elif depth and kind == "bound" and not is_vouched_for:
            found.bound[path] = each
        if isinstance(each, torch.nn.Module):
            found.modules.append(each)
        found.cells.extend(_cells(path, each))
        is_vouched_for = pickles_itself(each)
        parts = [*_parts(path, each), *_at(path, each, indices)]
        waiting.extend((name, part, depth + 1, is_vouched_for) for name, part in parts)
    return found


def _seeks(found: Any) -> bool:
    """Say whether this is a function of the user's that moves in a file by its number."""
    is_own = isinstance(found, types.FunctionType) and is_user_code(found.__module__)
    return is_own and "lseek" in _global_names(found.__code__)


def _cells(path: str, found: Any) -> Iterator[Cell]:
    """Yield what is to be looked at of one object itself."""
    if isinstance(found, type):
        for kind in (each for each in found.__mro__ if is_user_code(each.__module__)):
            yield NamesCell(f"{kind.__name__}.", functools.partial(_class_attributes, kind))
        return
    if isinstance(found, torch.Tensor):
        yield TensorCell(path, found)
    elif isinstance(found, numpy.ndarray):
        yield ArrayCell(path, found)
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
    if (names := _names(found)) is not None:
        yield NamesCell(f"{path}.", names)
    if isinstance(found, types.FunctionType):
        yield from _function_cells(path, found)


def _names(found: Any) -> Any:
    """Return what reads the attributes of an object; None if it has none that count."""
    if isinstance(found, (type, types.FunctionType, torch.Tensor)):
        return None
    if isinstance(found, torch.nn.Module):
        return functools.partial(_of_module, found)
    if isinstance(found, numpy.memmap):
        return None
    if hasattr(type(found), "_mgr") or hasattr(found, "_mgr"):  # a table of pandas
        return lambda: {str(number): each for number, each in enumerate(found._mgr.arrays)}
    attributes = getattr(found, "__dict__", None)
    slots = [name for kind in type(found).__mro__ for name in _slots(kind)]
    if not slots:
        return (lambda: attributes) if isinstance(attributes, dict) else None
    return lambda: (attributes or {}) | {name: getattr(found, name) for name in slots if hasattr(found, name)}


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ()) if is_user_code(kind.__module__) else ()
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(
        f"_{kind.__name__.lstrip('_')}{each}" if each[:2] == "__" != each[-2:] else each for each in names
    )


def _of_module(module: torch.nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _TORCHS_OWN}


def _function_cells(path: str, function: types.FunctionType) -> Iterator[Cell]:
    if function.__closure__:
        yield NamesCell("", functools.partial(_closed_over, function))
    if is_user_code(function.__module__) and (names := _global_names(function.__code__)):
        known = function.__globals__
        read = [name for name in names if name in known and not isinstance(known[name], types.ModuleType)]
        if read:
            yield NamesCell("", lambda: {name: known.get(name) for name in read})
        for path, module in _modules(known, names).items():
            yield NamesCell(f"{path}.", functools.partial(_read_of_module, module, names))


def _read_of_module(module: types.ModuleType, names: frozenset[str]) -> dict[str, Any]:
    """Return the globals that a function may read of a module of the user's own."""
    found = {name: vars(module)[name] for name in names if name in vars(module)}
    return {name: value for name, value in found.items() if not isinstance(value, types.ModuleType)}


def _modules(known: Mapping[str, Any], names: frozenset[str]) -> dict[str, types.ModuleType]:
    """Return the user's own modules that a function may read: globals, imports in it, modules in those."""
    found: dict[str, types.ModuleType] = {}
    waiting = [(name, known.get(name, sys.modules.get(name))) for name in names]
    while waiting:
        path, module = waiting.pop()
        if (
            isinstance(module, types.ModuleType)
            and module not in found.values()
            and is_user_code(module.__name__)
        ):
            found[path] = module
            waiting += [(f"{path}.{name}", vars(module).get(name)) for name in names]
    return found


def _parts(path: str, found: Any) -> Iterator[_Found]:
    """Yield what one object leads to."""
    if isinstance(found, types.FunctionType):
        yield from _of_function(path, found)
    elif isinstance(found, types.BuiltinFunctionType):
        yield path, found.__self__
    elif isinstance(found, types.MethodType):
        yield path, found.__self__
        yield f"{path}.__func__", found.__func__
    elif isinstance(found, functools.partial):
        yield from (
            (f"{path}.func", found.func),
            (f"{path}.args", found.args),
            (f"{path}.keywords", found.keywords),
        )
    elif isinstance(found, functools._lru_cache_wrapper):
        yield f"{path}.__wrapped__", found.__wrapped__
    elif isinstance(found, types.MappingProxyType):
        yield path, dict(found)
    elif isinstance(found, Mapping) and hasattr(found, "values"):
        if isinstance(found, dict):
            yield from _of_dict(path, found)
    elif isinstance(found, (list, tuple, deque)):
        yield from ((f"{path}[…]", each) for each in sampled(found))
    elif isinstance(found, types.GeneratorType):
        if found.gi_frame is not None:
            yield from ((f"{path}.{name}", value) for name, value in found.gi_frame.f_locals.items())
    elif isinstance(found, type):
        yield from _of_class(path, found)
    if (names := _names(found)) is not None:
        yield from ((f"{path}.{name}", value) for name, value in list(names().items()))
        if isinstance(found, torch.nn.Module):
            yield from ((path, vars(found).get(name)) for name in _MODULE_FIELDS)
        if is_user_code(type(found).__module__):
            yield type(found).__name__, type(found)


def _at(path: str, found: Any, indices: Sequence[int]) -> Iterator[_Found]:
    """Yield the elements of a list of samples, or of a dict of them, that belong to some indices."""
    if isinstance(found, dict):
        yield from ((f"{path}[{index}]", found[index]) for index in indices if index in found)
    elif isinstance(found, (list, tuple)):
        yield from ((f"{path}[{index}]", found[index]) for index in indices if index < len(found))


def _of_dict(path: str, found: dict[Any, Any]) -> Iterator[_Found]:
    keys = list(found) if len(found) <= 64 else [*list(found)[:32], next(reversed(found))]
    yield from ((f"{path}[{key!r:.20}]", found.get(key)) for key in keys)


def _of_class(path: str, kind: type) -> Iterator[_Found]:
    for each in kind.__mro__:
        if is_user_code(each.__module__):
            for name, value in list(vars(each).items()):
                value = getattr(value, "__func__", value)  # a static method, a class method
                value = getattr(value, "fget", value)
                if not name.startswith("__") or isinstance(value, types.FunctionType):
                    yield f"{each.__name__}.{name}", value


def _class_attributes(kind: type) -> dict[str, Any]:
    """Return the values that a class of the user's own holds, its functions left out."""
    found = {name: value for name, value in vars(kind).items() if name[:2] != "__"}
    return {name: value for name, value in found.items() if not isinstance(value, _OF_CLASS)}


def _of_function(path: str, function: types.FunctionType) -> Iterator[_Found]:
    if function.__closure__:
        yield from _closed_over(function).items()
    yield from ((f"{path}'s default", each) for each in function.__defaults__ or ())
    yield from ((f"{path}'s default", each) for each in (function.__kwdefaults__ or {}).values())
    yield from ((f"{path}.{name}", each) for name, each in vars(function).items())
    if not is_user_code(function.__module__):
        return
    names = _global_names(function.__code__)
    for name in names:
        if not isinstance(value := function.__globals__.get(name), types.ModuleType):
            yield name, value
    for path, module in _modules(function.__globals__, names).items():
        yield from ((f"{path}.{name}", each) for name, each in _read_of_module(module, names).items())


def _closed_over(function: types.FunctionType) -> dict[str, Any]:
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # it is empty yet
            continue
    return found


@functools.lru_cache(maxsize=4096)
def _global_names(code: types.CodeType) -> frozenset[str]:
    """Return the names that some code reads, that of functions inside it too."""
    inner = [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return frozenset(code.co_names).union(*map(_global_names, inner))
