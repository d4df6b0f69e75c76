"""Numbers from the device without waiting for it: copy now, resolve when the event has passed.

`.item()` waits until the device has done everything that was queued before it. A deferred read
queues a copy of the step's scalars into a slot of pinned memory instead, and whoever wants the
numbers waits for the event behind it, on another thread or some steps later. Because `.item()` was
also an accidental barrier, two things must now hold without it: a slot is written again only after
its numbers were taken (it is on lease), and the loop's run-ahead is bounded (`StepLimiter`).
"""

from __future__ import annotations

import queue
from collections import deque
from dataclasses import dataclass, field

import torch

from pipeline.batch import Scalars
from pipeline.device.backend import Backend, Event, Streams


@dataclass(slots=True)
class Pending:
    """The scalars of one step, on their way.

    `resolve` must be called once for each, in any thread; it gives the slot back.
    """

    values: dict[str, float]
    names: tuple[str, ...] = ()
    slot: torch.Tensor | None = None
    landed: Event | None = None
    free_slots: queue.SimpleQueue[torch.Tensor] | None = field(default=None, repr=False)

    @property
    def is_ready(self) -> bool:
        """Whether `resolve` would return without waiting."""
        return self.landed is None or self.landed.query()

    def resolve(self) -> dict[str, float]:
        """Wait for the copy, with the GIL released, and return the numbers by name."""
        if self.landed is not None and self.slot is not None and self.free_slots is not None:
            self.landed.synchronize()
            self.values.update(zip(self.names, self.slot.tolist(), strict=False))
            self.free_slots.put(self.slot)
            self.landed = self.slot = None
        return self.values


class Readback:
    """Starts deferred reads.

    Args:
        backend: The device. On one that does not run ahead a read costs well under a microsecond
            and waits for nothing, so it is made at once: a value that the next step changes in
            place is the right one.
        num_slots: Reads that may be under way; one more waits for the oldest to be resolved.
    """

    def __init__(self, backend: Backend, num_slots: int = 1024) -> None:
        self._streams = backend.streams
        self._num_slots = num_slots
        self._width = 0
        self._free: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()

    def start(self, scalars: Scalars) -> Pending:
        """Queue the copy of one step's scalars and return at once.

        Args:
            scalars: 0-dimensional tensors of any real dtype, or floats.

        Runs on:
            Loop thread. Waits only while every slot is under way.
        """
        values = {name: v for name, v in scalars.items() if not isinstance(v, torch.Tensor)}
        tensors = {name: v for name, v in scalars.items() if isinstance(v, torch.Tensor)}
        if self._streams is None:
            for name, tensor in tensors.items():
                values[name] = tensor.item()
            return Pending(values)
        if not tensors:
            return Pending(values)
        # float64 holds every float32, float16, bfloat16 and every integer up to 2**53 exactly.
        packed = torch.stack([tensor.detach().to(torch.float64) for tensor in tensors.values()])
        free = self._slots(self._streams, len(tensors))
        slot = free.get()
        self._streams.copy_out(packed, slot[: len(tensors)])
        return Pending(values, tuple(tensors), slot, self._streams.record_compute(), free)

    def _slots(self, streams: Streams, width: int) -> queue.SimpleQueue[torch.Tensor]:
        """Return the free slots, made anew when a step brings more scalars than any before."""
        if width > self._width:
            self._width = width
            self._free = queue.SimpleQueue()  # slots of the old one go home to it, and die with it
            like = torch.empty(self._num_slots, width, dtype=torch.float64)
            for slot in streams.pinned_like(like).unbind():
                self._free.put(slot)
        return self._free


class StepLimiter:
    """Bounds how far the loop runs ahead of the device.

    Args:
        streams: Of a device that runs ahead; any other needs no bound.
        max_steps_in_flight: Steps that may be queued and not done; 1 waits for the step before.
    """

    def __init__(self, streams: Streams, max_steps_in_flight: int) -> None:
        self._streams, self._max = streams, max_steps_in_flight
        self._events: deque[Event] = deque()

    def step_queued(self) -> None:
        """Note that a step has been queued, and wait for the one that many steps before it."""
        self._events.append(self._streams.record_compute())
        if len(self._events) > self._max:
            self._events.popleft().synchronize()
