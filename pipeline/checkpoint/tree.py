"""State as plain data: one JSON text, and the tensors beside it by name. Reading it runs no code."""

from __future__ import annotations

import collections
import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

import torch

from pipeline.checkpoint.tensors import from_bytes, is_dense, problem_of, put_together, take_apart, to_bytes
from pipeline.checkpoint.values import is_array, pack_array, pack_value, unpack_array, unpack_value
from pipeline.errors import CheckpointError

_KIND = "$"  # marks the JSON objects that stand for something JSON does not have
_MAX_DEPTH = 100
_SMALL = 1 << 62
_FACTORIES = {each.__name__: each for each in (int, float, bool, str, bytes, list, tuple, dict, set)}


class UnsaveableError(CheckpointError):
    """Something in a state cannot be held.

    Args:
        path: Where it stands, such as ``callbacks.callbacks.0.state.x``.
        reason: What it is, and what to do.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path} {reason}")
        self.path, self.reason = path, reason


def pack(value: Any, tensors: dict[str, torch.Tensor], path: str = "", depth: int = 0) -> Any:
    """Return a value as what JSON can hold, its tensors put aside.

    Args:
        value: Tensors of any layout and dtype, NumPy arrays, numbers, texts, bytes, times, paths, None, and
            lists, tuples, sets, deques and dicts of them.
        tensors: Receives each tensor under its path, such as ``optimizer.state.0.exp_avg``; live ones,
            which are not copied. One that is not dense is there in its parts.
        path: Where the value stands.
        depth: In how many containers.

    Raises:
        UnsaveableError: Naming the path of anything else.
    """
    if value is None or isinstance(value, (bool, str)) or _is_small(value):
        return value
    if isinstance(value, torch.Tensor):
        return _pack_tensor(value, tensors, path)
    if depth > _MAX_DEPTH:
        raise UnsaveableError(path[:100] + "…", f"is in {_MAX_DEPTH} containers: does it contain itself?")
    if is_array(value):
        packed = pack_array(value, lambda tensor: _pack_tensor(tensor, tensors, path))
        return _refuse(value, path) if packed is None else packed
    if (packed := pack_value(value)) is not None:
        return packed
    if isinstance(value, numbers.Number):
        return _refuse(value, path) if (packed := _pack_number(value)) is None else packed
    if isinstance(value, Mapping):
        return _pack_mapping(value, tensors, path, depth)
    if isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        items = [pack(each, tensors, f"{path}.{place}", depth + 1) for place, each in enumerate(value)]
        return (
            items
            if isinstance(value, list)
            else {_KIND: _sequence_kind(value), "items": items, **_more_of(value)}
        )
    if isinstance(value, (bytes, bytearray)):
        return pack_value(bytes(value))
    return _refuse(value, path)


def _is_small(value: Any) -> bool:
    """Say whether a value is a number that JSON has, as most are."""
    return (type(value) is int and -_SMALL < value < _SMALL) or (
        type(value) is float and math.isfinite(value)
    )


def unpack(packed: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return what `pack` was given."""
    if isinstance(packed, list):
        return [unpack(each, tensors) for each in packed]
    if not isinstance(packed, dict):
        return packed
    kind = packed.get(_KIND)
    if kind is None:
        return {name: unpack(each, tensors) for name, each in packed.items()}
    if kind in ("tensor", "array", "scalar"):
        tensor = _strided(from_bytes(tensors[packed["name"]], packed), packed.get("stride"))
        return tensor if kind == "tensor" else unpack_array(packed, tensor)
    if kind in ("sparse", "quantized", "nested", "lazy"):
        return put_together(packed, lambda part: unpack(part, tensors))
    if kind == "number":
        return complex(packed["value"]) if packed["is_complex"] else float(packed["value"])
    if kind not in _MAKERS:
        return unpack_value(packed)
    items = [unpack(each, tensors) for each in packed["items"]]
    return _MAKERS[kind](items, packed)


_MAKERS: dict[str, Any] = {
    "tuple": lambda items, packed: tuple(items),
    "named": lambda items, packed: collections.namedtuple(packed["name"], packed["fields"])(*items),
    "set": lambda items, packed: set(items),
    "frozenset": lambda items, packed: frozenset(items),
    "deque": lambda items, packed: collections.deque(items, packed["maxlen"]),
    "dict": lambda items, packed: dict(items),
    "ordered": lambda items, packed: collections.OrderedDict(items),
    "default": lambda items, packed: collections.defaultdict(_FACTORIES.get(packed["factory"]), items),
    "counter": lambda items, packed: collections.Counter(dict(items)),
}


