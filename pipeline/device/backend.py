"""One small interface to any device: the CPU, an accelerator with streams, a simulated one.

Two kinds of device. An **eager** one (the CPU; MPS, which offers no streams) has finished an
operation when it returns, or waits when it is read: there is nothing to overlap a copy with. One
that **runs ahead** returns while the work is still queued: copies go through a side stream, reads
through an event, and both through slots of pinned memory on lease.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any, Protocol

import torch

from pipeline.errors import ConfigError


class Event(Protocol):
    """A mark in a stream."""

    def query(self) -> bool:
        """Say whether the device has passed it; never waits."""

    def synchronize(self) -> None:
        """Wait until the device has passed it, with the GIL released."""


class Streams(Protocol):
    """The part of a device that runs ahead: copies beside the computation, and marks to wait for."""

    def on_device(self) -> AbstractContextManager[Any]:
        """Make it the calling thread's current device; a new thread begins with the first one."""

    def pinned_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return an uninitialised pinned host tensor of the same shape and dtype."""

    def is_pinned(self, host: torch.Tensor) -> bool:
        """Say whether a copy can begin where a host tensor lies, and so be queued."""

    def pin(self, address: int, nbytes: int) -> bool:
        """Pin memory that is there already; return False, and change nothing, where that cannot be done."""

    def unpin(self, address: int) -> None:
        """Take that back, behind the copies that were queued."""

    def copy_in(self, host: torch.Tensor) -> torch.Tensor:
        """Queue a copy to fresh device memory on the side stream."""

    def record_copies(self) -> Event:
        """Mark the end of what has been queued on the side stream."""

    def wait_for_copies(self, copied: Event) -> None:
        """Make the calling thread's compute stream wait, on the device, for the side stream."""

    def lend_to_compute(self, tensor: torch.Tensor) -> None:
        """Keep side-stream memory from reuse until the compute stream is done with it."""

    def copy_out(self, source: torch.Tensor, pinned: torch.Tensor) -> None:
        """Queue a copy of a device tensor to pinned memory on the compute stream."""

    def record_compute(self) -> Event:
        """Mark the end of what has been queued on the calling thread's compute stream."""

    def ages_s(self, marks: Sequence[Event]) -> list[float]:
        """Say how long ago the compute stream, which is idle by now, passed each of its marks, in seconds."""


