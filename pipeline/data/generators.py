"""The process-global generators of Python, NumPy and torch: watch, seed, put back.

Watching must be cheap, since it is done for every batch: `random.getstate()` costs 11 µs and
`numpy.random.get_state()` 40 µs, reading the same 2,500 bytes where they lie 0.7 µs. NumPy publishes
the address. CPython does not, so the layout assumed here is compared with `getstate()` once, and
where it does not agree (another interpreter, a changed structure) `getstate()` is what is used.
"""

from __future__ import annotations

import ctypes
import random
import struct
import sys
from collections.abc import Container, Iterable
from typing import Any, Protocol

import numpy.random
import torch

_MT19937_BYTES = 4 * 624 + 4  # the words of the state and the position in it


class GlobalGenerator(Protocol):
    """One process-global generator."""

    name: str

    def fingerprint(self) -> bytes:
        """Return bytes that differ once a number has been drawn."""

    def state(self) -> Any:
        """Return what `restore` takes."""

    def restore(self, state: Any) -> None:
        """Put the generator back."""

    def seed(self, seed: int) -> None:
        """Seed it; `seed` has 63 bits."""


class PythonGenerator:
    """The generator behind the functions of `random`."""

    name = "random"

    def __init__(self) -> None:
        self._address = _python_state_address()

    def fingerprint(self) -> bytes:
        if self._address is None:
            return repr(random.getstate()).encode()
        # The second number of a pair that `gauss` makes is kept outside of the words.
        kept: Any = random._inst.gauss_next  # type: ignore[attr-defined]
        return ctypes.string_at(self._address, _MT19937_BYTES) + repr(kept).encode()

    def state(self) -> Any:
        return random.getstate()

    def restore(self, state: Any) -> None:
        random.setstate(state)

    def seed(self, seed: int) -> None:
        random.seed(seed)


class NumpyGenerator:
    """The legacy generator behind the functions of `numpy.random`."""

    name = "numpy.random"

    def fingerprint(self) -> bytes:
        legacy = numpy.random.mtrand._rand
        generator = legacy._bit_generator
        if type(generator).__name__ != "MT19937":
            return repr(legacy.get_state(legacy=False)).encode()
        return ctypes.string_at(generator.ctypes.state_address, _MT19937_BYTES)

    def state(self) -> Any:
        return numpy.random.get_state()

    def restore(self, state: Any) -> None:
        numpy.random.set_state(state)

    def seed(self, seed: int) -> None:
        numpy.random.seed([seed & 0xFFFFFFFF, seed >> 32])


class TorchGenerator:
    """torch's default generator for the CPU, from which dropout draws too."""

    name = "torch"

    def fingerprint(self) -> bytes:
        state = torch.default_generator.get_state()
        return ctypes.string_at(state.data_ptr(), state.numel())

    def state(self) -> Any:
        return torch.default_generator.get_state()

    def restore(self, state: Any) -> None:
        torch.default_generator.set_state(state)

    def seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)


class Watch:
    """Tells which of some global generators were drawn from, and puts them back.

    Runs on:
        The thread that fetches. torch's generator serves the model as well, so it may be watched
        on the loop thread alone; the other two are hardly ever drawn from outside a dataset.
    """

    def __init__(self, generators: Iterable[GlobalGenerator]) -> None:
        self._generators = tuple(generators)
        self._before: dict[str, tuple[bytes, Any]] = {}

    def start(self, drawn: Container[GlobalGenerator] = ()) -> None:
        """Remember where each generator stands.

        Args:
            drawn: Generators known to be drawn from. Their states are taken anew each time: NumPy
                keeps the second number of a gaussian pair where no fingerprint sees it.
        """
        for generator in self._generators:
            fingerprint = generator.fingerprint()
            known = self._before.get(generator.name)
            # A state costs far more than a fingerprint.
            if known is None or known[0] != fingerprint or generator in drawn:
                self._before[generator.name] = (fingerprint, generator.state())

    def moved(self) -> list[GlobalGenerator]:
        """Return the generators drawn from since `start`."""
        return [each for each in self._generators if each.fingerprint() != self._before[each.name][0]]

    def forget(self, names: Container[str]) -> None:
        """Watch these no longer."""
        self._generators = tuple(each for each in self._generators if each.name not in names)

    def restore(self, generators: Iterable[GlobalGenerator]) -> None:
        """Put these back to where they stood at `start`."""
        for generator in generators:
            generator.restore(self._before[generator.name][1])


def global_generators() -> list[GlobalGenerator]:
    """Return the generators that a dataset could draw from."""
    return [_TORCH, _PYTHON, _NUMPY]


def _python_state_address() -> int | None:
    """Return where CPython keeps the words of `random`'s generator, or None if that is not sure."""
    instance = getattr(random, "_inst", None)
    if sys.implementation.name != "cpython" or not isinstance(instance, random.Random):
        return None
    offset = object.__basicsize__
    if offset + _MT19937_BYTES > random.Random.__mro__[1].__basicsize__:
        return None
    *words, position = instance.getstate()[1]
    expected = struct.pack("=i624I", position, *words)
    address = id(instance) + offset
    return address if ctypes.string_at(address, _MT19937_BYTES) == expected else None


_TORCH, _PYTHON, _NUMPY = TorchGenerator(), PythonGenerator(), NumpyGenerator()
