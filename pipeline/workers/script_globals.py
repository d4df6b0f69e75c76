"""Globals that a dataset's code reads: as they are in the script's process, wherever batches are made.

A worker process imports the modules of a dataset, and there finds what importing gives: not what the script
has set since (``SCALE = 2.0`` under its guard, ``mylib.ROOT = args.root``), and another table if it is drawn
at import. So the names that the code of the dataset, of what it holds and of `collate_fn` refers to are
looked up here (`code_walk`), with class attributes among them, and those that pickle are carried along. There
they are compared with what importing gave, and set where they differ.

Looked at is the user's code only: not that of packages that are installed, whose flags `process_settings`
knows. What does not pickle (an open file, a connection) stays as importing gave it, and is refused if that is
something of another type. What is large is compared by a fingerprint, and refused if it differs: nobody
copies hundreds of megabytes in the middle of a training. What the code itself sets or fills (a cache, a
connection opened when it is first needed) is neither compared nor refused.
"""

from __future__ import annotations

import io
import pickle
import types
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from pipeline.errors import ConfigError
from pipeline.workers.code_walk import PLAIN, CodeWalk, Place
from pipeline.workers.packing import is_plain

# Of one global, pickled: small objects take some 0.1 s a megabyte, the numbers of an array no time.
MAX_CARRIED_BYTES, MAX_ARRAY_BYTES = 1 << 20, 16 << 20
_SAMPLED = 256  # numbers of a large one that are compared
_MISSING = "nothing of this name"


@dataclass(frozen=True)
class ScriptGlobals:
    """What a dataset's code reads from its modules.

    Args:
        carried: Values, pickled each by itself.
        checked: What is only compared: a fingerprint of the value.
        plain: Numbers, texts and flags, to see later whether they have changed.

    Runs on:
        Loop thread; a capture takes some milliseconds at most.
    """

    carried: dict[Place, bytes]
    checked: dict[Place, tuple[Any, ...]]
    plain: dict[Place, Any]

    @classmethod
    def capture(cls, *roots: Any) -> ScriptGlobals:
        """Look at what some objects' code refers to."""
        found, walk = cls({}, {}, {}), CodeWalk(roots)
        for place, value in walk.places.items():
            data = _pickled(value)
            if data is not None:
                found.carried[place] = data
            is_by_name = isinstance(value, types.FunctionType)  # and another may have its name
            if (data is None or is_by_name) and not walk.is_made_by_code(place, value):
                found.checked[place] = fingerprint(value)
            if isinstance(value, PLAIN) and not walk.is_made_by_code(place, value):
                found.plain[place] = value
        return found

    @property
    def has_changed(self) -> bool:
        """Whether a number, a text or a flag is another one than it was."""
        now = ((_now(place), value) for place, value in self.plain.items())
        return any(here is not value and here != value for here, value in now)  # NaN is not itself

    def apply(self) -> None:
        """Set what differs from what importing gave.

        Raises:
            ConfigError: If something differs that is not carried; it names it.

        Runs on:
            The nursery.
        """
        for place, data in self.carried.items():
            wanted, here = pickle.loads(data), _now(place)
            # What is equal stays the same object, which other names may have too.
            if here is _MISSING or _pickled(here) != _pickled(wanted):
                setattr(place.holder(), place.name, wanted)
        for place, look in self.checked.items():
            if (here := fingerprint(_now(place))) != look:
                raise ConfigError(_describe(place, look, here))


def fingerprint(value: Any) -> tuple[Any, ...]:
    """Return what is compared of something that is not carried: its type, and some of what is in it."""
    kind = (_name_of(type(value)),)
    if value is _MISSING:
        return (_MISSING,)
    if isinstance(value, torch.nn.Module):
        return *kind, *(fingerprint(each) for each in value.state_dict().values())
    if isinstance(value, torch.Tensor) and (value.layout is not torch.strided or value.device.type != "cpu"):
        return *kind, str(value.dtype), tuple(value.shape)
    if isinstance(value, torch.Tensor):
        return *kind, str(value.dtype), tuple(value.shape), _sample(value.detach().reshape(-1))
    if isinstance(value, numpy.ndarray):
        return *kind, str(value.dtype), value.shape, _sample(value.reshape(-1))
    if isinstance(value, (list, tuple, str, bytes)):
        return *kind, len(value), _sample(value)
    if isinstance(value, (dict, set, frozenset)):
        return *kind, len(value)
    if isinstance(value, types.FunctionType):
        code = value.__code__
        return *kind, _name_of(value), code.co_name, code.co_filename.rpartition("/")[2]
    if isinstance(value, type):
        return *kind, _name_of(value)
    return kind


def _sample(values: Any) -> str:
    """Return some of the values, in words: numbers and texts as they are, of others the type."""
    found = values[:: max(len(values) // _SAMPLED, 1)]
    found = found.tolist() if isinstance(found, (torch.Tensor, numpy.ndarray)) else found
    return repr([each if isinstance(each, PLAIN) else _name_of(type(each)) for each in found])


class _Pickler(pickle.Pickler):
    def reducer_override(self, found: Any) -> Any:
        if isinstance(found, torch.Tensor) and found.device.type != "cpu":
            raise TypeError("a process that forks must not touch a device")
        # torch's own way writes addresses, so that equal tensors would be different bytes.
        if type(found) is torch.Tensor and is_plain(found):
            flat = found.contiguous().reshape(-1).view(torch.uint8)
            return _tensor, (flat.numpy().tobytes(), found.dtype, tuple(found.shape))
        return NotImplemented


def _tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def _pickled(value: Any) -> bytes | None:
    """Return something pickled, or None if it cannot be or is large."""
    is_array = isinstance(value, (torch.Tensor, numpy.ndarray))
    if is_array and value.nbytes > MAX_ARRAY_BYTES:
        return None
    file = _Limited(MAX_ARRAY_BYTES + MAX_CARRIED_BYTES if is_array else MAX_CARRIED_BYTES)
    try:
        _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
    except Exception:
        return None
    return file.getvalue()


class _Limited(io.BytesIO):
    def __init__(self, max_bytes: int) -> None:
        super().__init__()
        self._max_bytes = max_bytes

    def write(self, data: Any) -> int:
        if self.tell() + memoryview(data).nbytes > self._max_bytes:
            raise OverflowError
        return super().write(data)


def _now(place: Place) -> Any:
    try:
        return getattr(place.holder(), place.name)
    except (AttributeError, ImportError):
        return _MISSING


def _name_of(found: Any) -> str:
    module = getattr(found, "__module__", None) or ""
    return f"{module.replace('__mp_main__', '__main__')}.{getattr(found, '__qualname__', '')}"


def _describe(place: Place, wanted: tuple[Any, ...], here: tuple[Any, ...]) -> str:
    kind = wanted[0].removeprefix("builtins.")
    if wanted[0] == here[0] == "builtins.function":
        found = f"is {wanted[2]}() here, and where a process imports {place.module} it is {here[2]}()"
    elif wanted[0] == here[0]:
        found = f"is another {kind} where a process imports {place.module}, and too large to be carried there"
    else:
        found = (
            f"is a {kind} here, which cannot be pickled or is too large, and where a process imports "
            f"{place.module} it is {here[0].removeprefix('builtins.')}"
        )
    return (
        f"placement=process makes batches in another process, but the dataset's code reads {place}, which "
        f"{found}. Make it an attribute of the dataset, set it where the module is imported, or set "
        "placement=thread."
    )
