"""What is looked at to see that something has moved: one `Cell` for each object that can change.

A look must be cheap, since it is taken for every batch: identities, lengths and version counters, and the
bytes of what is small. Of what is large some elements are looked at, all over its length.
"""

from __future__ import annotations

import itertools
import operator
import random
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy
import torch

Change = Literal["", "grown", "moved"]
_SMALL = 64
_MAX_ELEMENTS, _MAX_BYTES = 100_000, 16 << 20  # looked at in full
_PLAIN = (bool, int, float, str, bytes, type(None))


class Cell:
    """One object that can change.

    Args:
        path: How it is reached, as a user would write it.
        found: The object.
    """

    __slots__ = ("found", "path")

    def __init__(self, path: str, found: Any) -> None:
        self.path, self.found = path, found

    def look(self) -> Any:
        """Return what it is now; the values in it are kept alive, so that no other takes their place."""
        raise NotImplementedError

    def look_in_full(self) -> Any:
        """Return all of what it is now, if it is not very large."""
        return self.look()

    def change(self, before: Any, after: Any) -> Change:
        """Say what lies between two looks of one sort."""
        return "" if before == after else "moved"

    def names(self, before: Any, after: Any) -> list[str]:
        """Name what has changed."""
        return [self.path]


class NamesCell(Cell):
    """Values by name: an object's attributes, a module's globals that are read, the cells of a closure.

    Args:
        path: How it is reached; a name goes behind it.
        read: Returns names and values.
        holder: What has them, if they can be set there: an object, or a dict.
    """

    __slots__ = ("_read",)

    def __init__(self, path: str, read: Callable[[], Mapping[str, Any]], holder: Any = None) -> None:
        super().__init__(path, holder)
        self._read = read

    def look(self) -> tuple[list[str], list[Any]]:
        values = self._read()
        return list(values), list(values.values())

    def change(self, before: Any, after: Any) -> Change:
        if len(before[1]) == len(after[1]) and all(map(operator.is_, before[1], after[1])):
            return ""
        return "moved" if self.changed(before, after) else ""

    def names(self, before: Any, after: Any) -> list[str]:
        return [f"{self.path}{name}" for name in self.changed(before, after)]

    def changed(self, before: Any, after: Any) -> list[str]:
        """Return the names behind which there is another value."""
        old, new = dict(zip(*before, strict=True)), dict(zip(*after, strict=True))
        names = [*old, *(name for name in new if name not in old)]
        return [
            name for name in names if name not in old or name not in new or not is_same(old[name], new[name])
        ]


class SequenceCell(Cell):
    """A list, a deque, or whatever has a length and elements."""

    def look(self) -> tuple[int, list[Any]]:
        return len(self.found), sampled(self.found)

    def look_in_full(self) -> tuple[int, list[Any]]:
        return (len(self.found), list(self.found)) if len(self.found) <= _MAX_ELEMENTS else self.look()

    def change(self, before: Any, after: Any) -> Change:
        return "" if before[0] == after[0] and are_same(before[1], after[1]) else "moved"