class Backend(Protocol):
    """What the library needs of a device.

    Attributes:
        device: Where tensors live.
    """

    device: torch.device

    @property
    def streams(self) -> Streams | None:
        """What a device that runs ahead offers; None where an operation's return means it is done."""

    def move(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy to the device as a plain loop does."""

    def read(self, tensor: torch.Tensor) -> float:
        """Wait for the device and return a 0-dimensional tensor's value."""


def is_host(backend: Backend) -> bool:
    """Say whether the device is the CPU, where to read a number waits for nothing."""
    return backend.streams is None and backend.device.type == "cpu"


class EagerBackend:
    """The CPU, or a device without streams."""

    streams: Streams | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def move(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device)

    def read(self, tensor: torch.Tensor) -> float:
        return float(tensor.item())


class StreamBackend:
    """CUDA, or any accelerator whose device module has streams and events like CUDA's.

    Source:
        PyTorch notes, "CUDA semantics": side streams, `record_stream`, pinned memory. Events are
        made blocking, or `synchronize` would spin; `torch.Event(blocking=True)` ignores the flag on
        CUDA, the device module's own class does not. Memory is pinned where it lies as in
        pytorch issue 32167, with the runtime's `cudaHostRegister`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module: Any = torch.get_device_module(device)
        self._side: Any = self._module.Stream(device=device)

    @property
    def streams(self) -> Streams | None:
        return self

    def move(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device)

    def read(self, tensor: torch.Tensor) -> float:
        return float(tensor.item())

    def on_device(self) -> AbstractContextManager[Any]:
        guard: AbstractContextManager[Any] = self._module.device(self.device)
        return guard

    def pinned_like(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device="cpu", pin_memory=True)

    def is_pinned(self, host: torch.Tensor) -> bool:
        return host.is_pinned()

    def pin(self, address: int, nbytes: int) -> bool:
        if self.device.type != "cuda":
            return False
        with self.on_device():
            is_pinned = int(_cuda_runtime().cudaHostRegister(address, nbytes, 0)) == 0
            if not is_pinned:
                self._forget_error()
        return is_pinned

    def unpin(self, address: int) -> None:
        with self.on_device(), suppress(RuntimeError):  # a kernel's, which has been raised where it was seen
            self._side.synchronize()
            if int(_cuda_runtime().cudaHostUnregister(address)) != 0:
                self._forget_error()

    def _forget_error(self) -> None:
        """Take the error that CUDA remembers, for whoever launches next would raise it."""
        with suppress(RuntimeError):
            torch.zeros(1, device=self.device).add_(1)

    def record_copies(self) -> Event:
        return self._record(self._side)

    def copy_in(self, host: torch.Tensor) -> torch.Tensor:
        # Under the side stream the caching allocator takes memory that belongs to that stream, so
        # the copy need not wait for whatever the compute stream last did with it.
        with self._module.stream(self._side):
            return host.to(self.device, non_blocking=True)

    def wait_for_copies(self, copied: Event) -> None:
        self._module.current_stream(self.device).wait_event(copied)

    def lend_to_compute(self, tensor: torch.Tensor) -> None:
        # Without it, memory freed on the host while kernels still read it would be given to the
        # next copy on the side stream.
        tensor.record_stream(self._module.current_stream(self.device))

    def copy_out(self, source: torch.Tensor, pinned: torch.Tensor) -> None:
        # On the compute stream: it is a few bytes, in order behind the step that made them, and
        # the source may be freed at once, since its memory is reused in the order of the stream.
        pinned.copy_(source, non_blocking=True)

    def record_compute(self) -> Event:
        return self._record(self._module.current_stream(self.device), is_timed=True)

    def ages_s(self, marks: Sequence[Event]) -> list[float]:
        now: Any = self.record_compute()
        now.synchronize()
        events: Any = marks
        return [event.elapsed_time(now) / 1e3 for event in events]

    def _record(self, stream: Any, *, is_timed: bool = False) -> Event:
        event: Any = self._module.Event(blocking=True, enable_timing=is_timed)
        event.record(stream)
        return event  # type: ignore[no-any-return]


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _check_complete(backend: Backend) -> None:
    """Refuse a backend of the user's own that would fail where its missing method is first called."""
    missing = [name for name in ("device", *_public(Backend)) if not hasattr(backend, name)]
    if not missing and backend.streams is not None:
        missing = [f"streams.{name}" for name in _public(Streams) if not hasattr(backend.streams, name)]
    if missing:
        raise ConfigError(
            f"device is a {type(backend).__name__} that lacks {', '.join(missing)}: it must have all that "
            "pipeline.device.Backend and, if it runs ahead, pipeline.device.backend.Streams name."
        )


def _public(role: type) -> list[str]:
    return [name for name in vars(role) if not name.startswith("_")]


def select_backend(device: str | torch.device | Backend) -> Backend:
    """Return the backend of a device.

    Args:
        device: ``auto`` (the accelerator that is there, else the CPU), a torch device or its name,
            or a backend of one's own, such as `SimulatedBackend`.

    Raises:
        ConfigError: If there is no such device here, or the backend lacks something.
    """
    if not isinstance(device, (str, torch.device)):
        _check_complete(device)
        return device
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = accelerator or torch.device("cpu")
    try:
        found = torch.empty(0, device=device).device  # with its index
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device must be auto, cpu, cuda or mps, and be there, got {str(device)!r} ({reason}). "
            "Use device=auto to take what there is."
        ) from error
    module: Any = None if found.type == "cpu" else torch.get_device_module(found)
    has_streams = module is not None and hasattr(module, "Stream") and hasattr(module, "Event")
    return StreamBackend(found) if has_streams else EagerBackend(found)
