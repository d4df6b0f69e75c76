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


def _datetime(value: datetime.datetime) -> str | None:
    return value.isoformat() if isinstance(value.tzinfo, (datetime.timezone, type(None))) else None


# Each type's name in a file, what stands for a value of it (None: it cannot be held), how to make it again.
_KINDS: dict[type, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    datetime.datetime: ("datetime", _datetime, datetime.datetime.fromisoformat),
    datetime.date: ("date", datetime.date.isoformat, datetime.date.fromisoformat),
    datetime.time: ("time", datetime.time.isoformat, datetime.time.fromisoformat),
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
    return _MAKERS[packed["$"]](packed["value"] if "value" in packed else packed["base64"])


def is_array(value: Any) -> bool:
    """Say whether a value is an array, or a number of NumPy's."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic))


def pack_array(value: Any, part: Callable[[torch.Tensor], dict[str, Any]]) -> Any:
    """Return what stands for an array, its values as a tensor; for a plain number Python's own.

    None if it cannot be held: an array of objects, or one with a mask.
    """
    numpy: Any = sys.modules["numpy"]
    if isinstance(value, numpy.generic) and not isinstance(value, numpy.longdouble):
        plain = value.item()
        if isinstance(plain, (bool, int, float, complex, str, bytes)) and value.dtype.kind not in "mM":
            return plain
    array = numpy.array(value, copy=True, order="C")
    if array.dtype.hasobject or isinstance(value, numpy.ma.MaskedArray):
        return None
    kind = "scalar" if isinstance(value, numpy.generic) else "array"
    try:
        tensor = torch.from_numpy(array)
    except (TypeError, ValueError):  # texts, times, records, another byte order: kept as bytes
        flat = numpy.frombuffer(array.tobytes(), dtype=numpy.uint8).copy()
        description = repr(numpy.lib.format.dtype_to_descr(array.dtype))
        return {
            **part(torch.from_numpy(flat)),
            "$": kind,
            "numpy": description,
            "numpy_shape": list(array.shape),
        }
    return {**part(tensor), "$": kind}


def unpack_array(packed: dict[str, Any], tensor: torch.Tensor) -> Any:
    """Return what `pack_array` was given."""
    array: Any = tensor.numpy()
    if "numpy" in packed:
        numpy: Any = sys.modules["numpy"]
        dtype = numpy.lib.format.descr_to_dtype(ast.literal_eval(packed["numpy"]))
        array = numpy.frombuffer(array.tobytes(), dtype=dtype).reshape(packed["numpy_shape"]).copy()
    return array[()] if packed["$"] == "scalar" else array