class DictCell(Cell):
    """A dict: one that only gets new keys has grown, as a cache does; one that gets numbers may count."""

    def look(self) -> tuple[int, list[Any], list[Any]]:
        if (length := len(self.found)) <= _SMALL:
            return self._all(length)
        keys = [*_first(self.found, _SMALL // 2), *_first(reversed(self.found), 1)]
        return self._settled(length, keys, [self.found.get(key) for key in keys])

    def look_in_full(self) -> tuple[int, list[Any], list[Any]]:
        return self.look() if (length := len(self.found)) > _MAX_ELEMENTS else self._all(length)

    def _all(self, length: int) -> tuple[int, list[Any], list[Any]]:
        return self._settled(length, list(self.found), list(self.found.values()))

    def _settled(self, length: int, keys: list[Any], values: list[Any]) -> tuple[int, list[Any], list[Any]]:
        if len(self.found) != length:
            raise RuntimeError("a thread has filled it meanwhile")
        return length, keys, values

    def change(self, before: Any, after: Any) -> Change:
        if before[0] == after[0]:
            return "" if before[1] == after[1] and are_same(before[2], after[2]) else "moved"
        is_whole = len(before[1]) == before[0] and len(after[1]) == after[0]
        count = before[0] if is_whole else min(before[0], _SMALL // 2)
        is_kept = before[1][:count] == after[1][:count] and are_same(before[2][:count], after[2][:count])
        is_counter = isinstance(after[2][-1] if after[2] else None, (bool, int, float))
        return "grown" if after[0] > before[0] and is_kept and not is_counter else "moved"

    def newest(self, count: int) -> list[Any]:
        """Return the values put in last."""
        return _first(reversed(self.found.values()), count)


class SetCell(Cell):
    """A set: one that only gets more has grown."""

    def look(self) -> tuple[int, frozenset[Any]]:
        return len(self.found), frozenset(self.found) if len(self.found) <= _SMALL else frozenset()

    def look_in_full(self) -> tuple[int, frozenset[Any]]:
        is_large = len(self.found) > _MAX_ELEMENTS
        return len(self.found), frozenset() if is_large else frozenset(self.found)

    def change(self, before: Any, after: Any) -> Change:
        if before == after:
            return ""
        return "grown" if after[0] > before[0] and before[1] <= after[1] else "moved"


class TensorCell(Cell):
    """A tensor: how often it was written to, where its memory lies, and some of its bytes on the host.

    A write through `data`, NumPy or another process counts no version.
    """

    __slots__ = ("_address", "_bytes")

    def __init__(self, path: str, found: torch.Tensor) -> None:
        super().__init__(path, found)
        self._address, self._bytes = 0, _no_bytes

    def look(self) -> Any:
        tensor = self.found
        if tensor.is_inference() or tensor.layout is not torch.strided or tensor.is_nested:
            return id(tensor)
        if tensor.device.type != "cpu" or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return tensor._version
        if tensor.data_ptr() != self._address:
            self._address, self._bytes = tensor.data_ptr(), _sampled_bytes(tensor)
        return tensor._version, self._address, self._bytes()

    def look_in_full(self) -> Any:
        is_read = self.found.device.type == "cpu" and self.found.nbytes <= _MAX_BYTES
        return self.look(), _checked(self.found) if is_read else 0


class ArrayCell(Cell):
    """An array that can be written to, by its address, shape and bytes."""

    def look(self) -> Any:
        array = self.found
        if not array.flags.writeable or array.dtype.hasobject:
            return array.shape
        flat = array.reshape(-1) if array.flags.c_contiguous else array.ravel()[: 1 << 16]
        some = flat if flat.nbytes <= 1024 else flat[:: max(1, flat.size // 32)]
        return array.shape, array.__array_interface__["data"][0], some.tobytes()

    def look_in_full(self) -> Any:
        array = self.found
        is_read = array.flags.writeable and array.flags.c_contiguous and not array.dtype.hasobject
        checked = checksum(array.reshape(-1).view("u1")) if is_read and 0 < array.nbytes <= _MAX_BYTES else 0
        return self.look(), checked


class BufferCell(Cell):
    """Bytes that can be written to: an array of Python's, of ctypes, a bytearray."""

    def look(self) -> int:
        return self._checked(1 << 16)

    def look_in_full(self) -> int:
        return self._checked(_MAX_BYTES)

    def _checked(self, most: int) -> int:
        return checksum(self.found) if memoryview(self.found).nbytes <= most else 0


class GeneratorCell(Cell):
    """A generator of random numbers that is the dataset's own."""

    def look(self) -> Any:
        generator = self.found
        if isinstance(generator, numpy.random.BitGenerator):
            return repr(generator.state)
        if isinstance(generator, torch.Generator):
            return bytes(generator.get_state().numpy())
        if isinstance(generator, numpy.random.Generator):
            return repr(generator.bit_generator.state)
        if isinstance(generator, numpy.random.RandomState):
            return repr(generator.get_state(legacy=False))
        return _state_of(generator)


class FileCell(Cell):
    """A file, by where it stands."""

    def look(self) -> Any:
        try:
            return self.found.tell()
        except Exception:  # it cannot tell, or is closed, or cannot say while it is iterated over
            return object()


def _state_of(generator: random.Random) -> Any:
    try:
        return generator.getstate()
    except NotImplementedError:  # SystemRandom
        return None


def checksum(memory: Any) -> int:
    """Return a checksum of some bytes; 0.3 ms a MB, the GIL released."""
    return zlib.crc32(memory)


def are_same(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Say whether two rows of values are the same, one by one."""
    return len(left) == len(right) and (all(map(operator.is_, left, right)) or all(map(is_same, left, right)))


def is_same(left: Any, right: Any) -> bool:
    """Say whether two values are one object, or plain and equal."""
    if left is right:
        return True
    return type(left) is type(right) and isinstance(left, _PLAIN) and left == right


def sampled(found: Iterable[Any]) -> list[Any]:
    """Return all elements of what is short, and some of what is long, the last one among them.

    Each of these calls holds the GIL: another thread may be changing it.
    """
    whole = found if isinstance(found, (list, tuple)) else list(found)
    length = len(whole)
    if length <= _SMALL:
        return list(whole)
    return [*whole[:: max(1, length // _SMALL)], *whole[-1:]]


def _sampled_bytes(tensor: torch.Tensor) -> Callable[[], bytes]:
    """Return what reads some bytes of a tensor's memory."""
    try:
        flat = tensor.detach().as_subclass(torch.Tensor).view(-1).view(torch.uint8).numpy()
    except (RuntimeError, TypeError):  # it is not contiguous, or of a type that has no bytes of its own
        return _no_bytes
    return (flat if flat.size <= 512 else flat[:: max(1, flat.size // 64)]).tobytes


def _checked(tensor: torch.Tensor) -> int:
    """Return a checksum of a tensor; 0 if its bytes cannot be read."""
    try:
        return checksum(tensor.detach().as_subclass(torch.Tensor).view(-1).view(torch.uint8).numpy())
    except (RuntimeError, TypeError):
        return 0


def _no_bytes() -> bytes:
    return b""


def _first(found: Iterable[Any], count: int) -> list[Any]:
    return list(itertools.islice(found, count))  # in one call, which holds the GIL
