"""Threads, processes and what they hand each other. Standard library only; nothing else starts one."""

from pipeline.concurrency.channel import Channel, ChannelClosedError, ChannelStatistics, UnorderedChannel
from pipeline.concurrency.child import Child, ChildDiedError
from pipeline.concurrency.cores import available_cores
from pipeline.concurrency.fork_server import is_nursery, pickled_error
from pipeline.concurrency.jobs import answer_jobs
from pipeline.concurrency.pool import NurseryDiedError, WorkerPool
from pipeline.concurrency.pool_state import Answer
from pipeline.concurrency.scope import Scope, stack_of
from pipeline.concurrency.server import fork_server, preparation
from pipeline.concurrency.shared import (
    HAS_SHARED_MEMORY,
    Pinning,
    Slot,
    SlotFile,
    map_slots,
    view_file,
    view_slot,
)
from pipeline.concurrency.shared_lock import SharedLock
from pipeline.concurrency.switching import short_switch_interval
from pipeline.concurrency.watchdog import watch
from pipeline.concurrency.writer import Writer

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
