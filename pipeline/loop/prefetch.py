"""The inbound belt: batches made ahead on one thread, or in line with the loop.

sampler → fetch → collate → pin + H2D  ⇒  (a bounded channel)  ⇒  loop
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable
from contextlib import closing
from typing import Any

import torch

from pipeline.batch import Batch
from pipeline.concurrency import Channel, ChannelClosedError, Scope
from pipeline.data import END, Reader, Source, UnhookableDrawError, as_source
from pipeline.device import Backend, Transfer, make_transfer, select_backend
from pipeline.errors import add_stage_note


def read_in_line(reader: Reader, transfer: Transfer) -> Generator[Batch]:
    """Yield the batches of an epoch as a plain loop makes them: one when it is asked for."""
    while (batch := reader.read()) is not END:
        yield batch if transfer.is_identity else transfer.receive(transfer.send(batch))


def read_ahead(source: Source, reader: Reader, transfer: Transfer, depth: int) -> Generator[Batch]:
    """Yield the same batches, made ahead by a thread that ends with the generator.

    The first one is made on the loop thread, which shows whether a thread can make the rest; where
    one cannot, they are made in line and a warning says why.

    Args:
        source: Where the reader comes from.
        reader: One epoch's batches.
        transfer: To the device.
        depth: Batches that may wait for the loop.

    Runs on:
        Loop thread; blocks, with the GIL released, while no batch is there.
    """
    batch = reader.first()
    if batch is END:
        return
    first = transfer.send(batch, is_fresh=source.makes_fresh_batches)
    if reader.is_threadable:
        with Scope() as scope:
            channel: Channel[Any] = Channel(depth)

            def fill() -> None:
                _fill(channel, reader, transfer, source.makes_fresh_batches)

            scope.start(fill, name="prefetch", stop=channel.abandon)
            yield transfer.receive(first)
            for sent in channel:
                yield transfer.receive(sent)
    else:
        yield transfer.receive(first)
    if not reader.is_threadable:
        _warn_in_line(source)
        yield from read_in_line(reader, transfer)


def _fill(channel: Channel[Any], reader: Reader, transfer: Transfer, is_fresh: bool) -> None:
    """Make batches until they end; prefetch thread."""
    error: BaseException | None = None
    try:
        while reader.is_threadable and (batch := reader.read_in_thread()) is not END:
            channel.put(_send(transfer, batch, is_fresh, reader.position - 1))
    except (ChannelClosedError, UnhookableDrawError):
        pass  # nobody wants more; or the loop thread goes on from here
    except BaseException as raised:
        error = raised  # travels to the loop behind the batches that were made before it
    channel.close(error)


def _send(transfer: Transfer, batch: Batch, is_fresh: bool, position: int) -> Any:
    try:
        return transfer.send(batch, is_fresh=is_fresh)
    except Exception as error:
        add_stage_note(error, "transfer", step=position)
        raise


def _warn_in_line(source: Source) -> None:
    names = ", ".join(source.unhookable)
    warnings.warn(
        f"random numbers were drawn from {names} while a batch was made. Threads share that generator, so "
        "batches are made on the loop thread from here on, with the same numbers and without overlap. "
        "Draw from torch's functions that take a generator, or pass a DataLoader with num_workers=1.",
        stacklevel=2,
    )


def prefetch(
    batches: Iterable[Batch],
    *,
    device: str | torch.device | Backend = "auto",
    depth: int = 8,
) -> Generator[Batch]:
    """Bring batches to the device ahead of a loop of your own.

        for batch in prefetch(loader, device="cuda"):
            loss = step(batch)

    Args:
        batches: A DataLoader, or any iterable of tensors, tuples, lists, dicts or dataclasses of them.
        device: Where the batches go; ``auto`` takes the accelerator that is there.
        depth: Batches that may wait. Memory is bounded by this many and one in the making.

    Yields:
        The same batches, on the device, in the same order. One that you keep stays valid.

    Raises:
        ConfigError: If `batches` yields none, or the device is not there.
        Exception: Whatever `batches` raises, when its turn comes.

    Runs on:
        The caller's thread, and one thread that ends with the loop; leaving the loop early ends it
        when the generator is closed or goes out of scope.
    """
    if depth < 1:
        raise ValueError(f"depth must be 1 or more, got {depth}.")
    source = as_source(
        batches, name="batches", batch_size=None, shuffle=False, drop_last=False, collate_fn=None, seed=0
    )
    transfer = make_transfer(select_backend(device), overlaps=True, prepare=None)
    return _prefetch(source, transfer, depth)


def _prefetch(source: Source, transfer: Transfer, depth: int) -> Generator[Batch]:
    with closing(read_ahead(source, source.open(0), transfer, depth)) as batches:
        yield from batches
