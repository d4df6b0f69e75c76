"""The places where batches are made: in line with the loop, or ahead of it on threads.

sampler → fetch → collate → pin + H2D  ⇒  (a bounded channel)  ⇒  loop

Worker processes are behind a reader of their own (`ProcessReader`), which either of the two can read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from typing import Any

from pipeline.batch import Batch
from pipeline.concurrency import Channel, ChannelClosedError, Scope
from pipeline.data import END, Reader, UnhookableDrawError
from pipeline.device import Transfer
from pipeline.errors import add_stage_note
from pipeline.loop.stall import locating
from pipeline.loop.threads import LaneClock, ThreadTimes

STAGES = ("put", "fetch", "transfer")
PUT, FETCH, TRANSFER = range(3)


def always() -> bool:
    """Go on."""
    return True


def read_in_line(
    reader: Reader, transfer: Transfer, goes_on: Callable[[], bool] = always
) -> Generator[Batch]:
    """Yield batches as a plain loop makes them: one when it is asked for.

    Args:
        reader: One epoch's batches.
        transfer: To the device.
        goes_on: Asked before each batch; once not, this ends.
    """
    while goes_on() and (batch := reader.read()) is not END:
        yield batch if transfer.is_identity else transfer.receive(transfer.send(batch))


def read_ahead(
    reader: Reader,
    transfer: Transfer,
    depth: int,
    num_threads: int = 1,
    *,
    is_fresh: bool = True,
    stall_timeout_s: float | None = None,
    goes_on: Callable[[], bool] = always,
    times: ThreadTimes | None = None,
) -> Generator[Batch]:
    """Yield the same batches, made ahead by threads that end with the generator.

    An epoch's first one is made on the loop thread, which shows whether a thread can make more. It ends when
    the epoch does, or before a batch that only the loop thread can make.

    Args:
        reader: One epoch's batches.
        transfer: To the device.
        depth: Batches that are made ahead.
        num_threads: That make them; one where they can be made in order only.
        is_fresh: Whether each batch is known to have memory of its own.
        stall_timeout_s: How long the loop waits for one batch; None for ever.
        goes_on: Asked after each batch; once not, those that are being made are the last.
        times: Told how the threads spent theirs.

    Raises:
        StallError: If no batch came for so long.

    Runs on:
        Loop thread; blocks, with the GIL released, while no batch is there.
    """
    first = []
    if not reader.is_known:
        if (batch := reader.first()) is END:
            return
        first.append(transfer.send(batch, is_fresh=is_fresh))
        if not reader.is_threadable:
            yield transfer.receive(first.pop())
            return
    with Scope(stall_timeout_s) as scope:
        channel: Channel[Any] = Channel(depth, start=reader.position, stall_timeout_s=stall_timeout_s)
        makers: dict[int, threading.Thread] = {}
        times = times or ThreadTimes()

        def fill() -> None:
            with transfer.on_device(), times.clock(STAGES) as clock:
                _fill(channel, reader, transfer, is_fresh, makers, clock)

        threads = [
            scope.start(fill, name=f"prefetch/{number}" if number else "prefetch", stop=channel.abandon)
            for number in range(num_threads)
        ]
        if first:
            yield transfer.receive(first.pop())
        with locating(lambda: makers.get(channel.position, threads[0])):
            for sent in channel:
                yield transfer.receive(sent)
                if not goes_on():
                    channel.stop()
        if reader.is_random_access:
            reader.position = channel.position  # threads may have made some of those behind it


def _fill(
    channel: Channel[Any],
    reader: Reader,
    transfer: Transfer,
    is_fresh: bool,
    makers: dict[int, threading.Thread],
    clock: LaneClock,
) -> None:
    """Make batches until they end; prefetch thread."""
    make, thread = reader.thread_maker(), threading.current_thread()
    position = channel.position
    try:
        while True:
            clock.enter(PUT)
            position = channel.claim()
            makers[position] = thread
            clock.enter(FETCH)
            if not reader.is_threadable or (batch := make(position)) is END:
                break
            clock.enter(TRANSFER)
            channel.put(position, _send(transfer, batch, is_fresh, position))
            del makers[position]
    except ChannelClosedError:
        return  # nobody wants more
    except UnhookableDrawError:
        pass  # the loop thread goes on from here
    except BaseException as error:  # travels to the loop behind the batches that come before it
        channel.end(position, error)
    channel.end(position)


def _send(transfer: Transfer, batch: Batch, is_fresh: bool, position: int) -> Any:
    try:
        return transfer.send(batch, is_fresh=is_fresh)
    except Exception as error:
        add_stage_note(error, "transfer", batch=position)
        raise
