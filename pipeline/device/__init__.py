"""Streams, events and pinned memory: nothing else in the project touches them."""

from pipeline.device.backend import Backend, EagerBackend, StreamBackend, is_host, select_backend
from pipeline.device.host_reads import HostRead, ReadDetector
from pipeline.device.readback import Pending, PendingTensor, Readback, StepLimiter
from pipeline.device.simulated import SimulatedBackend
from pipeline.device.snapshot import Snapshot, Snapshotter
from pipeline.device.transfer import Transfer, make_transfer

__all__ = [
    "Backend",
    "EagerBackend",
    "HostRead",
    "Pending",
    "PendingTensor",
    "ReadDetector",
    "Readback",
    "SimulatedBackend",
    "Snapshot",
    "Snapshotter",
    "StepLimiter",
    "StreamBackend",
    "Transfer",
    "is_host",
    "make_transfer",
    "select_backend",
]
