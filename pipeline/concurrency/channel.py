"""A bounded channel from one producer thread to one consumer thread, handed over in bursts.

Waking a thread costs the consumer two lost GILs, some 100 µs a step when it happens per item. So a
producer that found the channel full sleeps until it has drained to the **low-water mark**, then
fills it in one go; and while there is something to take the consumer takes no lock, but for the one
wake-up of each burst.

Why that is safe. Only the producer appends and only the consumer pops; `deque` makes each of the
two atomic, with the GIL and without it. A producer goes to sleep only when the channel is full, and
until it wakes only pops happen, so the length passes through `low_water` exactly once: the consumer
that sees that length takes the lock and wakes it. Either the producer was already waiting, or it
still holds the lock and will see the drained channel before it waits: no wake-up is lost. The
producer takes the lock for each append, so a consumer that found the channel empty under the lock
is always woken.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from pipeline.errors import StallError

Item = TypeVar("Item")


class ChannelClosedError(Exception):
    """The consumer has gone: the producer may stop."""


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """How a channel was used.

    Args:
        num_items: Items put so far.
        num_full: How often the producer had to wait because the channel was full.
        num_empty: How often the consumer had to wait because the channel was empty.
        depth: The most items that the channel holds.
    """

    num_items: int
    num_full: int
    num_empty: int
    depth: int

    def __str__(self) -> str:
        return (
            f"{self.num_items} items put, at most {self.depth} at once; full {self.num_full} times, "
            f"empty {self.num_empty} times"
        )


class Channel(Generic[Item]):
    """Bounded first-in-first-out hand-over between two threads.

    Args:
        depth: The most items in it; a `put` into a full channel waits. 1 or more.
        low_water: Wake a waiting producer when this many items are left. A quarter of the depth
            unless told; it must cover the slowest item, or the consumer runs dry.
        stall_timeout_s: How long the consumer waits for one item; None for ever.
    """

    def __init__(
        self, depth: int, low_water: int | None = None, stall_timeout_s: float | None = None
    ) -> None:
        self._depth, self._stall_timeout_s = depth, stall_timeout_s
        self._low_water = min(depth // 4 if low_water is None else low_water, depth - 1)
        self._items: deque[Item] = deque()
        # Reentrant: the collector may close an abandoned belt while this thread holds the lock.
        lock = threading.RLock()
        self._lock = lock
        self._drained = threading.Condition(lock)
        self._filled = threading.Condition(lock)
        self._is_consumer_waiting = False
        self._is_closed = False  # no more items will come
        self._is_abandoned = False  # nobody will take any more
        self._error: BaseException | None = None
        self._num_items = self._num_full = self._num_empty = 0

    def put(self, item: Item) -> None:
        """Append an item; wait while the channel is full.

        Raises:
            ChannelClosedError: If the consumer has gone.

        Runs on:
            The producer's thread. Blocks with the GIL released, without polling.
        """
        with self._lock:
            if len(self._items) >= self._depth:
                self._num_full += 1
                while len(self._items) > self._low_water and not self._is_abandoned:
                    self._drained.wait()
            if self._is_abandoned:
                raise ChannelClosedError
            self._items.append(item)
            self._num_items += 1
            if self._is_consumer_waiting:
                self._filled.notify()

    def close(self, error: BaseException | None = None) -> None:
        """End the stream; the consumer raises `error`, if any, after the items before it."""
        with self._lock:
            self._is_closed, self._error = True, error
            self._filled.notify()

    def abandon(self) -> None:
        """Tell the producer that nobody takes items any more, and drop those that wait."""
        with self._lock:
            self._is_abandoned = True
            self._items.clear()
            self._drained.notify()

    def __iter__(self) -> Iterator[Item]:
        """Yield the items in order until the channel is closed.

        Raises:
            StallError: If no item came for `stall_timeout_s`.
            BaseException: What the channel was closed with.

        Runs on:
            The consumer's thread. Blocks, with the GIL released, only while the channel is empty.
        """
        items, low_water = self._items, self._low_water
        while True:
            try:
                item = items.popleft()
            except IndexError:
                if not self._wait_for_item():
                    return
                continue
            if len(items) == low_water:
                with self._lock:
                    self._drained.notify()
            yield item

    def statistics(self) -> ChannelStatistics:
        """Return the counts so far; exact once both sides have finished."""
        return ChannelStatistics(self._num_items, self._num_full, self._num_empty, self._depth)

    def _wait_for_item(self) -> bool:
        with self._lock:
            if not self._items and not self._is_closed:
                self._num_empty += 1
                self._is_consumer_waiting = True
                try:
                    is_there = self._filled.wait_for(
                        lambda: self._items or self._is_closed, self._stall_timeout_s
                    )
                finally:
                    self._is_consumer_waiting = False
                if not is_there and self._stall_timeout_s is not None:
                    raise StallError(self._stall_timeout_s, statistics=self.statistics())
            if self._items:
                return True
            if self._error is not None:
                raise self._error
            return False
