"""Numbers from the device without waiting for it: copy now, resolve when the event has passed.

`.item()` waits until the device has done everything that was queued before it. A deferred read
queues a copy of the step's scalars into a slot of pinned memory instead, and whoever wants the
numbers waits for the event behind it, on another thread or some steps later. Because `.item()` was
also an accidental barrier, two things must now hold without it: a slot is written again only after
its numbers were taken (it is on lease), and the loop's run-ahead is bounded (`StepLimiter`).
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

import torch

from pipeline.batch import Scalars
from pipeline.device.backend import Backend, Event, Streams

RECENT_EVENTS = 256


@dataclass(slots=True)
class Pending:
    """The scalars of one step, on their way.

    `resolve` must be called once for each, in any thread; it gives the slot back.
    """

    values: dict[str, float]
    names: tuple[str, ...] = ()
    slot: torch.Tensor | None = None
    landed: Event | None = None
    free_slots: deque[torch.Tensor] | None = field(default=None, repr=False)

    @property
    def is_ready(self) -> bool:
        """Whether `resolve` would return without waiting."""
        return self.landed is None or self.landed.query()

    def resolve(self) -> dict[str, float]:
        """Wait for the copy, with the GIL released, and return the numbers by name."""
        if self.landed is not None and self.slot is not None and self.free_slots is not None:
            self.landed.synchronize()
            self.values.update(zip(self.names, self.slot.tolist(), strict=False))
            self.free_slots.append(self.slot)
            self.landed = self.slot = None
        return self.values


class PendingTensor:
    """A tensor on its way to memory of its own; `resolve` waits for it."""

    def __init__(self, host: torch.Tensor, landed: Event | None) -> None:
        self._host, self._landed = host, landed

    def resolve(self) -> torch.Tensor:
        """Wait for the copy, with the GIL released, and return it."""
        if self._landed is not None:
            self._landed.synchronize()
        return self._host


class Readback:
    """Starts deferred reads; never waits.

    Slots are made in blocks, as many as are under way at once, which whoever holds the `Pending`s
    bounds: waiting here for a slot would be waiting for them.

    Args:
        backend: The device. On one that does not run ahead a read costs well under a microsecond
            and waits for nothing, so it is made at once: a value that the next step changes in
            place is the right one.
        block_size: Slots that are pinned together.
    """

    def __init__(self, backend: Backend, block_size: int = 64) -> None:
        self._streams, self._device = backend.streams, backend.device
        self._block_size = block_size
        self._width = 0
        # Popped by the loop thread and appended to by the writer, each in one atomic call.
        self._free: deque[torch.Tensor] = deque()

    def start(self, scalars: Scalars) -> Pending:
        """Queue the copy of one step's scalars and return at once.

        Args:
            scalars: 0-dimensional tensors of any real dtype, or floats.

        Runs on:
            Loop thread.
        """
        if self._streams is None:
            return Pending({n: v if isinstance(v, (float, int)) else v.item() for n, v in scalars.items()})
        values = {name: v for name, v in scalars.items() if not isinstance(v, torch.Tensor)}
        tensors = {name: v for name, v in scalars.items() if isinstance(v, torch.Tensor)}
        for name, tensor in list(tensors.items()):
            if tensor.device != self._device:  # the host's: nothing to wait for
                values[name] = tensors.pop(name).item()
        if not tensors:
            return Pending(values)
        # float64 holds every float32, float16, bfloat16 and every integer up to 2**53 exactly.
        packed = torch.stack([tensor.detach().to(torch.float64) for tensor in tensors.values()])
        slot = self._lease(self._streams, len(tensors))
        self._streams.copy_out(packed, slot[: len(tensors)])
        return Pending(values, tuple(tensors), slot, self._streams.record_compute(), self._free)

    def start_tensor(self, tensor: torch.Tensor) -> PendingTensor:
        """Queue the copy of a whole tensor and return at once; it is the value of this moment.

        Runs on:
            Loop thread. Pinned memory is made for each, which is dear: it is for now and then.
        """
        source = tensor.detach()
        if self._streams is None or source.device != self._device:
            return PendingTensor(source.to("cpu", copy=True), None)
        source = source.contiguous()
        pinned = self._streams.pinned_like(source)
        self._streams.copy_out(source, pinned)
        return PendingTensor(pinned, self._streams.record_compute())

    def _lease(self, streams: Streams, width: int) -> torch.Tensor:
        if width > self._width:
            self._width = width
            self._free = deque()  # slots of the old one go home to it, and die with it
        try:
            return self._free.popleft()
        except IndexError:
            like = torch.empty(self._block_size, self._width, dtype=torch.float64)
            self._free.extend(streams.pinned_like(like).unbind())
            return self._free.popleft()


class StepLimiter:
    """Bounds how far the loop runs ahead of the device.

    Args:
        streams: Of a device that runs ahead; any other needs no bound.
        max_steps_in_flight: Steps that may be queued and not done; 1 waits for the step before.
    """

    def __init__(self, streams: Streams, max_steps_in_flight: int) -> None:
        self._streams, self._max = streams, max_steps_in_flight
        self._events: deque[Event] = deque()
        self._recent: deque[Event] = deque(maxlen=RECENT_EVENTS)

    def step_queued(self) -> None:
        """Note that a step has been queued, and wait for the one that many steps before it."""
        queued = self._streams.record_compute()
        self._events.append(queued)
        self._recent.append(queued)
        if len(self._events) > self._max:
            self._events.popleft().synchronize()

    def ages(self) -> tuple[int, list[float]]:
        """Return the time, and how long ago the device, which is idle by now, finished the last steps.

        Returns:
            Nanoseconds of `time.perf_counter`, and seconds before them.
        """
        ages_s = self._streams.ages_s(self._recent)
        return time.perf_counter_ns(), ages_s
