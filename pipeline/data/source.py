"""Whatever a user calls data, as one shape: a `Source` that opens a `Reader` for each epoch."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from pipeline.data.fetch import CollateFn
from pipeline.data.reader import IterableSource, MapSource, Source, length_or_none
from pipeline.errors import ConfigError


def as_source(
    data: Any,
    *,
    name: str,
    batch_size: int | None,
    shuffle: bool,
    drop_last: bool,
    collate_fn: CollateFn | None,
    seed: int,
) -> Source:
    """Turn what a user passed as data into a source.

    Args:
        data: A map-style dataset (with a batch size), a DataLoader, or any iterable of batches.
        name: The argument's name, for errors.
        batch_size: Samples per batch, for a dataset; None where `data` yields batches itself.
        shuffle: Draw a new order for each epoch; datasets only.
        drop_last: Leave out a last batch that is not full; datasets only.
        collate_fn: Samples to batch; datasets only.
        seed: The run's seed.

    Raises:
        ConfigError: If the settings do not fit the data, or the data is empty.
    """
    if batch_size is None:
        problem = _batches_problem(data, name, shuffle or drop_last or collate_fn is not None)
        if problem:
            raise ConfigError(problem)
        return IterableSource(data, seed)
    if isinstance(data, IterableDataset):
        loader = DataLoader(data, batch_size, drop_last=drop_last, collate_fn=collate_fn)
        return as_source(
            loader,
            name=name,
            batch_size=None,
            shuffle=shuffle,
            drop_last=False,
            collate_fn=None,
            seed=seed,
        )
    problem = _samples_problem(data, name, batch_size)
    if problem is None and drop_last and len(data) < batch_size:
        problem = f"{name} has {len(data)} samples, fewer than one batch of {batch_size}, and \
drop_last leaves none. Lower batch_size or set drop_last=False."
    if problem:
        raise ConfigError(problem)
    return MapSource(
        data,
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        collate_fn=collate_fn,
        seed=seed,
    )


def _batches_problem(data: Any, name: str, has_sample_settings: bool) -> str | None:
    found = type(data).__name__
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return f"{name} is a dataset of samples ({found}): say how many make a batch with batch_size=64."
    if isinstance(data, torch.Tensor) or not isinstance(data, Iterable):
        return (
            f"{name} must be a dataset (with batch_size=), a DataLoader or an iterable of batches, "
            f"got {found}."
        )
    if has_sample_settings:
        return (
            f"shuffle, drop_last and collate_fn need a dataset of samples and batch_size=, but {name} "
            f"({found}) yields batches itself. Set them there, or pass its dataset."
        )
    if length_or_none(data) == 0:
        return f"{name} ({found}) is empty: it yields no batch."
    return None


def _samples_problem(data: Any, name: str, batch_size: int) -> str | None:
    found = type(data).__name__
    if isinstance(batch_size, bool) or not isinstance(batch_size, numbers.Integral) or batch_size < 1:
        return f"batch_size must be an integer of 1 or more, got {batch_size!r}."
    if isinstance(data, DataLoader):
        return f"{name} is a DataLoader, which has a batch size of its own: leave out batch_size."
    if not hasattr(data, "__getitem__") or not isinstance(data, Sized):
        return (
            f"{name} with batch_size must have __getitem__ and __len__, got {found}. "
            "Leave out batch_size if it yields batches."
        )
    return f"{name} ({found}) is empty: it has no sample." if len(data) == 0 else None
