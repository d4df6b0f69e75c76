"""Things that yield batches: of which kind they are, how long, and who makes their batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate
from torch.utils.data.dataloader import _BaseDataLoaderIter

from pipeline.randomness.seeds import drawing_from
from pipeline.user_code import is_users

_KNOWN_LOADERS = ("torch.utils.data", "torchdata", "spdl", "grain", "webdataset")


def is_known_kind(batches: Any) -> bool:
    """Say whether batches come from a loader whose code is known, or lie there."""
    return (
        type(batches) in (list, tuple)
        or _is_plain_loader(batches)
        or any(type(batches).__module__.startswith(name) for name in _KNOWN_LOADERS)
    )


def is_read_once(batches: Any) -> bool:
    """Say whether this is an iterator that is known never to begin anew.

    One of a class of the user's own may do so in its ``__iter__``; generators, ``zip`` and the like cannot.
    """
    is_pythons = type(batches).__module__ in ("builtins", "itertools") and isinstance(batches, Iterator)
    return is_pythons or isinstance(batches, _BaseDataLoaderIter)


def have_own_memory(batches: Any) -> bool:
    """Say whether each batch is known to lie in memory that none of the others is written to."""
    if not _is_plain_loader(batches):
        return type(batches) in (list, tuple)
    return batches.num_workers > 0 or batches.collate_fn is default_collate


def _is_plain_loader(batches: Any) -> bool:
    """Say whether this is a DataLoader, or derived from it without an ``__iter__`` of the user's own."""
    home = getattr(type(batches).__iter__, "__module__", None) if isinstance(batches, DataLoader) else ""
    return isinstance(batches, DataLoader) and not is_users(home or "")


def length_or_none(data: Any) -> int | None:
    """Return the length of whatever has one; None if it has none, or raises when it is asked.

    A DataLoader notes that it was asked, and warns later of batches beyond its length: that is put back.
    """
    noted = getattr(data, "_IterableDataset_len_called", None)
    try:
        return len(data)
    except Exception:  # a stream says in many ways that it has no length
        return None
    finally:
        if isinstance(data, DataLoader):
            data._IterableDataset_len_called = noted


@contextmanager
def fetching_from(loader: Any, draws: torch.Generator) -> Iterator[None]:
    """Have a DataLoader's iterator make its batches, but not draw its order, from a generator of their own.

    It has what makes them in this process in an attribute, as do torchdata's; other loaders, and those with
    workers, are left alone.
    """
    fetcher = getattr(loader, "_dataset_fetcher", None)
    if fetcher is None:
        yield
        return
    loader._dataset_fetcher = _Fetcher(fetcher, draws)
    try:
        yield
    finally:
        loader._dataset_fetcher = fetcher


class _Fetcher:
    """A DataLoader's fetcher that draws from a generator of its own."""

    def __init__(self, fetcher: Any, draws: torch.Generator) -> None:
        self._fetcher, self.draws = fetcher, draws

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fetcher, name)

    def fetch(self, index: Any) -> Any:
        with drawing_from(self.draws):
            return self._fetcher.fetch(index)


class OwnEpoch:
    """The epoch of a sampler or a dataset that has to be told it, such as a DistributedSampler.

    It decides the order as the state of a generator does, and is kept in a checkpoint like one.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner

    @staticmethod
    def is_kept_by(owner: Any) -> bool:
        """Say whether something has an epoch that can be set."""
        return callable(getattr(owner, "set_epoch", None)) and isinstance(getattr(owner, "epoch", None), int)

    def get_state(self) -> torch.Tensor:
        return torch.tensor(self._owner.epoch)

    def set_state(self, state: torch.Tensor) -> None:
        self._owner.set_epoch(int(state))


def end_dead_workers(batches: Any) -> None:
    """Have a DataLoader that keeps its workers start others, if one of those that it has is dead."""
    kept = getattr(batches, "_iterator", None) if isinstance(batches, DataLoader) else None
    if any(not worker.is_alive() for worker in getattr(kept, "_workers", [])):
        batches._iterator = None
