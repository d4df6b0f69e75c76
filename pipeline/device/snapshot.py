"""Copies of tensors that go on changing: taken between two steps, written while the loop goes on."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pipeline.device.backend import Backend, Event


class Snapshot:
    """Tensors on their way to memory that the loop does not touch; `resolve` waits for them."""

    def __init__(self, tensors: dict[str, torch.Tensor], landed: Event | None) -> None:
        self._tensors, self._landed = tensors, landed

    def resolve(self) -> dict[str, torch.Tensor]:
        """Wait for the copies, with the GIL released, and return them by name."""
        if self._landed is not None:
            self._landed.synchronize()
        return self._tensors


class Snapshotter:
    """Copies tensors to host memory: pinned memory, behind the step on the device, where it runs ahead.

    The copies are queued on the compute stream. The next step changes what they read, batch norm's
    statistics in its very forward pass, so on a side stream it would have to wait for them as well.

    The memory is kept from one snapshot to the next, since fresh memory costs more than the copy. So a
    snapshot must have been written before the next one is taken.

    Args:
        backend: The device.

    Runs on:
        Loop thread; waits for nothing on a device that runs ahead, for the copy elsewhere.
    """

    def __init__(self, backend: Backend) -> None:
        self._streams, self._device = backend.streams, backend.device
        self._kept: dict[str, torch.Tensor] = {}

    def copy(self, tensors: Mapping[str, torch.Tensor]) -> Snapshot:
        """Start the copies of all tensors as they are now."""
        copies = {name: self._copy(name, tensor.detach()) for name, tensor in tensors.items()}
        self._kept = copies
        return Snapshot(copies, None if self._streams is None else self._streams.record_compute())

    def _copy(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        is_ahead = self._streams is not None and tensor.device == self._device
        kept = self._kept.get(name)
        if kept is None or (kept.shape, kept.stride(), kept.dtype) != (
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        ):
            like = torch.empty_like(tensor, device="cpu")
            kept = self._streams.pinned_like(like) if is_ahead and self._streams is not None else like
        if is_ahead and self._streams is not None:
            self._streams.copy_out(tensor, kept)
        else:
            kept.copy_(tensor)
        return kept
