"""Batches ahead of a loop of the user's own: `prefetch`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from pipeline.batch import Batch
from pipeline.data import as_source
from pipeline.device import Backend, make_transfer, select_backend
from pipeline.errors import ConfigError
from pipeline.inbound.belt import Inbound
from pipeline.inbound.decide_placement import INLINE


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

    Attributes:
        epoch: Of the next iteration, which decides what is drawn.

    Raises:
        ConfigError: If `batches` is no iterable of batches, or the device is not there.
        Exception: While iterating, whatever `batches` raises, when its turn comes.

    Runs on:
        The caller's thread, and one thread that ends with the loop; leaving the loop early ends it as
        soon as the iterator is closed or goes out of scope.
    """

    sets_draws_apart = True  # from those of the model

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
            seed=None,
        )
        transfer = make_transfer(select_backend(device), overlaps=True, prepare=None)
        self._inbound = Inbound(self._source, transfer, INLINE, depth, None)
        self.epoch = 0

    def __iter__(self) -> Iterator[Batch]:
        self.epoch += 1
        return self._inbound.batches(self.epoch - 1, None)

    def __len__(self) -> int:
        if self._source.num_batches is None:
            raise TypeError("the batches that are prefetched do not say how many they are")
        return self._source.num_batches
