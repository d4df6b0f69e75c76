"""Deferred reads for a loop of one's own: put a step's scalars, take what has arrived."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch

from pipeline.batch import Scalars
from pipeline.device import Backend, Pending, Readback, select_backend
from pipeline.errors import ConfigError

Tag = TypeVar("Tag")


class DeferredReads(Generic[Tag]):
    """Reads scalars from the device without waiting, in order, none lost.

        reads = DeferredReads(device="cuda")
        for step, batch in enumerate(prefetch(loader, device="cuda")):
            loss = train_step(batch)
            reads.put(step, {"loss": loss})
            for done, values in reads.ready():
                print(done, values["loss"])
        for done, values in reads.flush():
            print(done, values["loss"])

    Args:
        device: Where the scalars are; ``auto`` takes the accelerator that is there.
        max_pending: Reads that may be under way; one more waits for the oldest. This bounds how far
            your loop runs ahead of the device.

    Runs on:
        One thread, yours. `put` waits, with the GIL released, only while `max_pending` are under way;
        `ready` never does.
    """

    def __init__(self, device: str | torch.device | Backend = "auto", max_pending: int = 16) -> None:
        if max_pending < 1:
            raise ConfigError(f"max_pending must be 1 or more, got {max_pending}.")
        self._readback = Readback(select_backend(device))
        self._max_pending = max_pending
        self._pending: deque[tuple[Tag, Pending]] = deque()
        self._arrived: deque[tuple[Tag, dict[str, float]]] = deque()

    def put(self, tag: Tag, scalars: Scalars) -> None:
        """Queue the copy of a step's scalars.

        Args:
            tag: Comes back with the numbers, such as the step.
            scalars: 0-dimensional tensors of any real dtype, or floats, by name.

        Raises:
            ConfigError: If a tensor is not 0-dimensional.
        """
        for name, value in scalars.items():
            if isinstance(value, torch.Tensor) and value.ndim:
                raise ConfigError(
                    f"{name} must be a scalar, got shape {tuple(value.shape)}. Reduce it with .mean()."
                )
        self._pending.append((tag, self._readback.start(scalars)))
        while len(self._pending) > self._max_pending:
            self._resolve_oldest()

    def ready(self) -> Iterator[tuple[Tag, dict[str, float]]]:
        """Yield the tag and numbers of every read that has arrived, in the order of `put`."""
        while self._pending and self._pending[0][1].is_ready:
            self._resolve_oldest()
        while self._arrived:
            yield self._arrived.popleft()

    def flush(self) -> Iterator[tuple[Tag, dict[str, float]]]:
        """Wait for the reads under way, and yield all that `ready` has not."""
        while self._pending:
            self._resolve_oldest()
        yield from self.ready()

    def _resolve_oldest(self) -> None:
        tag, pending = self._pending.popleft()
        self._arrived.append((tag, pending.resolve()))
