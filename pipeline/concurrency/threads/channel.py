"""A bounded channel from producer threads to one consumer thread: in order, handed over in bursts.

A producer claims the next **position**, makes what belongs there, and puts it. However many producers
there are and whoever is first, the consumer sees the positions in order; or, from an `UnorderedChannel`, as
they are ready.

Waking a thread costs the consumer two lost GILs, some 100 µs a step when it happens per item. So a
producer that found every position within the depth claimed sleeps until the consumer has drained what is
ready to the **low-water mark**; and while the next item is there the consumer takes no lock but one that is
free. A producer that is awake claims what there is, so those that are not needed to keep up sleep until
they are.

Why that is safe. What is ready lies in a dict: a producer adds a key, the consumer takes it out, and each
of the two is atomic, with the GIL and without it. Everything else changes under the lock. A producer goes
to sleep under the lock, having seen too many positions claimed; the consumer, whenever that may have
changed, takes the lock and wakes it. A producer puts under the lock, so a consumer that found nothing
under the lock is always woken.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pipeline.errors import StallError

Item = TypeVar("Item")

_NOTHING: Any = object()


class ChannelClosedError(Exception):
    """Nothing more is wanted: the producer may stop."""


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """How a channel was used.

    Args:
        num_items: Items put so far.
        num_full: How often a producer had to wait because the channel was full.
        num_empty: How often the consumer had to wait because the next item was not there.
        depth: The most items that are made ahead.
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
    """Bounded, ordered hand-over from any number of threads to one.

    Args:
        depth: The most positions claimed and not yet taken: items in the making and items that wait.
        low_water: Wake waiting producers when this many items wait. A quarter of the depth unless told;
            it must cover the slowest item, or the consumer runs dry.
        start: The first position.
        stall_timeout_s: How long the consumer waits for one item; None for ever.

    Attributes:
        position: Of the item that the consumer takes next.
        left: Positions that were given up, where the stream does not end before the first of them.
    """

    def __init__(
        self,
        depth: int,
        low_water: int | None = None,
        start: int = 0,
        stall_timeout_s: float | None = None,
    ) -> None:
        self._depth, self._stall_timeout_s = depth, stall_timeout_s
        self._low_water = min(depth // 4 if low_water is None else low_water, depth - 1)
        self._ready: dict[int, Item] = {}
        # Reentrant: the collector may close an abandoned belt while this thread holds the lock.
        lock = threading.RLock()
        self._lock = lock
        self._drained = threading.Condition(lock)
        self._filled = threading.Condition(lock)
        self._is_consumer_waiting = False
        self.position = self._claimed = start
        self._end = sys.maxsize  # no item at this position or behind it
        self._error: BaseException | None = None
        self._num_items = self._num_full = self._num_empty = 0
        self.left: list[int] = []

    def claim(self) -> int:
        """Return the next position to be made; wait while the channel is full.

        Raises:
            ChannelClosedError: If nothing more is wanted.

        Runs on:
            A producer's thread. Blocks with the GIL released, without polling.
        """
        with self._lock:
            if self._claimed - self.position >= self._depth:
                self._num_full += 1
                while self._must_sleep() and self._claimed < self._end:
                    self._drained.wait()
            if self._claimed >= self._end:
                raise ChannelClosedError
            self._claimed += 1
            return self._claimed - 1

    def put(self, position: int, item: Item) -> None:
        """Hand over what belongs at a claimed position."""
        with self._lock:
            if position < self._end:
                self._ready[position] = item
                self._num_items += 1
                if self._is_consumer_waiting:
                    self._filled.notify()

    def end(self, position: int, error: BaseException | None = None) -> None:
        """End the stream before this position; the consumer raises `error`, if any, when it gets there."""
        with self._lock:
            if position < self._end:
                self._end, self._error = position, error
            self._drained.notify_all()
            self._filled.notify()

    def give_up(self, position: int) -> None:
        """Say that a claimed position is not made here: nobody claims any more, the stream ends before it."""
        self.end(position)

    def stop(self) -> None:
        """Let nobody claim any more; the consumer still gets what was claimed."""
        with self._lock:
            self.end(self._claimed)

    def abandon(self) -> None:
        """Tell the producers that nobody takes items any more, and drop those that wait."""
        with self._lock:
            self.end(-1)
            self._ready.clear()

    def __iter__(self) -> Iterator[Item]:
        """Yield the items in order until the stream ends.

        Raises:
            StallError: If no item came for `stall_timeout_s`.
            BaseException: What the stream ended with.

        Runs on:
            The consumer's thread. Blocks, with the GIL released, only while the next item is missing.
        """
        ready, low_water = self._ready, self._low_water
        while True:
            item = self._take()
            if item is _NOTHING:
                if not self._wait_for_item():
                    return
                continue
            self.position += 1
            if len(ready) <= low_water:
                with self._lock:
                    self._drained.notify_all()
            yield item

    def statistics(self) -> ChannelStatistics:
        """Return the counts so far; exact once both sides have finished."""
        return ChannelStatistics(self._num_items, self._num_full, self._num_empty, self._depth)

    def _take(self) -> Item:
        """Take what comes next out of what is ready, or return `_NOTHING`."""
        item: Item = self._ready.pop(self.position, _NOTHING)
        return item

    def _must_sleep(self) -> bool:
        return self._claimed - self.position >= self._depth or len(self._ready) > self._low_water

    def _wait_for_item(self) -> bool:
        """Return whether the next item is there, or the stream has ended before it."""
        with self._lock:
            if not self._has_word():
                self._num_empty += 1
                self._is_consumer_waiting = True
                try:
                    has_word = self._filled.wait_for(self._has_word, self._stall_timeout_s)
                finally:
                    self._is_consumer_waiting = False
                if not has_word and self._stall_timeout_s is not None:
                    raise StallError(self._stall_timeout_s, statistics=self.statistics())
            if self._is_next_ready():
                return True
            if self._error is not None:
                raise self._error
            return False

    def _has_word(self) -> bool:
        return self._is_next_ready() or self._is_over()

    def _is_next_ready(self) -> bool:
        return self.position in self._ready

    def _is_over(self) -> bool:
        return self.position >= self._end


class UnorderedChannel(Channel[Item]):
    """The same without the order: items are handed over as they are put, and one that is late holds up none.

    `position` counts what was taken, from the first one on. A position that was given up is in `left`; the
    others that were claimed are still handed over. An error is raised once what is ready has been taken:
    what is still being made is not waited for.
    """

    def give_up(self, position: int) -> None:
        with self._lock:
            self.left.append(position)
            self.stop()

    def _take(self) -> Item:
        with self._lock:  # a dict must not grow while its first key is looked for
            first = next(iter(self._ready), None)
            return _NOTHING if first is None else self._ready.pop(first)

    def _is_next_ready(self) -> bool:
        return bool(self._ready)

    def _is_over(self) -> bool:
        num_left = sum(position < self._end for position in self.left)
        return self._error is not None or self.position + num_left >= self._end
