"""Which globals does the code of some objects read? Found by their names, without running anything.

From an object to its class, its attributes and what they hold; from a class to its methods and its own
attributes; from a function to what its closure holds and to the names in its code, and from those to further
functions, classes and modules. Code of installed packages is not looked at.
"""

from __future__ import annotations

import collections
import dis
import functools
import importlib
import itertools
import sys
import types
from collections.abc import Iterator
from enum import Enum
from typing import Any, NamedTuple

import numpy
import torch

from pipeline.user_code import is_users

MAX_OBJECTS, MAX_ITEMS = 10_000, 100  # that are looked at; of one container
_FILLING = {"add", "append", "appendleft", "extend", "setdefault", "update"}  # methods of containers
PLAIN = (bool, int, float, complex, str, bytes, type(None))
_TABLES = (torch.Tensor, numpy.ndarray, list, dict)


class Place(NamedTuple):
    """Where a global is: its module, the class in it (``""`` for none), and its name."""

    module: str
    owner: str
    name: str

    def __str__(self) -> str:
        return ".".join(filter(None, self))

    def holder(self) -> Any:
        """Return the module or class, imported if it must be."""
        found: Any = importlib.import_module(self.module)
        return functools.reduce(getattr, filter(None, self.owner.split(".")), found)

    def holds(self, owner: Any) -> bool:
        """Say whether its holder is this object."""
        try:
            return self.holder() is owner
        except (AttributeError, ImportError):  # it was made in a function
            return False


class CodeWalk:
    """Goes from objects to their code, and from code to the globals that it names.

    Args:
        roots: Where it begins.

    Attributes:
        places: What was found, with its values: of the user's own modules and classes.
    """

    def __init__(self, roots: tuple[Any, ...]) -> None:
        self.places: dict[Place, Any] = {}
        self._seen: dict[int, Any] = {}  # kept, or an address would be used again
        self._seen_modules = set[tuple[str, frozenset[str]]]()
        self._set: set[str] | None = None
        self._filled = set[str]()
        self._queue = collections.deque(roots)
        while self._queue and len(self._seen) < MAX_OBJECTS:
            found = self._queue.popleft()
            if id(found) not in self._seen and not isinstance(found, (*PLAIN, torch.Tensor, numpy.ndarray)):
                self._seen[id(found)] = found
                self._visit(found)

    def is_made_by_code(self, place: Place, value: Any) -> bool:
        """Say whether the code may set a global, or fill it: then each process makes its own as it goes."""
        if self._set is None:
            functions = [each for each in self._seen.values() if isinstance(each, types.FunctionType)]
            self._set = {name for each in functions for name in _set_names(each.__code__)}
            self._filled = {name for each in functions for name in _filled_names(each.__code__)}
        is_container = isinstance(value, (dict, list, set, collections.deque))
        return place.name in self._set or (is_container and place.name in self._filled)

    def _visit(self, found: Any) -> None:
        if isinstance(found, types.FunctionType):
            self._visit_function(found)
        elif isinstance(found, type):
            self._visit_class(found)
        elif isinstance(found, types.MethodType):
            self._queue.extend((found.__self__, found.__func__))
        elif isinstance(found, functools.partial):
            self._queue.extend((found.func, found.args, found.keywords))
        elif not isinstance(found, types.ModuleType):
            if isinstance(found, dict):
                self._queue.extend(itertools.islice(found.values(), MAX_ITEMS))
            elif isinstance(found, (list, tuple, set, frozenset, collections.deque)):
                self._queue.extend(itertools.islice(found, MAX_ITEMS))
            self._queue.append(type(found))
            self._queue.extend(itertools.islice(_attributes(found), MAX_ITEMS))

    def _visit_class(self, found: type) -> None:
        if not is_users(found.__module__):
            self._queue.extend(each for each in found.__mro__[1:] if is_users(each.__module__))
            return
        self._queue.extend(found.__mro__[1:])
        is_named = "<locals>" not in found.__qualname__ and not issubclass(found, Enum)
        for name, value in vars(found).items():
            inner = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
            if isinstance(value, types.FunctionType) and is_named:
                self._note(Place(found.__module__, found.__qualname__, name), value)  # it may be replaced
            elif isinstance(inner, (types.FunctionType, type)):
                self._queue.append(inner)
            elif _is_descriptor(value):
                self._queue.append(value)  # such as a cached property
            elif is_named and not (name.startswith("__") or name == "_abc_impl"):
                self._note(Place(found.__module__, found.__qualname__, name), value)

    def _visit_function(self, found: types.FunctionType) -> None:
        self._queue.extend(_contents(found.__closure__ or ()))
        if (inner := getattr(found, "__wrapped__", None)) is not None:
            self._queue.append(inner)
        module = found.__globals__.get("__name__", "")
        if is_users(module):
            self._visit_own(module, found)
            for names in _codes(found.__code__):
                self._visit_names(module, found.__globals__, names)

    def _visit_own(self, module: str, found: types.FunctionType) -> None:
        """Note what a function itself holds: its attributes and its defaults."""
        own = {name: value for name, value in vars(found).items() if name != "__wrapped__"}
        own |= {name: getattr(found, name) for name in ("__defaults__", "__kwdefaults__")}
        for name, value in own.items():
            place = Place(module, found.__qualname__, name)
            if value is not None:
                self._queue.append(value)
                if place.holds(found):
                    self.places[place] = value

    def _visit_names(self, module: str, known: dict[str, Any], names: set[str]) -> None:
        package = known.get("__package__") or ""
        for name in names:
            if name in known:
                self._note_named(Place(module, "", name), known[name], names)
            for imported in (name, f"{package}.{name}"):
                if isinstance(found := sys.modules.get(imported), types.ModuleType):
                    self._visit_module(found, names)

    def _note_named(self, place: Place, value: Any, names: set[str]) -> None:
        if isinstance(value, types.ModuleType):
            self._visit_module(value, names)
        elif not (place.name.startswith("__") and place.name.endswith("__")):
            self._note(place, value)

    def _visit_module(self, found: types.ModuleType, names: set[str]) -> None:
        key = found.__name__, frozenset(names)
        if not is_users(found.__name__) or key in self._seen_modules:
            return
        self._seen_modules.add(key)
        for name in names & vars(found).keys():
            self._note_named(Place(found.__name__, "", name), vars(found)[name], names)

    def _note(self, place: Place, value: Any) -> None:
        self._queue.append(value)
        is_imported = _is_of_library(value) and value.__name__ == place.name
        if not isinstance(value, _LEFT_ALONE) and not is_imported:
            self.places[place] = value


