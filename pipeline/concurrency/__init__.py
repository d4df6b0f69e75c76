"""Threads and what they hand each other. Standard library only; nothing else starts a thread."""

from pipeline.concurrency.channel import Channel, ChannelClosedError, ChannelStatistics
from pipeline.concurrency.scope import Scope
from pipeline.concurrency.writer import Writer

__all__ = ["Channel", "ChannelClosedError", "ChannelStatistics", "Scope", "Writer"]
