"""What one object leads to: its parts, each with its path, and the globals that its code names."""

from __future__ import annotations

import contextvars
import functools
import itertools
import sys
import threading
import types
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch.utils.data import ConcatDataset, Subset

from pipeline.checks.cells import sampled
from pipeline.checks.kinds import FILES, is_user_code, kind_of

Found = tuple[str, Any]
# `training` counts: a callback may switch a transform that is a module.
_TORCHS_OWN = frozenset(vars(torch.nn.Module())) - {"training"}
_MODULE_FIELDS = ("_parameters", "_buffers", "_modules")  # what a torch module has of its own
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OF_CLASS = (types.FunctionType, types.MemberDescriptorType, property, classmethod, staticmethod)


def parts_of(path: str, found: Any) -> Iterator[Found]:
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
    elif isinstance(found, weakref.ref):
        yield f"{path}()", found()
    elif isinstance(found, contextvars.ContextVar):
        yield f"{path}.get()", found.get(None)
    elif isinstance(found, Mapping) and hasattr(found, "values"):
        if isinstance(found, dict):
            yield from _of_dict(path, found)
    elif isinstance(found, (list, tuple, deque)) or _holds_objects(found):
        yield from ((f"{path}[…]", each) for each in sampled(found))
    elif isinstance(found, types.GeneratorType):
        if found.gi_frame is not None:
            yield from ((f"{path}.{name}", value) for name, value in found.gi_frame.f_locals.items())
    elif isinstance(found, type):
        yield from _of_class(path, found)
    yield from _of_attributes(path, found)


def _of_attributes(path: str, found: Any) -> Iterator[Found]:
    if (names := names_of(found)) is not None:
        attributes = list(names().items())
        if isinstance(found, threading.local):  # a file of each thread's own is shared by none
            attributes = [each for each in attributes if not is_handle(each[1])]
        yield from ((f"{path}.{name}", value) for name, value in attributes)
    if isinstance(found, torch.nn.Module):
        yield from ((path, vars(found).get(name)) for name in _MODULE_FIELDS)
        yield from ((f"{path}.{name}", hooks) for name in _HOOKS if (hooks := vars(found).get(name)))
    if not isinstance(found, (type, types.FunctionType)) and is_user_code(type(found).__module__):
        yield type(found).__name__, type(found)


def is_handle(found: Any) -> bool:
    """Say whether this is open: a file, a socket, a connection."""
    return isinstance(found, FILES) or kind_of(found) == "bound"


def _holds_objects(found: Any) -> bool:
    return isinstance(found, numpy.ndarray) and found.dtype == object


def names_of(found: Any) -> Callable[[], Mapping[str, Any]] | None:
    """Return what reads the attributes of an object; None if it has none that count."""
    if isinstance(found, (type, types.FunctionType, torch.Tensor, numpy.memmap)):
        return None
    if isinstance(found, torch.nn.Module):
        return functools.partial(_of_module, found)
    if isinstance(found, types.ModuleType):
        return functools.partial(_globals_of, found)
    if isinstance(found, numpy.random.SeedSequence):
        return lambda: found.state
    attributes = getattr(found, "__dict__", None)
    if isinstance(attributes, dict) and hasattr(attributes.get("_mgr"), "arrays"):  # a table of pandas
        return lambda: {str(number): each for number, each in enumerate(found._mgr.arrays)}
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
    return {name: value for name, value in list(vars(module).items()) if name not in _TORCHS_OWN}


def _globals_of(module: types.ModuleType) -> dict[str, Any]:
    """Return what a module of the user's own holds, if an object has the module itself."""
    names = [name for name in list(vars(module)) if name[:2] != "__"]
    return read_of_module(module, frozenset(names))


def read_of_module(module: types.ModuleType, names: frozenset[str]) -> dict[str, Any]:
    """Return the globals that a function may read of a module of the user's own."""
    found = {name: vars(module)[name] for name in names if name in vars(module)}
    return {name: value for name, value in found.items() if not isinstance(value, types.ModuleType)}


def modules_of(known: Mapping[str, Any], names: frozenset[str]) -> dict[str, types.ModuleType]:
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


def elements_at(path: str, found: Any, indices: Sequence[int]) -> Iterator[Found]:
    """Yield the elements of a list of samples, or of a dict of them, that belong to some indices."""
    if isinstance(found, dict):
        yield from ((f"{path}[{index}]", found[index]) for index in indices if index in found)
    elif isinstance(found, (list, tuple)):
        yield from ((f"{path}[{index}]", found[index]) for index in indices if index < len(found))


def inner_indices(found: Any, indices: Sequence[int]) -> list[int]:
    """Return the numbers that some samples have in the datasets that another one is made of."""
    if isinstance(found, Subset):
        return [int(found.indices[index]) for index in indices if index < len(found.indices)]
    if not isinstance(found, ConcatDataset):
        return []
    ends = found.cumulative_sizes
    return [index - [0, *ends][bisect_right(ends, index)] for index in indices if index < ends[-1]]


def _of_dict(path: str, found: dict[Any, Any]) -> Iterator[Found]:
    keys = list(found)
    keys = keys if len(keys) <= 64 else [*itertools.islice(keys, 32), keys[-1]]
    yield from ((f"{path}[{key!r:.20}]", found.get(key)) for key in keys)


def _of_class(path: str, kind: type) -> Iterator[Found]:
    for each in kind.__mro__:
        if is_user_code(each.__module__):
            for name, value in list(vars(each).items()):
                inner = _inside_class(value)
                if not name.startswith("__") or isinstance(inner, types.FunctionType):
                    yield f"{each.__name__}.{name}", inner


def _inside_class(value: Any) -> Any:
    """Return the function behind a static method, a class method, a property; anything else as it is."""
    if isinstance(value, (staticmethod, classmethod)):
        return value.__func__
    return value.fget if isinstance(value, property) else value


def class_attributes(kind: type) -> dict[str, Any]:
    """Return the values that a class of the user's own holds, its functions left out."""
    found = {name: value for name, value in list(vars(kind).items()) if name[:2] != "__"}
    return {name: value for name, value in found.items() if not isinstance(value, _OF_CLASS)}


def _of_function(path: str, function: types.FunctionType) -> Iterator[Found]:
    if function.__closure__:
        yield from closed_over(function).items()
    yield from ((f"{path}'s default", each) for each in function.__defaults__ or ())
    yield from ((f"{path}'s default", each) for each in (function.__kwdefaults__ or {}).values())
    yield from ((f"{path}.{name}", each) for name, each in list(vars(function).items()))
    if not is_user_code(function.__module__):
        return
    names = global_names(function.__code__)
    for name in names:
        if not isinstance(value := function.__globals__.get(name), types.ModuleType):
            yield name, value
    for path, module in modules_of(function.__globals__, names).items():
        yield from ((f"{path}.{name}", each) for name, each in read_of_module(module, names).items())


def closed_over(function: types.FunctionType) -> dict[str, Any]:
    """Return what a function closes over, by name."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # it is empty yet
            continue
    return found


@functools.lru_cache(maxsize=4096)
def global_names(code: types.CodeType) -> frozenset[str]:
    """Return the names that some code reads, that of functions inside it too."""
    inner = [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return frozenset(code.co_names).union(*map(global_names, inner))
