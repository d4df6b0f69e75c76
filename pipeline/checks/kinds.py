"""What an object behind a dataset is, as far as threads and processes are concerned."""

from __future__ import annotations

import contextvars
import functools
import io
import logging
import multiprocessing.connection
import random
import socket
import sys
import sysconfig
import threading
import types
import weakref
from collections.abc import Iterator
from typing import Any, Literal

import numpy
import torch

Kind = Literal["leaf", "bound", "ordered", "state"]
"""``bound``: a handle that only the thread that opened it may use, as far as anybody knows. ``ordered``: what
is read in turn, by one thread. ``leaf``: nothing that could matter. ``state``: to be looked into."""

_LEAVES: tuple[Any, ...] = (
    type(None), bool, int, float, complex, str, bytes, range, slice, types.CodeType,
    types.GetSetDescriptorType, types.MemberDescriptorType, property, torch.dtype,
    torch.device, torch.Size, torch.layout, torch.memory_format, numpy.generic, numpy.dtype,
    logging.Logger, logging.Handler, logging.Filterer, threading.Event, threading.Condition,
    threading.Thread, staticmethod, classmethod,
)  # fmt: skip
_LEAF_MODULES = (
    "_abc", "_thread", "abc", "asyncio", "concurrent", "datetime", "decimal", "enum", "fractions",
    "importlib", "logging", "multiprocessing.synchronize", "multiprocessing.context", "pathlib", "pyarrow",
    "re", "tqdm", "pipeline.testing", "typing", "uuid", "warnings", "zoneinfo", "polars",
)  # fmt: skip
GENERATORS = (
    numpy.random.Generator, numpy.random.RandomState, numpy.random.BitGenerator, random.Random,
    torch.Generator,
)  # fmt: skip
_CONNECTION: Any = vars(multiprocessing.connection)["_ConnectionBase"]
FILES: tuple[type, ...] = (io.IOBase, socket.socket, _CONNECTION)
_STATES = (
    torch.Tensor, numpy.ndarray, type, types.FunctionType, types.MethodType, weakref.ref,
    contextvars.ContextVar,
)  # fmt: skip
_LIBRARIES = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
_OPAQUE: dict[type, bool] = {}  # types without attributes: whether they refuse to be pickled


def kind_of(found: Any) -> Kind:
    """Say what an object is.

    Raises nothing, and changes nothing but what pickling an object without attributes may change.
    """
    kind = type(found)
    if kind in weakref.ProxyTypes and not _is_alive(found):
        return "leaf"
    if isinstance(found, types.BuiltinFunctionType):  # perhaps a method of something, such as rng.random
        owner = found.__self__
        return "leaf" if owner is None or kind_of(owner) == "leaf" else "state"
    if _is_process_wide(found):
        return "leaf"
    if isinstance(found, types.ModuleType):
        return "state" if is_user_code(found.__name__) else "leaf"
    if isinstance(found, threading.local):
        return "state"
    if hasattr(kind, "run_until_complete"):  # an event loop, which two threads cannot run
        return "bound"
    module = found.__module__ if isinstance(found, type) else kind.__module__  # a class may be made by abc
    is_of_leaf = any(f"{module}.".startswith(f"{each}.") for each in _LEAF_MODULES)
    if (isinstance(found, _LEAVES) or is_of_leaf) and not is_user_code(module):
        return "leaf"
    if isinstance(found, (*GENERATORS, *FILES)):
        return "ordered"
    if isinstance(found, _STATES):
        return "state"
    if isinstance(found, Iterator):
        return "ordered"
    if hasattr(found, "__dict__") or isinstance(found, (list, tuple, dict, set, frozenset)):
        return "state"
    return "bound" if _refuses_pickle(found) else "state"


def _is_alive(proxy: Any) -> bool:
    try:
        return proxy.__class__ is not None
    except ReferenceError:
        return False


def is_user_code(module: str | None) -> bool:
    """Say whether a module is the user's own, and not the standard library's or an installed one."""
    if not module or module.split(".")[0] in ("pipeline", "builtins"):
        return False
    found = sys.modules.get(module)
    if found is None:  # a file that was run by its path; a type of C may call itself anything
        return module.split(".")[0] not in sys.modules
    file = getattr(found, "__file__", None)
    if file is None:
        return module == "__main__"
    return not file.startswith(_LIBRARIES)


def pickles_itself(found: Any) -> bool:
    """Say whether an object of a library's says itself how it is pickled: what is in it is its own affair."""
    kind = type(found)
    if is_user_code(kind.__module__) or isinstance(found, (torch.nn.Module, torch.Tensor, numpy.ndarray)):
        return False
    names = ("__getstate__", "__reduce__", "__reduce_ex__")
    return any(getattr(kind, name, None) is not getattr(object, name, None) for name in names)


def _is_process_wide(found: Any) -> bool:
    """Say whether every program has this object: it is watched elsewhere, or harmless."""
    return any(found is each for each in _process_wide())


def _process_wide() -> tuple[Any, ...]:
    return (
        sys.stdin, sys.stdout, sys.stderr, sys.__stdin__, sys.__stdout__, sys.__stderr__,
        getattr(random, "_inst", None), numpy.random.mtrand._rand, torch.default_generator,
    )  # fmt: skip


def _refuses_pickle(found: Any) -> bool:
    """Say whether an object without attributes is one that cannot be pickled, as a database's connection."""
    kind = type(found)
    harmless = (functools._lru_cache_wrapper, types.CellType, types.MappingProxyType, *_VIEWS)
    if isinstance(found, harmless) or hasattr(found, "__slots__"):
        return False
    if kind not in _OPAQUE:
        try:
            found.__reduce_ex__(4)
            _OPAQUE[kind] = False
        except Exception:
            _OPAQUE[kind] = True
    return _OPAQUE[kind]
