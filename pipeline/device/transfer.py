"""Batches to the device: queued on the prefetch thread, handed to the loop with an event.

The life of the memory, which is where such code goes wrong:

1. The **host batch** is the user's or the collate function's. It is copied into a pinned slot at
   once, on the prefetch thread, and not looked at again: whoever reuses its memory may do so. What
   worker processes make lies in pinned memory, where nobody writes while it lives: it is not copied
   but kept alive until the event behind its copy has passed.
2. A **pinned slot** is leased for one tensor's copy and comes back when the event behind that copy
   has passed, checked on the host. The user never sees a slot.
3. The **device tensor** is fresh memory of the caching allocator for each batch. The compute stream
   waits for the copy before its first kernel, and the memory is lent to the compute stream, so that
   freeing it while kernels still read it does no harm. A batch that the user keeps, in a list or in
   a closure, is theirs: nothing is ever written into it again.

All three hold for every tensor of a nested batch. An object that moves itself (`pipeline.batch.tree` has
the rule), and a tensor with a gradient or without memory that could be lent (sparse, nested), is moved when
the batch is received, on the loop thread and its compute stream, as in a plain loop.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from pipeline.batch import Batch, copy_memory, keep_objects, map_batch, move_batch
from pipeline.concurrency import Pinning
from pipeline.device.backend import Backend, Event, Streams


class Transfer(Protocol):
    """Two halves of a copy to the device."""

    def send(self, batch: Batch, *, is_fresh: bool = True, is_leased: bool = False) -> Any:
        """Start the copy; prefetch thread.

        Args:
            batch: On the host.
            is_fresh: Whether it has memory of its own. If not, it is copied at once: whoever makes
                batches ahead must not see the next one in this one's memory.
            is_leased: Whether nobody writes to its memory as long as it lives, not even the user.
        """

    def receive(self, sent: Any) -> Batch:
        """Return the batch, safe to use in the next operation; loop thread."""

    def on_device(self) -> AbstractContextManager[Any]:
        """Make the device the calling thread's current one, as it is the loop thread's."""

    @property
    def pinning(self) -> Pinning | None:
        """What pins the memory that batches lie in; None where no copy is queued from it."""

    @property
    def is_identity(self) -> bool:
        """Whether a fresh batch comes out as it went in."""

    @property
    def runs_ahead(self) -> bool:
        """Whether a copy is queued and goes on beside the loop: worth a thread that queues it early."""


class EagerTransfer:
    """The copy of a plain loop, made when the batch is received; nothing at all for the CPU."""

    runs_ahead, pinning = False, None

    def __init__(self, backend: Backend, prepare: Callable[[torch.Tensor], torch.Tensor] | None):
        self._backend, self._prepare = backend, prepare
        self._is_host = backend.device.type == "cpu" and backend.streams is None
        self.is_identity = self._is_host and prepare is None

    def send(self, batch: Batch, *, is_fresh: bool = True, is_leased: bool = False) -> Batch:
        if not is_fresh:
            batch = copy_memory(batch)
        if self._prepare is None:
            return batch
        return map_batch(batch, partial(_prepared, self._prepare), keep_objects)

    def on_device(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def receive(self, sent: Batch) -> Batch:
        return sent if self._is_host else move_batch(sent, self._backend.device, self._backend.move)


@dataclass(frozen=True, slots=True)
class SentBatch:
    """A batch whose copy has been queued, the event behind it, and by id the tensors still to be moved."""

    batch: Batch
    copied: Event
    late: frozenset[int]


class StreamTransfer:
    """Copies through leased pinned slots on a side stream.

    Args:
        backend: A device that runs ahead.
        prepare: Applied to each host tensor before the copy.

    Runs on:
        `send` on a prefetch thread, `receive` on the loop thread; they share nothing but the batch
        handed over. Several prefetch threads may send at once.
    """

    is_identity, runs_ahead = False, True

    def __init__(
        self,
        backend: Backend,
        streams: Streams,
        prepare: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> None:
        self._backend, self._device, self._streams, self._prepare = backend, backend.device, streams, prepare
        self._slots = SlotPool(streams)
        self.pinning: Pinning | None = streams

    def send(self, batch: Batch, *, is_fresh: bool = True, is_leased: bool = False) -> SentBatch:
        leased, late = list[Slot | torch.Tensor](), set[int]()

        def start_copy(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.device.type != "cpu":
                return tensor.to(self._device)
            if is_leased:
                leased.append(tensor)
            host = tensor if self._prepare is None else _prepared(self._prepare, tensor)
            if _is_late(host):
                late.add(id(host))
                return host
            if type(host) is not torch.Tensor:
                return self._streams.copy_in(host)  # keeps its kind; from pageable memory, so it waits
            if is_leased and self._streams.is_pinned(host):
                return self._streams.copy_in(host)
            slot = self._slots.lease(host)
            slot.tensor.copy_(host)
            leased.append(slot)
            return self._streams.copy_in(slot.tensor)

        if not is_fresh:
            batch = copy_memory(batch, lambda tensor: not _is_late(tensor))  # the others are copied below
        on_device = map_batch(batch, start_copy, keep_objects)
        copied = self._streams.record_copies()
        self._slots.give_back_after(copied, leased)
        return SentBatch(on_device, copied, frozenset(late))

    def on_device(self) -> AbstractContextManager[Any]:
        return self._streams.on_device()

    def receive(self, sent: SentBatch) -> Batch:
        self._streams.wait_for_copies(sent.copied)

        def arrive(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) in sent.late:
                return self._backend.move(tensor)
            self._streams.lend_to_compute(tensor)
            return tensor

        return move_batch(sent.batch, self._device, arrive, is_queued=True)


_NO_DISPATCH = torch.Tensor.__torch_dispatch__


def _is_late(host: torch.Tensor) -> bool:
    """Say whether the loop thread moves a tensor: one with a graph, or that is not one piece of memory."""
    is_dense = host.layout is torch.strided and not host.is_nested
    return host.requires_grad or not is_dense or type(host).__torch_dispatch__ is not _NO_DISPATCH


def _prepared(prepare: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_nested else prepare(tensor)


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """Pinned host memory for one tensor of a certain shape, layout and dtype."""

    key: tuple[Any, ...]
    tensor: torch.Tensor


class SlotPool:
    """Pinned slots on lease, by shape, layout and dtype.

    Pinning costs some 0.4 ms a batch, so slots are kept and used again. A slot is free once the
    event behind its last copy has passed on the host; until then a new one is made, of which the
    depth of the channel bounds the number.

    Validation in the middle of an epoch has a prefetch thread of its own, so there is a lock.

    Args:
        streams: Makes pinned memory.
        max_free_bytes: Free slots beyond this much are let go, so that ragged batches, which need a
            new shape each time, do not fill the memory with slots that nothing fits.
    """

    def __init__(self, streams: Streams, max_free_bytes: int = 1 << 30) -> None:
        self._streams, self._max_free_bytes = streams, max_free_bytes
        self._free: dict[tuple[Any, ...], list[Slot]] = {}
        self._free_bytes = 0
        self._leased: deque[tuple[Event, Sequence[Slot | torch.Tensor]]] = deque()
        self._lock = threading.Lock()

    def lease(self, like: torch.Tensor) -> Slot:
        """Return a slot of this shape, layout and dtype whose former copy is over."""
        key = (like.shape, like.stride(), like.dtype)
        with self._lock:
            self._collect()
            if slots := self._free.get(key):
                slot = slots.pop()
                self._free_bytes -= slot.tensor.nbytes
                return slot
        return Slot(key, self._streams.pinned_like(like))

    def give_back_after(self, copied: Event, slots: Sequence[Slot | torch.Tensor]) -> None:
        """End the lease of these slots when the event has passed; keep tensors of others until then."""
        with self._lock:
            self._collect()
            self._leased.append((copied, slots))

    def _collect(self) -> None:
        while self._leased and self._leased[0][0].query():
            for slot in self._leased.popleft()[1]:
                if isinstance(slot, Slot) and self._free_bytes + slot.tensor.nbytes <= self._max_free_bytes:
                    self._free.setdefault(slot.key, []).append(slot)
                    self._free_bytes += slot.tensor.nbytes


def make_transfer(
    backend: Backend, *, overlaps: bool, prepare: Callable[[torch.Tensor], torch.Tensor] | None
) -> Transfer:
    """Return the transfer of a schedule.

    Args:
        backend: The device.
        overlaps: Whether a prefetch thread queues the copies.
        prepare: Applied to each host tensor first, such as a change of memory format.
    """
    if overlaps and (streams := backend.streams):
        return StreamTransfer(backend, streams, prepare)
    return EagerTransfer(backend, prepare)