def _pack_tensor(value: torch.Tensor, tensors: dict[str, torch.Tensor], path: str) -> dict[str, Any]:
    if not is_dense(value) and (problem := problem_of(value)):
        raise UnsaveableError(
            path, f"{problem}: a checkpoint cannot hold it. Let its state have plain tensors."
        )
    value = value if torch.nn.parameter.is_lazy(value) else value.detach()
    if not is_dense(value):
        parts = take_apart(value, lambda part, name: _pack_tensor(part, tensors, f"{path}.{name}"))
        if parts is not None:
            return parts
    while path in tensors:  # keys may have dots, or differ in their type alone
        path += "'"
    stride = None if value.is_contiguous() or not _fills_memory(value) else list(value.stride())
    tensors[path], more = to_bytes(value)
    packed: dict[str, Any] = {_KIND: "tensor", "name": path, **more}
    if stride is not None:  # a file holds values in order; sums over them go by their place in memory
        packed["stride"] = stride
    return packed


def _pack_number(value: Any) -> Any:
    """Return a number as JSON has it; None if it is of a kind that is not known."""
    if isinstance(value, numbers.Integral):
        return pack_value(int(value)) or int(value)
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    if isinstance(value, (float, complex)):
        return {_KIND: "number", "value": repr(value), "is_complex": isinstance(value, complex)}
    return None


def _pack_mapping(value: Mapping[Any, Any], tensors: dict[str, torch.Tensor], path: str, depth: int) -> Any:
    prefix, kind, more = f"{path}." if path else "", "dict", {}
    if isinstance(value, collections.Counter):
        kind = "counter"
    elif isinstance(value, collections.OrderedDict):
        kind = "ordered"
    elif isinstance(value, collections.defaultdict):
        kind, more = "default", {"factory": _factory_of(value, path)}
    elif all(isinstance(key, str) for key in value) and _KIND not in value:
        return {key: pack(each, tensors, f"{prefix}{key}", depth + 1) for key, each in value.items()}
    items = [
        {_KIND: "tuple", "items": [_pack_key(key, path), pack(each, tensors, f"{prefix}{key}", depth + 1)]}
        for key, each in value.items()
    ]
    return {_KIND: kind, "items": items, **more}


def _pack_key(key: Any, path: str) -> Any:
    if isinstance(key, str) or _is_small(key):
        return key
    inside: dict[str, torch.Tensor] = {}
    packed = pack(key, inside, f"a key of {path}")
    if inside:
        raise UnsaveableError(
            path, "has a tensor as a key, which is found again by nobody. Use a number or a text."
        )
    return packed


def _factory_of(value: collections.defaultdict[Any, Any], path: str) -> str | None:
    factory: Any = value.default_factory
    if factory is None or _FACTORIES.get(getattr(factory, "__name__", "")) is factory:
        return None if factory is None else str(factory.__name__)
    raise UnsaveableError(
        path,
        f"is a defaultdict whose default is {factory!r}, which a checkpoint cannot hold without running code "
        "when it is read. Let its state_dict return dict(…) of it.",
    )


def _refuse(value: Any, path: str) -> Any:
    kind = type(value).__name__
    if callable(getattr(value, "state_dict", None)):
        advice = "return its own state_dict() instead"
    elif isinstance(value, torch.Generator):
        advice = "return its get_state() instead"
    elif dataclasses.is_dataclass(value):
        advice = "return dataclasses.asdict() of it instead"
    elif callable(value):
        advice = "leave it out, since whoever loads the state has it already"
    else:
        advice = "return tensors, numbers, texts, and lists, tuples and dicts of them"
    raise UnsaveableError(
        path,
        f"is a {kind}, which a checkpoint cannot hold without running code when it is read. Let its "
        f"state_dict {advice}.",
    )


def _sequence_kind(value: Any) -> str:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return "named"
    kinds = {tuple: "tuple", frozenset: "frozenset", collections.deque: "deque"}
    return next((kind for each, kind in kinds.items() if isinstance(value, each)), "set")


def _more_of(value: Any) -> dict[str, Any]:
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # not its class, but its names
        return {"name": type(value).__name__, "fields": list(value._fields)}
    return {"maxlen": value.maxlen} if isinstance(value, collections.deque) else {}


def _fills_memory(tensor: torch.Tensor) -> bool:
    """Say whether a tensor's elements are all that lies between its first and its last, each once."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def _strided(tensor: torch.Tensor, stride: list[int] | None) -> torch.Tensor:
    if stride is None:
        return tensor
    try:
        like = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype)
    except RuntimeError as error:
        raise CheckpointError(f"a stride of {stride} does not fit a shape of {list(tensor.shape)}") from error
    return like.copy_(tensor)
