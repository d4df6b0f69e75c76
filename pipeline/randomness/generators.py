"""The process-global generators of Python, NumPy and torch: watch, seed, put back.

Watching must be cheap, since it is done for every batch: `random.getstate()` costs 11 µs and
`numpy.random.get_state()` 40 µs, torch's 4 µs, to look where the state lies 0.3 µs. NumPy publishes
the address. CPython and torch do not, so the layout assumed here is compared with the public state once, and
where it does not agree (another interpreter, a changed structure) the public state is what is used.

It is enough to look at the position, which each draw moves, and some words, all of which change when it
comes round again or the generator is seeded.
"""

from __future__ import annotations

import ctypes
import random
import struct
import sys
from collections.abc import Container, Hashable, Iterable
from typing import Any, Protocol

import numpy.random
import torch

from pipeline.randomness.numpy_memory import NumpyMemory

_MT19937_BYTES = 4 * 624 + 4  # the words of the state and the position in it
_LOOK_BYTES = 4 * 9  # the position and the eight words beside it
_Look = ctypes.c_char * _LOOK_BYTES
_TORCH_STATE = struct.Struct("=QiiQ8Q")  # seed, left, whether it is seeded, next, words
_TORCH_SEARCHED_BYTES = 512
_Stored = ctypes.c_char * 28  # a float and a double, and whether they are there


class GlobalGenerator(Protocol):
    """One process-global generator."""

    name: str

    def fingerprint(self) -> Hashable:
        """Return what differs once a number has been drawn."""

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
        address = _python_state_address()
        self._look = None if address is None else _Look.from_address(address)  # the position comes first

    def fingerprint(self) -> Hashable:
        if self._look is None:
            return random.getstate()
        # The second number of a pair that `gauss` makes is kept outside of the words.
        return self._look.raw, random._inst.gauss_next  # type: ignore[attr-defined]

    def state(self) -> Any:
        return random.getstate()

    def restore(self, state: Any) -> None:
        random.setstate(state)

    def seed(self, seed: int) -> None:
        random.seed(seed)


class NumpyGenerator:
    """The legacy generator behind the functions of `numpy.random`."""

    name = "numpy.random"

    def __init__(self) -> None:
        self._memory = NumpyMemory.of(numpy.random.mtrand._rand)

    def fingerprint(self) -> Hashable:
        legacy = numpy.random.mtrand._rand
        if self._memory is None or self._memory.generator is not legacy._bit_generator:
            self._memory = NumpyMemory.of(legacy)
        return repr(legacy.get_state(legacy=False)) if self._memory is None else self._memory.look()

    def state(self) -> Any:
        return self._memory, numpy.random.get_state() if self._memory is None else self._memory.copy()

    def restore(self, state: Any) -> None:
        memory, found = state
        if memory is None:
            numpy.random.set_state(found)
            return
        memory.put_back(found)
        if memory.generator is not numpy.random.mtrand._rand._bit_generator:  # somebody has put in another
            numpy.random.set_bit_generator(memory.generator)  # type: ignore[attr-defined]

    def seed(self, seed: int) -> None:
        numpy.random.seed(seed & 0xFFFFFFFF)  # more bits would take ten times as long


class TorchGenerator:
    """torch's default generator for the CPU, from which dropout draws too."""

    name = "torch"

    def __init__(self) -> None:
        self._looks = (
            _looks_at_torch(torch.default_generator) if _shows_every_draw(torch.Generator()) else None
        )

    def fingerprint(self) -> Hashable:
        if self._looks is not None:
            return self._looks[0].raw, self._looks[1].raw
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
        self._before: dict[str, tuple[Hashable, Any]] = {}

    def start(self, drawn: Container[GlobalGenerator] = ()) -> None:
        """Remember where each generator stands.

        Args:
            drawn: Generators known to be drawn from. Their states are taken anew each time.
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


def standing(generator: GlobalGenerator) -> Hashable:
    """Return where a generator stands: the same whenever it stands there.

    Its fingerprint may also show a normal number of torch's that was in store before it was seeded.
    """
    is_torch = generator.name == TorchGenerator.name
    return generator.state().numpy().tobytes() if is_torch else generator.fingerprint()


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


def _looks_at_torch(generator: torch.Generator) -> tuple[Any, Any] | None:
    """Return views of how far a generator of torch is, and of the normal number that it has in store.

    Source:
        ATen's `CPUGeneratorImpl`, 2.6 kB to which the Python object points: a `mt19937_data_pod` (seed, left,
        whether it is seeded, next, words), then the stored numbers. `get_state` has the same in wider fields.
    """
    has_pointer = torch.Generator.__basicsize__ >= object.__basicsize__ + ctypes.sizeof(ctypes.c_void_p)
    state = generator.get_state().numpy().tobytes()
    if sys.implementation.name != "cpython" or not has_pointer or len(state) < _TORCH_STATE.size:
        return None
    _, left, _, following, *words = _TORCH_STATE.unpack_from(state)
    implementation = ctypes.c_void_p.from_address(id(generator) + object.__basicsize__).value
    if implementation is None or max(words) >= 1 << 32:
        return None
    seen = ctypes.string_at(implementation, _TORCH_SEARCHED_BYTES)
    at = seen.find(struct.pack("=8I", *words)) - 12  # behind left, whether it is seeded, and next
    if at < 0 or seen[at : at + 4] + seen[at + 8 : at + 12] != struct.pack("=iI", left, following):
        return None
    head = implementation + at
    return _Look.from_address(head), _Stored.from_address(head + 12 + 4 * 624)


def _shows_every_draw(generator: torch.Generator) -> bool:
    """Say whether those views change with each draw: numbers, and normal ones, which are made in pairs."""
    if (looks := _looks_at_torch(generator.manual_seed(1))) is None:
        return False
    seen = [(looks[0].raw, looks[1].raw)]
    for dtype in (torch.float32, torch.float64):
        for _ in range(3):
            torch.randn(1, dtype=dtype, generator=generator)
            seen.append((looks[0].raw, looks[1].raw))
    return len(set(seen)) == len(seen)


_TORCH, _PYTHON, _NUMPY = TorchGenerator(), PythonGenerator(), NumpyGenerator()
