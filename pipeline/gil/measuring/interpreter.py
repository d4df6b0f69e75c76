"""Facts about the running interpreter that concern the GIL, and the address of the GIL itself.

How it is found: the GIL's structure begins ``[switch interval, last holder, locked]``, in every
CPython from 3.11 on. Two odd switch intervals are set in turn, and the interpreter's memory is
searched for each with our own thread state and ``locked == 1`` behind it. Only an address that
matches both times counts, and from 3.13 on only if the offsets that the interpreter publishes for
debuggers name it too.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.errors import GilAccountError
from pipeline.gil.measuring.process_memory import Memory

ODD_INTERVALS_US = (7919, 6007)
SEARCHED_BYTES = 1 << 20
HOLDER_OFFSET, LOCKED_OFFSET, SWITCHES_OFFSET, COND_OFFSET = 8, 16, 24, 32
COND_BYTES = 48
MUTEX_BYTES = {"x86_64": 40, "aarch64": 48}
DEBUG_COOKIE = b"xdebugpy"
_searching = threading.Lock()


@dataclass(frozen=True)
class Gil:
    """Where the GIL is.

    Args:
        address: Of its structure.
        interpreter: Address of the main interpreter's state.
        published: The offsets that the interpreter publishes, as words; empty before 3.13.
    """

    address: int
    interpreter: int
    published: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """From the interval to the last of its two condition variables and two mutexes."""
        return self.switch_cond_offset + self.switch_cond_offset - COND_OFFSET

    @property
    def switch_cond_offset(self) -> int:
        """Where its second condition variable begins."""
        return COND_OFFSET + COND_BYTES + MUTEX_BYTES[platform.machine()]


def is_gil_enabled() -> bool:
    """Return whether this interpreter has a GIL that is on; a free-threaded one may turn it on later."""
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())


@contextlib.contextmanager
def switch_interval(seconds: float) -> Iterator[None]:
    """Set the switch interval inside the block."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before_s + 0.25e-6)  # it is cut to whole microseconds: do not lose one


def thread_state() -> int:
    """Return the address of the calling thread's state."""
    return int(_api("PyThreadState_Get", ctypes.c_void_p)())


def find_gil(memory: Memory) -> Gil:
    """Search for the GIL of the main interpreter.

    Raises:
        GilAccountError: If it is not found, or not beyond doubt.

    Runs on:
        Any thread; holds the GIL for some milliseconds and sets the switch interval meanwhile.
    """
    if platform.machine() not in MUTEX_BYTES or struct.calcsize("P") != 8 or sys.byteorder != "little":
        raise GilAccountError(f"the sampler does not know the machine {platform.machine()}")
    runtime = ctypes.addressof(ctypes.c_char.in_dll(ctypes.pythonapi, "_PyRuntime"))
    interpreter = int(_api("PyInterpreterState_Main", ctypes.c_void_p)())
    with _searching:
        found = _search(memory, (runtime, interpreter))
    if len(found) != 1:
        raise GilAccountError(
            f"the GIL was found at {len(found)} addresses of {sys.implementation.name} "
            f"{platform.python_version()}, and must be at one"
        )
    gil = Gil(found.pop(), interpreter, _published(memory, runtime))
    if gil.published and gil.address + HOLDER_OFFSET - interpreter not in gil.published:
        raise GilAccountError("the GIL that was found is not the one that the interpreter publishes")
    return gil


def handoff_counter() -> Callable[[], int] | None:
    """Return a function that reads how often the GIL went to another thread; None if it cannot be found.

    Runs on:
        Any thread; a read takes some 0.05 µs.
    """
    address = _gil_address() if is_gil_enabled() else None
    if address is None:
        return None
    count = ctypes.c_ulong.from_address(address + SWITCHES_OFFSET)
    return lambda: count.value


@functools.cache
def _gil_address() -> int | None:
    try:
        fd = os.open("/proc/self/mem", os.O_RDONLY)
    except OSError:
        return None
    try:
        return find_gil(Memory(fd)).address
    except GilAccountError:
        return None
    finally:
        os.close(fd)


def _api(name: str, result: type) -> Callable[[], int]:
    function = getattr(ctypes.pythonapi, name)
    function.restype = result
    return function  # type: ignore[no-any-return]


def _search(memory: Memory, regions: tuple[int, ...]) -> set[int]:
    sizes = {region: len(memory.read(region, SEARCHED_BYTES)) for region in regions}  # what is mapped
    ours, found = thread_state(), None
    for interval_us in ODD_INTERVALS_US:
        with switch_interval(interval_us / 1e6):
            pattern = struct.pack("<QQi", interval_us, ours, 1)
            matches = {at for region, size in sizes.items() for at in _matches(region, size, pattern)}
        found = matches if found is None else found & matches
    return found or set()


def _matches(region: int, size: int, pattern: bytes) -> list[int]:
    # Not `Memory.read`: it would release the GIL for the read, and so clear `locked`.
    blob, found, at = ctypes.string_at(region, size), [], -1
    while (at := blob.find(pattern, at + 1)) >= 0:
        found.append(region + at)
    return found


def _published(memory: Memory, runtime: int) -> tuple[int, ...]:
    if memory.read(runtime, len(DEBUG_COOKIE)) != DEBUG_COOKIE:
        return ()
    return tuple(memory.words(runtime + len(DEBUG_COOKIE), 64))
