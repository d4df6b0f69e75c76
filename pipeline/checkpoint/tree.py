"""State as plain data: one JSON text, and the tensors beside it by name. Reading it runs no code."""

from __future__ import annotations

import base64
import collections
import math
import numbers
import sys
from collections.abc import Mapping
from typing import Any

import torch

from pipeline.errors import CheckpointError

_KIND = "$"  # marks the JSON objects that stand for something JSON does not have


def pack(value: Any, tensors: dict[str, torch.Tensor], path: str = "") -> Any:
    """Return a value as what JSON can hold, its tensors put aside.

    Args:
        value: Tensors, NumPy arrays, numbers, texts, bytes, None, and lists, tuples and dicts of them.
        tensors: Receives each tensor under its path, such as ``optimizer.state.0.exp_avg``; live ones,
            which are not copied.
        path: Where the value stands.

    Raises:
        CheckpointError: Naming the path of anything else.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, torch.Tensor):
        return _pack_tensor(value, tensors, path)
    if isinstance(value, numbers.Number):
        return _pack_number(value, path)
    if isinstance(value, Mapping):
        return _pack_mapping(value, tensors, path)
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [pack(each, tensors, f"{path}.{place}") for place, each in enumerate(value)]
        return items if isinstance(value, list) else {_KIND: _sequence_kind(value), "items": items}
    if isinstance(value, (bytes, bytearray)):
        return {_KIND: "bytes", "base64": base64.b64encode(value).decode()}
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray) and value.dtype != object:
        packed = _pack_tensor(torch.from_numpy(value.copy()), tensors, path)
        return {**packed, _KIND: "array"}
    raise CheckpointError(
        f"{path} is a {type(value).__name__}, which a checkpoint cannot hold without running code when it is "
        "read. Let its state_dict return tensors, numbers, texts, and lists, tuples and dicts of them."
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
    if kind in ("tensor", "array"):
        tensor = _strided(tensors[packed["name"]], packed.get("stride"))
        return tensor if kind == "tensor" else tensor.numpy()
    if kind == "number":
        return complex(packed["value"]) if packed["is_complex"] else float(packed["value"])
    if kind == "bytes":
        return base64.b64decode(packed["base64"])
    items = [unpack(each, tensors) for each in packed["items"]]
    return _MAKERS[kind](items)


_MAKERS: dict[str, Any] = {
    "tuple": tuple,
    "set": set,
    "dict": dict,
    "counter": lambda items: collections.Counter(dict(items)),
}


def _pack_tensor(value: torch.Tensor, tensors: dict[str, torch.Tensor], path: str) -> dict[str, Any]:
    if value.layout is not torch.strided or value.is_quantized or hasattr(value, "to_local"):
        raise CheckpointError(
            f"{path} is a tensor of kind {type(value).__name__} ({value.layout}), which a \
checkpoint cannot hold yet. Let its state_dict return dense tensors."
        )
    value = value.detach()
    while path in tensors:  # keys may have dots, or differ in their type alone
        path += "'"
    tensors[path] = value
    packed: dict[str, Any] = {_KIND: "tensor", "name": path}
    if not value.is_contiguous():  # a file holds values in order; sums over them go by their place in memory
        packed["stride"] = list(value.stride())
    return packed


def _pack_number(value: Any, path: str) -> Any:
    if hasattr(value, "item"):
        value = value.item()  # NumPy's
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    if isinstance(value, (float, complex)):
        return {_KIND: "number", "value": repr(value), "is_complex": isinstance(value, complex)}
    raise CheckpointError(f"{path} is a {type(value).__name__}, which a checkpoint cannot hold. Use a float.")


def _pack_mapping(value: Mapping[Any, Any], tensors: dict[str, torch.Tensor], path: str) -> Any:
    prefix = f"{path}." if path else ""
    is_counter = isinstance(value, collections.Counter)
    if not is_counter and all(isinstance(key, str) for key in value) and _KIND not in value:
        return {key: pack(each, tensors, f"{prefix}{key}") for key, each in value.items()}
    items = [
        {_KIND: "tuple", "items": [pack(key, {}, path), pack(each, tensors, f"{prefix}{key}")]}
        for key, each in value.items()
    ]
    return {_KIND: "counter" if is_counter else "dict", "items": items}


def _sequence_kind(value: Any) -> str:
    return "tuple" if isinstance(value, tuple) else "set"


def _strided(tensor: torch.Tensor, stride: list[int] | None) -> torch.Tensor:
    if stride is None:
        return tensor
    try:
        like = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype)
    except RuntimeError as error:
        raise CheckpointError(f"a stride of {stride} does not fit a shape of {list(tensor.shape)}") from error
    return like.copy_(tensor)
