"""A simulated accelerator: a clock, two queues, and no mercy for races.

There is no device here. Tensors live in host memory and operations compute at once, on the host;
what is simulated is *when* their results would be there, and what is seen by whoever looks too
early.

- **The clock.** Each of the two streams, copies and compute, is a first-in-first-out queue with a
  time until which it is busy. A launch costs the host real work that holds the GIL and makes the
  compute stream busy for longer; waiting is a sleep that releases the GIL. With a virtual clock
  nothing sleeps and nothing spins, time is a number, and tests are exact.
- **The data.** A queued copy writes poison (NaN, or the smallest integer) to its target at once, and
  the true values as late as the rules allow: when somebody *synchronises* with it (the compute
  stream is told to wait for the event, or the host waits for it or is told that it has passed).
  A copy in reads its source at that late moment, so a slot that was filled again too early delivers
  the wrong batch; and code that forgot to wait computes with poison.
- **The memory.** Memory of the copy stream that the compute stream used and that was freed without
  having been lent to it is a violation: a real allocator would have given it away under the kernels.

Its defaults come from published traces; they make a plausible device, not any one device, and nothing
measured on it is a gain on CUDA.

Source:
    Launch, 20 µs: an element-wise kernel of PyTorch on a V100, in NVIDIA's Nsight Systems guide, quoted by
    groundy.com, "Every CUDA kernel pays a launch tax". Copies, 16 GB/s: 400 MB between the device and pinned
    memory in 24.6 ms, in github.com/chunhuizhang/pytorch_distribute_tutorials. The length of a step belongs
    to the workload and is given with it (`launch`); 335 ms is that of pytorch issue 77139.
"""

from __future__ import annotations

import ctypes
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.device.backend import Event, Streams


@dataclass(slots=True)
class _Queue:
    """One stream: when it will be idle, and the copies whose effect nobody may see yet."""

    busy_until_s: float = 0.0
    effects: deque[tuple[int, Callable[[], None]]] = field(default_factory=deque)
    num_queued: int = 0


class SimulatedEvent:
    """A mark in a simulated stream."""

    def __init__(self, device: SimulatedBackend, stream: _Queue) -> None:
        self._device, self._stream = device, stream
        self.passed_at_s, self.mark = stream.busy_until_s, stream.num_queued

    def query(self) -> bool:
        has_passed = self._device.now_s() >= self.passed_at_s
        if has_passed:
            self.deliver()
        return has_passed

    def synchronize(self) -> None:
        self._device.wait_until(self.passed_at_s)
        self.deliver()

    def deliver(self) -> None:
        """Make visible what was queued before the mark."""
        with self._device.lock:
            effects = self._stream.effects
            while effects and effects[0][0] <= self.mark:
                effects.popleft()[1]()

    def delay(self, stream: _Queue) -> None:
        """Make another stream wait for the mark."""
        stream.busy_until_s = max(stream.busy_until_s, self.passed_at_s)


