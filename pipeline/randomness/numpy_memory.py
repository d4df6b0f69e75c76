"""NumPy's legacy generator where it lies in memory: to look at and to put back in 1 µs, not 40."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import numpy.random

_WORDS_BYTES = 4 * 624 + 4  # the words of the state, then the position in it
_LOOK_BYTES = 4 * 9  # the position and the eight words before it
_STORED_BYTES = 16  # whether a normal number is in store, and which: they are made in pairs


class NumpyMemory:
    """The state of a `RandomState` that has NumPy's usual bit generator.

    Args:
        legacy: Kept alive by its owner.
        stored_at: Where in the object it keeps the second normal number of a pair.

    Source:
        `BitGenerator.ctypes.state_address`, which NumPy documents; for MT19937 the words and the position.
        NumPy's `aug_bitgen_t` (has_gauss, gauss), which lies in the object.
    """

    def __init__(self, legacy: Any, stored_at: int) -> None:
        self.generator = legacy._bit_generator
        address = self.generator.ctypes.state_address
        self._words = (ctypes.c_char * _WORDS_BYTES).from_address(address)
        self._end = (ctypes.c_char * _LOOK_BYTES).from_address(address + _WORDS_BYTES - _LOOK_BYTES)
        self._stored = (ctypes.c_char * _STORED_BYTES).from_address(id(legacy) + stored_at)

    @staticmethod
    def of(legacy: Any) -> NumpyMemory | None:
        """Return the memory of a generator; None if it is of another kind, or nobody knows where it lies."""
        if _STORED_AT is None or type(legacy) is not numpy.random.RandomState:
            return None
        is_usual = type(legacy._bit_generator).__name__ == "MT19937"
        return NumpyMemory(legacy, _STORED_AT) if is_usual else None

    def look(self) -> tuple[bytes, bytes]:
        """Return what differs once a number has been drawn."""
        return self._end.raw, self._stored.raw

    def copy(self) -> bytes:
        """Return all of the state."""
        return self._words.raw + self._stored.raw

    def put_back(self, state: bytes) -> None:
        """Go back to where it stood when `copy` was called."""
        self._words.raw, self._stored.raw = state[:_WORDS_BYTES], state[_WORDS_BYTES:]


def _find_stored() -> int | None:
    """Return where in a `RandomState` its stored normal number lies; None if that does not prove itself."""
    own = numpy.random.RandomState(1)
    own.standard_normal()
    if type(own._bit_generator).__name__ != "MT19937":
        return None
    number = struct.pack("d", own.get_state(legacy=False)["gauss"])
    at = ctypes.string_at(id(own), numpy.random.RandomState.__basicsize__).find(number) - 8
    return at if at >= 0 and _proves_itself(NumpyMemory(own, at), own) else None


def _proves_itself(memory: NumpyMemory, own: Any) -> bool:
    """Say whether each draw is seen, and what is put back draws the same again."""
    looks, draws = [memory.look()], (own.standard_normal, own.standard_normal, own.random_sample, own.rand)
    for _ in range(100):  # more than the words last for
        state = memory.copy()
        first = [draw() for draw in draws]
        looks.append(memory.look())
        memory.put_back(state)
        if [draw() for draw in draws] != first or memory.look() != looks[-1]:
            return False
        own.standard_normal()
        looks.append(memory.look())
    return len(set(looks)) == len(looks)


_STORED_AT = _find_stored()
