"""The inbound belt: batches made ahead on one thread, or in line with the loop.

sampler → fetch → collate → pin + H2D  ⇒  (a bounded channel)  ⇒  loop
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from typing import Any

import torch

from pipeline.batch import Batch
from pipeline.concurrency import Channel, ChannelClosedError, Scope
from pipeline.data import END, Reader, Source, UnhookableDrawError, as_source
from pipeline.device import Backend, Transfer, make_transfer, select_backend
from pipeline.errors import ConfigError, add_stage_note
from pipeline.gil import stage_cell, stage_id
from pipeline.loop.stall import locating

FETCH, TRANSFER, PUT = stage_id("fetch"), stage_id("transfer"), stage_id("put")


def read_in_line(reader: Reader, transfer: Transfer) -> Generator[Batch]:
    """Yield the batches of an epoch as a plain loop makes them: one when it is asked for."""
    with closing(reader):
        while (batch := reader.read()) is not END:
            yield batch if transfer.is_identity else transfer.receive(transfer.send(batch))


def read_ahead(
    source: Source,
    reader: Reader,
    transfer: Transfer,
    depth: int,
    num_threads: int = 1,
    stall_timeout_s: float | None = None,
) -> Generator[Batch]:
    """Yield the same batches, made ahead by threads that end with the generator.

    The first one is made on the loop thread, which shows whether a thread can make the rest; where
    one cannot, they are made there too, and a warning says why.

    Args:
        source: Where the reader comes from.
        reader: One epoch's batches.
        transfer: To the device.
        depth: Batches that are made ahead.
        num_threads: That make them; one where they can be made in order only.
        stall_timeout_s: How long the loop waits for one batch; None for ever.

    Raises:
        StallError: If no batch came for so long.

    Runs on:
        Loop thread; blocks, with the GIL released, while no batch is there.
    """
    has_warned = False
    with closing(reader):
        while (batch := reader.first()) is not END:
            sent = transfer.send(batch, is_fresh=source.makes_fresh_batches)
            if reader.is_threadable:
                # Until the epoch ends, or the thread meets a batch that it cannot make.
                yield from _from_threads(source, reader, transfer, depth, num_threads, sent, stall_timeout_s)
                continue
            if not has_warned:
                _warn_in_line(source)
                has_warned = True
            yield transfer.receive(sent)


def _from_threads(
    source: Source,
    reader: Reader,
    transfer: Transfer,
    depth: int,
    num_threads: int,
    first: Any,
    stall_timeout_s: float | None,
) -> Generator[Batch]:
    with Scope(stall_timeout_s) as scope:
        channel: Channel[Any] = Channel(depth, start=reader.position, stall_timeout_s=stall_timeout_s)
        threads = []

        def fill() -> None:
            with transfer.on_device():
                _fill(channel, reader, transfer, source.makes_fresh_batches)

        for number in range(num_threads):
            name = "prefetch" if num_threads == 1 else f"prefetch/{number}"
            threads.append(scope.start(fill, name=name, stop=channel.abandon))
        yield transfer.receive(first)
        with locating(threads, channel):
            for sent in channel:
                yield transfer.receive(sent)
        if reader.is_random_access:
            reader.position = channel.position  # threads may have made some of those behind it


def _fill(channel: Channel[Any], reader: Reader, transfer: Transfer, is_fresh: bool) -> None:
    """Make batches until they end; prefetch thread."""
    mark, make = stage_cell(), reader.thread_maker()
    position = channel.position
    try:
        while True:
            mark[0] = PUT
            position = channel.claim()
            mark[0] = FETCH
            if not reader.is_threadable or (batch := make(position)) is END:
                break
            mark[0] = TRANSFER
            channel.put(position, _send(transfer, batch, is_fresh, position))
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


def _warn_in_line(source: Source) -> None:
    names = ", ".join(source.unhookable)
    warnings.warn(
        f"random numbers were drawn from {names} while a batch was made. Threads share that generator, so "
        "batches are made on the loop thread from here on, with the same numbers and without overlap. "
        "Draw from torch's functions that take a generator, or pass a DataLoader with num_workers=1.",
        stacklevel=2,
    )


class prefetch:  # noqa: N801  (it is called like a function, as `enumerate` is)
    """Bring batches to the device ahead of a loop of your own.

        batches = prefetch(loader, device="cuda")
        for epoch in range(10):
            for batch in batches:
                loss = step(batch)

    Iterating yields the same batches, on the device, in the same order; one that you keep stays
    valid. Each iteration begins anew, if `batches` does; ``len`` is that of `batches`.

    Args:
        batches: A DataLoader, or any iterable of tensors, tuples, lists, dicts or dataclasses of them.
        device: Where the batches go; ``auto`` takes the accelerator that is there.
        depth: Batches that may wait. Memory is bounded by this many, one in the making and one in use.

    Raises:
        ConfigError: If `batches` is no iterable of batches, or the device is not there.
        Exception: While iterating, whatever `batches` raises, when its turn comes.

    Runs on:
        The caller's thread, and one thread that ends with the loop; leaving the loop early ends it as
        soon as the iterator is closed or goes out of scope.
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        *,
        device: str | torch.device | Backend = "auto",
        depth: int = 8,
    ) -> None:
        if depth < 1:
            raise ConfigError(f"depth must be 1 or more, got {depth}.")
        self._source = as_source(
            batches,
            name="batches",
            batch_size=None,
            shuffle=False,
            drop_last=False,
            collate_fn=None,
            seed=0,
        )
        self._transfer = make_transfer(select_backend(device), overlaps=True, prepare=None)
        self._depth, self._num_iterations = depth, 0

    def __iter__(self) -> Iterator[Batch]:
        reader = self._source.open(self._num_iterations)
        self._num_iterations += 1
        return read_ahead(self._source, reader, self._transfer, self._depth)

    def __len__(self) -> int:
        if self._source.num_batches is None:
            raise TypeError("the batches that are prefetched do not say how many they are")
        return self._source.num_batches