def _is_of_library(value: Any) -> bool:
    """Say whether a global is a function or class of a package."""
    if not isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        return False
    return not is_users(getattr(value, "__module__", None) or "")


def _codes(code: types.CodeType) -> Iterator[set[str]]:
    """Yield the names in a function's code, and in that of those inside it."""
    yield {*code.co_names}
    for each in _inner(code):
        yield from _codes(each)


def _set_names(code: types.CodeType) -> set[str]:
    """Return the globals that a function sets."""
    found = {each.argval for each in dis.get_instructions(code) if each.opname == "STORE_GLOBAL"}
    return found.union(*map(_set_names, _inner(code)))


def _filled_names(code: types.CodeType) -> set[str]:
    """Return the names in a function that puts something into a container; which one is not known."""
    fills = _FILLING & {*code.co_names} or any(
        each.opname == "STORE_SUBSCR" for each in dis.get_instructions(code)
    )
    return ({*code.co_names} if fills else set[str]()).union(*map(_filled_names, _inner(code)))


def _inner(code: types.CodeType) -> list[types.CodeType]:
    return [each for each in code.co_consts if isinstance(each, types.CodeType)]


def _contents(cells: tuple[Any, ...]) -> Iterator[Any]:
    for cell in cells:
        try:
            yield cell.cell_contents
        except ValueError:  # nothing in it yet
            continue


def _attributes(found: Any) -> Iterator[Any]:
    attributes = getattr(found, "__dict__", None)
    if isinstance(attributes, dict):
        yield from [*attributes.values()]
    for kind in type(found).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            yield getattr(found, name, None)


def _is_descriptor(value: Any) -> bool:
    return hasattr(type(value), "__get__")


_LEFT_ALONE: tuple[Any, ...] = (types.ModuleType, property, classmethod, staticmethod)
