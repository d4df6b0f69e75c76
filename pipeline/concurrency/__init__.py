"""Threads, processes and what they hand each other. Standard library only; nothing else starts one."""

from pipeline.concurrency.processes.child import Child, ChildDiedError
from pipeline.concurrency.processes.cores import available_cores
from pipeline.concurrency.processes.fork_server import is_nursery, pickled_error
from pipeline.concurrency.processes.fork_server_client import fork_server, preparation
from pipeline.concurrency.processes.pool import NurseryDiedError, WorkerPool
from pipeline.concurrency.processes.pool_state import Answer
from pipeline.concurrency.processes.shared_memory import (
    HAS_SHARED_MEMORY,
    Pinning,
    Slot,
    SlotFile,
    map_slots,
    view_file,
    view_slot,
)
from pipeline.concurrency.processes.worker_jobs import answer_jobs
from pipeline.concurrency.threads.channel import (
    Channel,
    ChannelClosedError,
    ChannelStatistics,
    UnorderedChannel,
)
from pipeline.concurrency.threads.joined import Scope, stack_of
from pipeline.concurrency.threads.shared_lock import SharedLock
from pipeline.concurrency.threads.switch_interval import short_switch_interval
from pipeline.concurrency.threads.watchdog import watch
from pipeline.concurrency.threads.writer import Writer

__all__ = [
    "HAS_SHARED_MEMORY",
    "Answer",
    "Channel",
    "ChannelClosedError",
    "ChannelStatistics",
    "Child",
    "ChildDiedError",
    "NurseryDiedError",
    "Pinning",
    "Scope",
    "SharedLock",
    "Slot",
    "SlotFile",
    "UnorderedChannel",
    "WorkerPool",
    "Writer",
    "answer_jobs",
    "available_cores",
    "fork_server",
    "is_nursery",
    "map_slots",
    "pickled_error",
    "preparation",
    "short_switch_interval",
    "stack_of",
    "view_file",
    "view_slot",
    "watch",
]