class SimulatedBackend:
    """An accelerator behind the interface of `StreamBackend`, on the CPU.

    Args:
        launch_us: Host time of one launch, in microseconds, with the GIL held.
        copy_bytes_per_s: Bandwidth of the copies in either direction.
        is_virtual: Keep time as a number instead of spinning and sleeping.

    Attributes:
        violations: Freed memory that the compute stream might still have been reading.
        waits: The name of the thread for each wait of the host, and for each plain read.
    """

    def __init__(
        self,
        *,
        launch_us: float = 20.0,
        copy_bytes_per_s: float = 16e9,
        is_virtual: bool = True,
    ) -> None:
        self.device = torch.device("cpu")
        self.lock = threading.RLock()
        self.violations: list[str] = []
        self.waits: list[str] = []
        self._launch_s, self._copy_bytes_per_s = launch_us * 1e-6, copy_bytes_per_s
        self._is_virtual, self._virtual_now_s = is_virtual, 0.0
        self._copies, self._compute = _Queue(), _Queue()
        self._lent: set[int] = set()
        self._pinned: dict[int, int] = {}  # address -> bytes, of memory that was there already
        self._copied_in: dict[int, int] = {}  # a living tensor's id -> its place among the copies
        self._last_waited_for = 0  # the compute stream may use the copies up to this one

    @property
    def streams(self) -> Streams | None:
        return self

    def now_s(self) -> float:
        """Return the clock, in seconds."""
        return self._virtual_now_s if self._is_virtual else time.perf_counter()

    def launch(self, duration_s: float, num_launches: int = 1) -> None:
        """Queue kernels on the compute stream: host work now, device time later.

        Args:
            duration_s: Device time of all of them together.
            num_launches: How many; each costs the host `launch_us`.
        """
        self._spend_host_time(self._launch_s * num_launches)
        self._queue(self._compute, duration_s)

    def wait_until(self, moment_s: float) -> None:
        """Block the calling thread until the clock has reached this moment, the GIL released."""
        self.waits.append(threading.current_thread().name)
        if self._is_virtual:
            with self.lock:
                self._virtual_now_s = max(self._virtual_now_s, moment_s)
        elif (left_s := moment_s - self.now_s()) > 0:
            time.sleep(left_s)

    def move(self, tensor: torch.Tensor) -> torch.Tensor:
        moved = self.copy_in(tensor)
        self.record_copies().synchronize()
        self.lend_to_compute(moved)
        return moved

    def read(self, tensor: torch.Tensor) -> float:
        self.record_compute().synchronize()
        return float(tensor.item())

    def on_device(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def pinned_like(self, tensor: torch.Tensor) -> torch.Tensor:
        return _poison(torch.empty_like(tensor))

    def is_pinned(self, host: torch.Tensor) -> bool:
        place = host.data_ptr()
        with self.lock:
            return any(0 <= place - address < nbytes for address, nbytes in self._pinned.items())

    def pin(self, address: int, nbytes: int) -> bool:
        with self.lock:
            self._pinned[address] = nbytes
        return True

    def unpin(self, address: int) -> None:
        self.record_copies().synchronize()
        with self.lock:
            del self._pinned[address]

    def copy_in(self, host: torch.Tensor) -> torch.Tensor:
        if host.requires_grad or host.is_nested or host.layout is not torch.strided:
            return host.clone()  # with its graph, as it is; such a copy waits
        on_device = _poison(torch.empty_like(host))
        # A view of it shares the memory but not this object: the caller's tensor may die and be
        # counted as freed, while the copy still has somewhere to write to.
        target = on_device.detach()
        source = _by_address(host) if self.is_pinned(host) else host

        def deliver() -> None:
            target.copy_(source)

        with self.lock:
            self._queue(self._copies, host.nbytes / self._copy_bytes_per_s, deliver)
            self._copied_in[id(on_device)] = self._copies.num_queued
        weakref.finalize(on_device, self._freed, id(on_device)).atexit = False
        return on_device

    def record_copies(self) -> Event:
        return SimulatedEvent(self, self._copies)

    def wait_for_copies(self, copied: Event) -> None:
        assert isinstance(copied, SimulatedEvent)
        with self.lock:
            copied.deliver()
            copied.delay(self._compute)
            self._last_waited_for = max(self._last_waited_for, copied.mark)

    def lend_to_compute(self, tensor: torch.Tensor) -> None:
        if id(tensor) in self._copied_in:
            self._lent.add(id(tensor))

    def copy_out(self, source: torch.Tensor, pinned: torch.Tensor) -> None:
        snapshot = source.clone()  # in order behind the step that made it
        _poison(pinned)

        def deliver() -> None:
            pinned.copy_(snapshot)

        with self.lock:
            self._queue(self._compute, source.nbytes / self._copy_bytes_per_s, deliver)

    def record_compute(self) -> Event:
        return SimulatedEvent(self, self._compute)

    def ages_s(self, marks: Sequence[Event]) -> list[float]:
        return [self.now_s() - mark.passed_at_s for mark in marks if isinstance(mark, SimulatedEvent)]

    def _queue(self, stream: _Queue, duration_s: float, effect: Callable[[], None] | None = None) -> None:
        with self.lock:
            stream.busy_until_s = max(stream.busy_until_s, self.now_s()) + duration_s
            stream.num_queued += 1
            if effect is not None:
                stream.effects.append((stream.num_queued, effect))

    def _spend_host_time(self, duration_s: float) -> None:
        if self._is_virtual:
            with self.lock:
                self._virtual_now_s += duration_s
            return
        end_s = time.perf_counter() + duration_s
        while time.perf_counter() < end_s:
            pass  # a launch is Python and driver work that holds the GIL

    def _freed(self, tensor: int) -> None:
        with self.lock:
            is_used = self._copied_in.pop(tensor) <= self._last_waited_for
            if is_used and tensor not in self._lent:
                self.violations.append("memory of the copy stream was freed without being lent")
            self._lent.discard(tensor)


def _by_address(host: torch.Tensor) -> torch.Tensor:
    """Return a tensor over the same memory that does not keep it: a real copy knows the address alone."""
    last = sum((size - 1) * stride for size, stride in zip(host.shape, host.stride(), strict=True))
    memory = (ctypes.c_char * ((last + 1) * host.itemsize)).from_address(host.data_ptr())
    return torch.frombuffer(memory, dtype=host.dtype).as_strided(host.shape, host.stride())


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.fill_(float("nan"))
        return tensor.fill_(torch.iinfo(tensor.dtype).min)
