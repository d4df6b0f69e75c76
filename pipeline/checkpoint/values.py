"""What Python and NumPy have and JSON has not, as texts and numbers. Making it again runs nobody's code."""

from __future__ import annotations

import ast
import base64
import datetime
import decimal
import fractions
import io
import pathlib
import sys
import uuid
from collections.abc import Callable
from typing import Any

import torch

from pipeline.checkpoint.tensors import dtype_named

_BIG = 1 << 1000  # Python refuses to write much larger numbers in decimal


def _time(value: datetime.datetime | datetime.time) -> str | None:
    return value.isoformat() if isinstance(value.tzinfo, (datetime.timezone, type(None))) else None


# Each type's name in a file, what stands for a value of it (None: it cannot be held), how to make it again.
_KINDS: dict[type, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    datetime.datetime: ("datetime", _time, datetime.datetime.fromisoformat),
    datetime.date: ("date", datetime.date.isoformat, datetime.date.fromisoformat),
    datetime.time: ("time", _time, datetime.time.fromisoformat),
    datetime.timedelta: (
        "timedelta",
        lambda value: [value.days, value.seconds, value.microseconds],
        lambda parts: datetime.timedelta(*parts),
    ),
    decimal.Decimal: ("decimal", str, decimal.Decimal),
    fractions.Fraction: ("fraction", str, fractions.Fraction),
    uuid.UUID: ("uuid", str, uuid.UUID),
    type(pathlib.Path()): ("path", str, pathlib.Path),
    range: ("range", lambda value: [value.start, value.stop, value.step], lambda parts: range(*parts)),
    bytes: ("bytes", lambda value: base64.b64encode(value).decode(), base64.b64decode),
    bytearray: (
        "bytearray",
        lambda value: base64.b64encode(value).decode(),
        lambda text: bytearray(base64.b64decode(text)),
    ),
    io.BytesIO: (
        "bytesio",
        lambda value: base64.b64encode(value.getvalue()).decode(),
        lambda text: io.BytesIO(base64.b64decode(text)),
    ),
    torch.dtype: ("dtype", lambda value: str(value).removeprefix("torch."), dtype_named),
    torch.device: ("device", str, torch.device),
    torch.Size: ("size", list, torch.Size),
}
_MAKERS = {kind: make for kind, _, make in _KINDS.values()}


def pack_value(value: Any) -> dict[str, Any] | None:
    """Return what stands for a value; None if it is of no type that is known here."""
    if type(value) is int and abs(value) >= _BIG:
        return {"$": "int", "value": hex(value)}
    if type(value) not in _KINDS:
        return None
    kind, pack, _ = _KINDS[type(value)]
    packed = pack(value)
    return None if packed is None else {"$": kind, "value": packed}


def unpack_value(packed: dict[str, Any]) -> Any:
    """Return what `pack_value` was given."""
    if packed["$"] == "int":
        return int(packed["value"], 16)
    if packed["$"] == "number of numpy":
        numpy: Any = sys.modules["numpy"]
        return numpy.frombuffer(base64.b64decode(packed["value"]), _described(packed["dtype"])).copy()[0]
    return _MAKERS[packed["$"]](packed["value"] if "value" in packed else packed["base64"])


def is_array(value: Any) -> bool:
    """Say whether a value is an array, or a number of NumPy's."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic))


def pack_array(value: Any, part: Callable[[torch.Tensor], dict[str, Any]]) -> Any:
    """Return what stands for an array, its values as a tensor; for a number its bytes.

    None if it cannot be held: an array of objects, or one with a mask.
    """
    numpy: Any = sys.modules["numpy"]
    if isinstance(value, numpy.bytes_):
        return pack_value(value.item())
    if isinstance(value, numpy.generic) and not value.dtype.hasobject:  # its sums are not those of Python's
        data = base64.b64encode(value.tobytes()).decode()
        return {"$": "number of numpy", "dtype": _description(value.dtype), "value": data}
    array = numpy.array(value, copy=True, order="C")
    if array.dtype.hasobject or isinstance(value, numpy.ma.MaskedArray):
        return None
    try:
        tensor = torch.from_numpy(array)
    except (TypeError, ValueError):  # texts, times, records, another byte order: kept as bytes
        flat = numpy.frombuffer(array.tobytes(), dtype=numpy.uint8).copy()
        more = {"numpy": _description(array.dtype), "numpy_shape": list(array.shape)}
        return {**part(torch.from_numpy(flat)), "$": "array", **more}
    return {**part(tensor), "$": "array"}


def unpack_array(packed: dict[str, Any], tensor: torch.Tensor) -> Any:
    """Return what `pack_array` was given."""
    array: Any = tensor.numpy()
    if "numpy" in packed:
        numpy: Any = sys.modules["numpy"]
        array = numpy.frombuffer(array.tobytes(), dtype=_described(packed["numpy"]))
        array = array.reshape(packed["numpy_shape"]).copy()
    return array[()] if packed["$"] == "scalar" else array


def _description(dtype: Any) -> str:
    return repr(sys.modules["numpy"].lib.format.dtype_to_descr(dtype))


def _described(text: str) -> Any:
    return sys.modules["numpy"].lib.format.descr_to_dtype(ast.literal_eval(text))
