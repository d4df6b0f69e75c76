"""The places where batches are made: in line with the loop, or ahead of it on threads.

sampler → fetch → collate → pin + H2D  ⇒  (a bounded channel)  ⇒  loop

Worker processes are behind a reader of their own (`ProcessReader`), which either of the two can read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch

from pipeline.batch import Batch
from pipeline.checks import REPEATED, Limits, Noted, Trial
from pipeline.concurrency import Channel, ChannelClosedError, Scope, UnorderedChannel
from pipeline.data import END, Reader
from pipeline.device import Transfer
from pipeline.errors import add_stage_note
from pipeline.randomness import UnhookableDrawError
from pipeline.randomness.seeds import reading_ahead
from pipeline.watch.stall import locating
from pipeline.watch.thread_times import LaneClock, ThreadTimes

STAGES = ("put", "fetch", "transfer")
PUT, FETCH, TRANSFER = range(3)

Make: TypeAlias = Callable[[int], Batch]


class Workers(Protocol):
    """Starts worker processes without waiting for them.

    Attributes:
        num_pauses: Returns how often the loop did something else than train, such as validate.
    """

    num_pauses: Callable[[], int]

    def start_processes(self, num_workers: int, num_threads: int = 1) -> bool:
        """See that they are there or on their way; say whether they are there.

        Args:
            num_workers: How many.
            num_threads: Of each.

        Raises:
            PipelineError: If the data cannot be taken to a process.
        """

    def stop_processes(self) -> None:
        """Let go of them."""

    def limits(self) -> Limits:
        """Return where batches may be made, as far as is known."""


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
        yield brought(batch, transfer)


def brought(batch: Batch, transfer: Transfer) -> Batch:
    """Return a batch on the device, as a plain loop brings it there."""
    return batch if transfer.is_identity else transfer.receive(transfer.send(batch))


def read_checked(reader: Reader, transfer: Transfer, trial: Trial, position: int) -> Generator[Batch]:
    """Yield batches that somebody else makes, some of them compared with the loop's first.

    Args:
        reader: Of those batches, in order.
        transfer: To the device.
        trial: Compares.
        position: Of the first one, in its epoch.
    """
    while (batch := reader.read()) is not END:
        item = trial.hand_on(position, batch, transfer.send)
        yield transfer.receive(trial.settle(item) if type(item) is Noted else item)
        position += 1


def read_ahead(
    reader: Reader,
    transfer: Transfer,
    depth: int,
    num_threads: int = 1,
    *,
    is_fresh: bool = True,
    is_leased: bool = False,
    in_order: bool = True,
    stall_timeout_s: float | None = None,
    goes_on: Callable[[], bool] = always,
    times: ThreadTimes | None = None,
    trial: Trial | None = None,
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
        is_leased: Whether nobody writes to a batch's memory as long as it lives.
        in_order: Otherwise the first is followed by whatever is ready; with random access only.
        stall_timeout_s: How long the loop waits for one batch; None for ever.
        goes_on: Asked after each batch; once not, those that are being made are the last.
        times: Told how the threads spent theirs.
        trial: Compares batches with the loop's; with its references the threads begin.

    Raises:
        StallError: If no batch came for so long.
        DoubtError: If a batch came out differently.

    Runs on:
        Loop thread; blocks, with the GIL released, while no batch is there.
    """
    first, send, trial = [], partial(transfer.send, is_fresh=is_fresh, is_leased=is_leased), trial or Trial()
    if not reader.is_known and not trial.references:  # which were made as a thread would, or else are known
        if (batch := reader.first()) is END:
            return
        first.append(send(batch))
        if not reader.is_threadable:
            yield transfer.receive(first.pop())
            return
    with Scope(stall_timeout_s) as scope:
        kind: type[Channel[Any]] = Channel if in_order else UnorderedChannel
        first_new = reader.position
        start = min([first_new, *trial.references])  # they lie right before it
        channel = kind(depth, start=start, stall_timeout_s=stall_timeout_s)
        makers: dict[int, threading.Thread] = {}
        times, enters_mode = times or ThreadTimes(), _entering_mode()

        def fill() -> None:
            with transfer.on_device(), times.clock(STAGES) as clock, reading_ahead():
                _fill(channel, reader, enters_mode, send, makers, clock, trial)

        threads = [
            scope.start(fill, name=f"prefetch/{number}" if number else "prefetch", stop=channel.abandon)
            for number in range(num_threads)
        ]
        if first:
            yield transfer.receive(first.pop())
        with locating(lambda: makers.get(min(list(makers), default=-1), threads[0])):
            for item in channel:
                if item is REPEATED:
                    continue
                sent = trial.settle(item) if type(item) is Noted else item
                yield transfer.receive(sent)
                if not goes_on():
                    channel.stop()
        for position in sorted(channel.left):
            reader.position = position
            if (batch := reader.first()) is not END:  # which finds out what it draws
                yield transfer.receive(send(batch))
        if reader.is_random_access:  # threads may have made some of those behind it
            reader.position = max(channel.position + len(channel.left), first_new)


def _fill(
    channel: Channel[Any],
    reader: Reader,
    enters_mode: Callable[[Make], Make],
    send: Callable[[Batch], Any],
    makers: dict[int, threading.Thread],
    clock: LaneClock,
    trial: Trial,
) -> None:
    """Make batches until they end; prefetch thread."""
    make, thread = enters_mode(reader.thread_maker()), threading.current_thread()
    position = channel.position
    try:
        while True:
            clock.enter(PUT)
            position = channel.claim()
            clock.enter(FETCH)
            if not reader.is_threadable:
                return channel.give_up(position)
            makers[position] = thread
            if (batch := make(position)) is END:
                return channel.end(position)
            clock.enter(TRANSFER)
            channel.put(position, trial.hand_on(position, batch, partial(_send, send, position)))
            del makers[position]
    except ChannelClosedError:
        return None  # nobody wants more
    except UnhookableDrawError:  # the loop thread makes it
        del makers[position]
        return channel.give_up(position)
    except BaseException as error:  # travels to the loop behind the batches that come before it
        return channel.end(position, trial.blamed(position, error))


def _entering_mode() -> Callable[[Make], Make]:
    """Return what has batches made in torch's modes of the calling thread, which a new one does not inherit.

    Only the making: pinned memory that was made in inference mode could not be used again outside of it.
    """
    is_grad, is_inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    modes: list[Callable[[], Any]] = []
    if not is_grad or is_inference:
        modes = [partial(torch.inference_mode, is_inference), partial(torch.set_grad_enabled, is_grad)]
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            modes.append(partial(torch.autocast, kind, torch.get_autocast_dtype(kind)))
    if (device := torch.get_default_device()).type != "cpu":
        modes.append(lambda: device)

    def enters_mode(make: Make) -> Make:
        def make_in_mode(position: int) -> Batch:
            with ExitStack() as stack:
                for mode in modes:
                    stack.enter_context(mode())
                return make(position)

        return make_in_mode if modes else make

    return enters_mode


def _send(send: Callable[[Batch], Any], position: int, batch: Batch) -> Any:
    try:
        return send(batch)
    except Exception as error:
        add_stage_note(error, "transfer", batch=position)
        raise
