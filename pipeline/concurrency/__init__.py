"""Threads, processes and what they hand each other. Standard library only; nothing else starts one."""

from pipeline.concurrency.channel import Channel, ChannelClosedError, ChannelStatistics
from pipeline.concurrency.child import Child, ChildDiedError
from pipeline.concurrency.scope import Scope, stack_of
from pipeline.concurrency.writer import Writer

__all__ = [
    "Channel",
    "ChannelClosedError",
    "ChannelStatistics",
    "Child",
    "ChildDiedError",
    "Scope",
    "Writer",
    "stack_of",
]
