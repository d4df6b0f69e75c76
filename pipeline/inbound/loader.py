"""The inbound belt by itself, for a loop of the user's own: `Loader`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from types import TracebackType
from typing import Any

import torch

from pipeline.batch import Batch
from pipeline.data import MapSource, as_source
from pipeline.device import Backend, make_transfer, select_backend
from pipeline.errors import ConfigError
from pipeline.inbound.belt import Inbound
from pipeline.inbound.fixed import pinned_place
from pipeline.inbound.shared_data import agreed_seed, shares_order, warn_of_all_samples
from pipeline.ranks import ranks
from pipeline.report.placement_report import PlacementReport
from pipeline.settings import Placement, Settings


class Loader:
    """Makes batches where that costs the loop least, and brings them to the device.

        with Loader(dataset, batch_size=64, shuffle=True) as loader:
            for epoch in range(10):
                for inputs, target in loader:
                    train(inputs, target)

    Each iteration is an epoch: its order and each sample's random numbers come from ``(seed, epoch)``, and
    so are the same wherever batches are made. A batch that you keep stays valid. In a process group each rank
    has its share of a dataset, in as many batches as the others; which rank this is counts when an iteration
    begins, so that a loader may be made before the group.

    What yields batches itself (a generator, an iterator, an object of yours) may be read up to `depth`
    batches ahead, on another thread: its code runs before the loop has used the batches in between, so it
    must not depend on what the loop does with them. An iterator has one epoch, as in a plain loop; if the
    loop is left early, what was read ahead of it is gone.

    Args:
        data: A map-style or iterable dataset (with `batch_size`), a DataLoader, or any iterable of batches.
        batch_size: Samples per batch, if `data` is a dataset.
        shuffle: Draw a new order of the dataset for each epoch.
        drop_last: Leave out a last batch that is not full.
        collate_fn: Makes a batch of a list of samples; torch's `default_collate` unless told.
        num_shards: Into which an iterable dataset splits itself, as for as many workers of a DataLoader.
        seed: Decides the order and the random numbers of each sample. None takes what torch was seeded with
            (`torch.initial_seed`) when an iteration begins. Of ranks that share a dataset it is rank zero's,
            so all of them must begin together.
        placement: As for the Trainer; ``auto`` measures the loop that asks for the batches.
        num_workers: Threads or processes; 0 is as many as there are cores for this process.
        threads_per_worker: Threads of each worker process, with ``placement="process"``.
        check_data: As for the Trainer.
        depth: Batches that are made ahead, at most.
        device: Where the batches go; ``auto`` takes the accelerator that is there.
        stall_timeout_s: Longest wait for a batch; None waits for ever.
        in_order: Hand batches over in the epoch's order. If False, they come as they are ready, each once:
            one that takes long holds up no other, but the order depends on timing, and so do the weights of
            what is trained on it. That is why the Trainer has no such setting. The first batch of an epoch
            comes first all the same, and a batch waits for those given to its worker process before it.

    Attributes:
        epoch: Of the next iteration; set it to go on where an earlier run was.
        sets_draws_apart: No draw of the data's comes from a generator that others use.

    Raises:
        ConfigError: If the settings do not fit each other, the data or the ranks.
        StallError: While iterating, if no batch came for too long.
        Exception: While iterating, the dataset's own, when its batch's turn comes.

    Runs on:
        The caller's thread; threads end with each iteration, worker processes with the `with`, or when
        nobody has the loader any more.
    """

    sets_draws_apart = True

    def __init__(
        self,
        data: Any,
        *,
        batch_size: int | None = None,
        shuffle: bool = False,
        drop_last: bool = False,
        collate_fn: Callable[[list[Any]], Batch] | None = None,
        num_shards: int = 1,
        seed: int | None = None,
        placement: Placement = "auto",
        num_workers: int = 0,
        threads_per_worker: int = 1,
        check_data: bool = True,
        depth: int = 8,
        device: str | torch.device | Backend = "cpu",
        stall_timeout_s: float | None = 600.0,
        in_order: bool = True,
    ) -> None:
        try:
            settings = Settings(
                placement=placement,
                num_workers=num_workers,
                threads_per_worker=threads_per_worker,
                prefetch_depth=depth,
                seed=seed,
                stall_timeout_s=stall_timeout_s,
            )
        except ConfigError as error:
            raise ConfigError([each.replace("prefetch_depth", "depth") for each in error.problems]) from None
        seed = settings.seed
        self._data, self._seed, self._is_shared = data, seed, shares_order(data, batch_size)
        self._make_source = partial(
            as_source,
            data,
            name="data",
            batch_size=batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            collate_fn=collate_fn,
            seed=seed,
            num_shards=num_shards,
        )
        backend = select_backend(device)
        self._device = backend.device
        self._make_inbound = partial(
            Inbound,
            transfer=make_transfer(backend, overlaps=True, prepare=None),
            place=pinned_place(settings),
            depth=depth,
            stall_timeout_s=stall_timeout_s,
            in_order=in_order,
            is_trusted=True,
            is_checked=check_data,
        )
        self._open()
        if not in_order and not isinstance(self._source, MapSource):
            raise ConfigError(
                "in_order=False needs a map-style dataset, whose batches can be made in any order, but "
                f"{type(data).__name__} is read by one thread, in its own order. Leave in_order out."
            )
        self.epoch = 0

    def __iter__(self) -> Iterator[Batch]:
        self._settle()
        self.epoch += 1
        return self._keep(self._inbound.batches(self.epoch - 1, None))

    def __len__(self) -> int:
        self._follow_ranks()
        if self._source.num_batches is None:
            raise TypeError("the data does not say how many batches it has")
        return self._source.num_batches

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def placement(self) -> PlacementReport:
        """Where batches are made now, and why."""
        return self._inbound.placement

    def close(self) -> None:
        """End the worker processes, if there are any; a further iteration starts them again."""
        self._inbound.close()

    def _open(self) -> None:
        """Make the belt for this process as one of the ranks that there are now."""
        self._ranks, self._is_agreed = ranks(), False
        self._source = self._make_source(ranks=self._ranks)
        self._inbound = self._make_inbound(self._source)
        weakref.finalize(self, self._inbound.close)

    def _follow_ranks(self) -> None:
        if ranks() != self._ranks:
            self._inbound.close()
            self._open()

    def _settle(self) -> None:
        """See which rank this is and, where ranks share an order, by which seed; an epoch begins.

        Ranks that were given a seed tell each other once, the others at each epoch: torch may be seeded
        between two.
        """
        self._follow_ranks()
        if not self._is_agreed:
            warn_of_all_samples(self._data, "data", stacklevel=3)
        if self._is_shared and (self._seed is None or not self._is_agreed):
            self._source.seed = agreed_seed(self._seed, self._device, is_shared=True)
        self._is_agreed = True

    def _keep(self, batches: Generator[Batch]) -> Iterator[Batch]:
        """Hold this loader while somebody iterates: ``for batch in Loader(…)`` has no other name for it."""
        with closing(batches):
            yield from batches
