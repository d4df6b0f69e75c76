"""A batch is the user's object: the one rule by which it is reached into.

1. A tensor, of whatever class, is a tensor.
2. What has ``to(device)`` and holds a tensor is moved by that, and otherwise left alone: a tokenizer's
   ``BatchEncoding``, a ``PackedSequence``, a ``TensorDict``, a graph batch, a class of the user's own.
3. Containers are reached into: lists, tuples, dicts, deques and what is derived from them, dataclasses and
   the like, namespaces, and whatever calls itself a mapping or a sequence. One is rebuilt if something in it
   has changed, and only then; it keeps its type and its attributes.
4. Anything else (arrays, texts, None, objects that nobody knows) is handed over as it is.

On the CPU nothing changes, so the very object arrives. What a type is, is found out once.

Who only looks (`tensors_in`) looks further: into the attributes of any object, up to a bound.
"""

from __future__ import annotations

import array
import copy
import functools
import inspect
import operator
import types
from collections import UserDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from pipeline.batch.record import Batch

Visit: TypeAlias = Callable[[Any], Any]
Move: TypeAlias = Callable[[Any, torch.device, bool], Any]
"""Calls an object's ``to`` with a device, and with ``non_blocking`` if that is wanted and accepted."""

Rebuild: TypeAlias = Callable[[Any, Visit, bool], Any]
"""Returns a container with its parts visited; itself if that changed none, unless it is to be new."""

MAX_REACHED = 1000


def map_batch(
    batch: Batch,
    on_tensor: Callable[[torch.Tensor], Any],
    on_object: Callable[[Any, Move], Any] | None = None,
    on_other: Visit | None = None,
    *,
    rebuilds_all: bool = False,
) -> Batch:
    """Return the batch with every tensor replaced, at any depth; itself if nothing in it has changed.

    Args:
        batch: Of whatever the user makes.
        on_tensor: Returns what takes a tensor's place.
        on_object: Given what has a ``to``, and how that is called; returns what takes its place, or
            ``NotImplemented`` to have it reached into if it is a container. Unless told, that is done.
        on_other: Given whatever is neither, but for texts and numbers; returns what takes its place.
        rebuilds_all: Whether a container that can be written to is replaced though nothing in it has changed.
    """
    return _Walk(on_tensor, on_object, on_other, rebuilds_all).visit(batch)


def map_tensors(batch: Batch, function: Callable[[torch.Tensor], Any]) -> Batch:
    """Return the batch with `function` applied to every tensor in its containers; nothing else is asked."""
    return _Walk(function, None, None, False).visit(batch)


class _Walk:
    """One way through a batch; a class, since a function that calls itself is garbage for the collector."""

    __slots__ = ("_made", "_on_object", "_on_other", "_on_tensor", "_rebuilds_all")

    def __init__(
        self,
        on_tensor: Callable[[torch.Tensor], Any],
        on_object: Callable[[Any, Move], Any] | None,
        on_other: Visit | None,
        rebuilds_all: bool,
    ) -> None:
        self._on_tensor, self._on_object, self._on_other = on_tensor, on_object, on_other
        self._rebuilds_all = rebuilds_all
        self._made: dict[int, tuple[Any, Any]] = {}  # with what it was, or its id would be used again

    def visit(self, found: Any) -> Any:
        kind = _kind_of(type(found))  # type: ignore[arg-type]  # classes are hashable
        if kind.is_tensor:
            return self._on_tensor(found)
        if kind.is_plain:
            return found
        if kind.move is not None and self._on_object is not None:
            made = self._on_object(found, kind.move)
            if made is not NotImplemented:
                return made
        if kind.rebuild is None:
            return found if self._on_other is None else self._on_other(found)
        if id(found) not in self._made:
            self._made[id(found)] = found, found  # it may hold itself
            self._made[id(found)] = found, kind.rebuild(found, self.visit, self._rebuilds_all)
        return self._made[id(found)][1]


class _Kind(NamedTuple):
    """What is done with the objects of a class."""

    is_tensor: bool = False
    is_plain: bool = False
    move: Move | None = None
    rebuild: Rebuild | None = None


PLAIN = (str, bytes, int, float, complex, type(None), type, range, torch.dtype, torch.device, torch.Size)


@functools.lru_cache(maxsize=1024)
def _kind_of(kind: type) -> _Kind:
    if issubclass(kind, torch.Tensor):
        return _Kind(is_tensor=True)
    if issubclass(kind, PLAIN):
        return _Kind(is_plain=True)
    return _Kind(move=_mover(kind), rebuild=_rebuilder(kind))


def _rebuilder(kind: type) -> Rebuild | None:
    if issubclass(kind, (bytearray, memoryview, array.array)):
        return None  # bytes, which call themselves a sequence
    for base, rebuild in _REBUILDERS:
        if issubclass(kind, base):
            return rebuild
    is_record = hasattr(kind, "__dataclass_fields__") or hasattr(kind, "__attrs_attrs__")
    return _rebuilt_object if is_record else None


def _rebuilt_list(found: list[Any], visit: Visit, is_new: bool) -> list[Any]:
    parts = [visit(each) for each in found]
    if not is_new and all(map(operator.is_, parts, found)):
        return found
    if type(found) is list:
        return parts
    made = copy.copy(found)
    list.__setitem__(made, slice(None), parts)
    return made


def _rebuilt_tuple(found: tuple[Any, ...], visit: Visit, is_new: bool) -> tuple[Any, ...]:
    parts, kind = [visit(each) for each in found], type(found)
    if all(map(operator.is_, parts, found)):
        return found
    if hasattr(kind, "n_sequence_fields"):  # what torch.max and the like return
        return kind(parts)
    made = tuple.__new__(kind, parts)  # a named tuple, too: its own __new__ may compute
    if attributes := getattr(found, "__dict__", None):
        vars(made).update(attributes)
    return made


def _rebuilt_dict(found: Any, visit: Visit, is_new: bool) -> Any:
    parts, changed = {}, {}
    for key, value in found.items():
        parts[key] = part = visit(value)
        if part is not value:
            changed[key] = part
    if not changed and not is_new:
        return found
    if type(found) is dict:
        return parts
    try:
        made = copy.copy(found)
        if getattr(found, "__dict__", None) is found:  # its keys are its attributes
            made.__dict__ = made
        for key, part in changed.items():
            made[key] = part  # the class's own way, which may keep an attribute of that name
    except Exception:  # one that cannot be written to, or copied
        return type(found)(parts)
    return made


def _rebuilt_deque(found: deque[Any], visit: Visit, is_new: bool) -> deque[Any]:
    parts = [visit(each) for each in found]
    if not is_new and all(map(operator.is_, parts, found)):
        return found
    made = copy.copy(found)
    for place, part in enumerate(parts):
        made[place] = part
    return made


def _rebuilt_object(found: Any, visit: Visit, is_new: bool) -> Any:
    """Rebuild an object by its attributes, those that a constructor would not take among them."""
    attributes = attributes_of(found)
    changed = {name: part for name, value in attributes.items() if (part := visit(value)) is not value}
    if not changed and not (is_new and attributes):
        return found
    made, own = copy.copy(found), getattr(found, "__dict__", {})
    for name, part in changed.items():
        if name in own:
            vars(made)[name] = part
        else:
            object.__setattr__(made, name, part)  # a slot, of a frozen class perhaps
    for name in own:
        if isinstance(getattr(type(found), name, None), functools.cached_property):
            vars(made).pop(name, None)  # what was computed of the old ones
    return made


def _rebuilt_mapping(found: Mapping[Any, Any], visit: Visit, is_new: bool) -> Any:
    if attributes_of(found):
        return _rebuilt_object(found, visit, is_new)
    values = dict(found)
    parts = _rebuilt_dict(values, visit, is_new)
    return found if parts is values else type(found)(parts)  # type: ignore[call-arg]


_REBUILDERS: tuple[tuple[type, Rebuild], ...] = (
    (list, _rebuilt_list),
    (tuple, _rebuilt_tuple),
    (dict, _rebuilt_dict),
    (UserDict, _rebuilt_dict),
    (deque, _rebuilt_deque),
    (Mapping, _rebuilt_mapping),
    (Sequence, _rebuilt_object),
    (types.SimpleNamespace, _rebuilt_object),
)


def attributes_of(found: Any) -> dict[str, Any]:
    """Return an object's own attributes, those in slots among them."""
    own = getattr(found, "__dict__", None)
    attributes = dict(own) if isinstance(own, dict) else {}
    for base in type(found).__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if not name.startswith("__") and isinstance(base.__dict__.get(name), types.MemberDescriptorType):
                try:
                    attributes[name] = base.__dict__[name].__get__(found)
                except AttributeError:
                    continue  # empty
    return attributes


_OTHERWISE = {"unit", "units", "dtype", "format", "fmt", "tz", "timezone", "path", "file", "other"}


def _mover(kind: type) -> Move | None:
    """Return how a class's ``to`` is called with a device; None if it has none, or one of another meaning."""
    to, found_at = getattr(kind, "to", None), inspect.getattr_static(kind, "to", None)
    if not callable(to) or found_at is None:
        return None
    try:
        parameters = list(inspect.signature(to).parameters.values())
    except (TypeError, ValueError):
        return lambda found, device, is_queued: found.to(device)
    if not isinstance(found_at, staticmethod | classmethod):
        parameters = parameters[1:]
    names = {each.name for each in parameters}
    first = next((each for each in parameters if each.kind is not each.VAR_KEYWORD), None)
    if first is None or first.name in _OTHERWISE:
        return None
    if first.kind is first.KEYWORD_ONLY:
        return (lambda found, device, is_queued: found.to(device=device)) if "device" in names else None
    if "non_blocking" in names:
        return lambda found, device, is_queued: (
            found.to(device, non_blocking=True) if is_queued else found.to(device)
        )
    return lambda found, device, is_queued: found.to(device)


def tensors_in(batch: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a batch in its order, each once, those in objects' attributes among them."""
    return (each for each in reachable(batch) if isinstance(each, torch.Tensor))


def reachable(found: Any, limit: int = MAX_REACHED) -> Iterator[Any]:
    """Yield an object and what is reachable from it by items and attributes; `limit` objects at most."""
    stack, seen = [found], set[int]()
    while stack and len(seen) < limit:
        each = stack.pop()
        if id(each) in seen or isinstance(each, PLAIN):
            continue
        seen.add(id(each))
        yield each
        if not isinstance(each, _OPAQUE):
            stack += reversed(list(_parts(each)))


_OPAQUE = (torch.Tensor, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def _parts(found: Any) -> Iterable[Any]:
    items: list[Any] = []
    if isinstance(found, dict):
        items = list(dict.values(found))
    elif isinstance(found, (list, tuple, set, frozenset, deque)):
        items = list(found)
    attributes = attributes_of(found)
    if not attributes and isinstance(found, Mapping):
        items = list(found.values())
    return [*items, *attributes.values()]
