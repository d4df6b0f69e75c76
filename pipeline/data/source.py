"""Whatever a user calls data, as one shape: a `Source` that opens a `Reader` for each epoch."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Iterable, Sized
from functools import partial
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from pipeline.data.fetch import CollateFn, Fetcher
from pipeline.data.iterable import IterableSource
from pipeline.data.loader_kinds import OwnEpoch, length_or_none
from pipeline.data.map_style import MapSource
from pipeline.data.reader import Source
from pipeline.data.sample_order import BatchPlan, SamplerPlan, num_batches
from pipeline.data.several import several_sets_problem
from pipeline.data.shard_fetch import ShardFetcher
from pipeline.data.shards import ShardedSource
from pipeline.errors import ConfigError
from pipeline.randomness.seeds import Epoch, Moving


def as_source(
    data: Any,
    *,
    name: str,
    batch_size: int | None,
    shuffle: bool = False,
    drop_last: bool = False,
    collate_fn: CollateFn | None,
    seed: int | None,
    ranks: tuple[int, int] = (0, 1),
    num_shards: int = 1,
) -> Source:
    """Turn what a user passed as data into a source.

    Args:
        data: A map-style or iterable dataset (with a batch size), a DataLoader, or any iterable of batches.
        name: The argument's name, for errors.
        batch_size: Samples per batch, for a dataset; None where `data` yields batches itself.
        shuffle: Draw a new order for each epoch; datasets only.
        drop_last: Leave out a last batch that is not full; datasets only.
        collate_fn: Samples to batch; datasets only.
        seed: Of all epochs; None takes torch's, as it is when an epoch begins.
        ranks: This process's rank and the number of ranks that share a dataset's samples. What yields batches
            itself is left as it is, but draws numbers of the rank's own.
        num_shards: Into which an iterable dataset splits itself.

    Raises:
        ConfigError: If the settings do not fit the data, or the data is empty.
    """
    rank, world_size = ranks
    if problem := several_sets_problem(data, name, batch_size):
        raise ConfigError(problem)
    if problem := _shards_problem(data, name, batch_size, num_shards, world_size):
        raise ConfigError(problem)
    if batch_size is None:
        problem = _batches_problem(data, name, shuffle or drop_last or collate_fn is not None)
        if problem:
            raise ConfigError(problem)
        is_safe = _is_safe_to_take_apart(data)
        return take_apart(data, seed, name) if is_safe else IterableSource(data, seed, name, rank)
    if isinstance(data, IterableDataset):
        problem = _iterable_problem(data, name, batch_size, shuffle)
        if problem:
            raise ConfigError(problem)
        fetcher = ShardFetcher(data, batch_size, drop_last, collate_fn, num_shards)
        count = length_or_none(data) if num_shards == 1 else None  # how it splits, nobody knows
        total = None if count is None else num_batches(count, batch_size, drop_last)
        return ShardedSource(fetcher, range(rank, num_shards, world_size), total, name, seed)
    problem = _samples_problem(data, name, batch_size)
    problem = problem or _share_problem(name, len(data), batch_size, drop_last, ranks[1])
    if problem:
        raise ConfigError(problem)
    make_plan = partial(
        _plan,
        data,
        name,
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        rank=ranks[0],
        world_size=ranks[1],
    )
    count = num_batches(len(data) // ranks[1], batch_size, drop_last)
    return MapSource(Fetcher(data, collate_fn), count, make_plan, name, seed)


def take_apart(loader: DataLoader[Any], seed: int | None, name: str) -> MapSource:
    """Return the parts of a DataLoader as a source whose batches may be made anywhere.

    The order is the loader's own, drawn from the global generator as a plain loop over it draws; random
    numbers of a sample come from ``(seed, epoch, index)``.
    """
    batch_sampler: Any = loader.batch_sampler

    def make_plan(epoch: Epoch, num_samples: int | None) -> SamplerPlan:
        # The seed that a DataLoader draws for its workers, though it has none: what the model draws next
        # must not depend on who runs the loader.
        torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
        return SamplerPlan(batch_sampler)

    fetcher = Fetcher(loader.dataset, loader.collate_fn)
    return MapSource(fetcher, len(batch_sampler), make_plan, name, seed)


def _plan(data: Sized, name: str, epoch: Epoch, num_samples: int | None, **settings: Any) -> BatchPlan:
    """Return an epoch's plan for a dataset as long as it is now, or was when a resumed epoch began."""
    batch_size, drop_last, world_size = (settings[each] for each in ("batch_size", "drop_last", "world_size"))
    if problem := _share_problem(name, len(data), batch_size, drop_last, world_size):
        raise ConfigError(problem)
    count = len(data) if num_samples is None else min(num_samples, len(data))
    return BatchPlan(count, epoch=epoch.number, seed=epoch.seed, **settings)


_PLAIN_SAMPLERS = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_SAMPLERS = (*_PLAIN_SAMPLERS, DistributedSampler)


def _is_safe_to_take_apart(data: Any) -> bool:
    """Say whether a DataLoader is no more than its parts.

    Its samplers are torch's own, which draw at the start of an epoch if at all; it has no workers, whose
    number is its user's choice; and nothing that is called in a worker.
    """
    if type(data) is not DataLoader or isinstance(data.dataset, IterableDataset):
        return False
    batches: Any = data.batch_sampler
    return (
        type(batches) is BatchSampler
        and type(batches.sampler) in _SAMPLERS
        and _has_numbers(batches.sampler)
        and length_or_none(batches) is not None
        and data.num_workers == 0
        and data.worker_init_fn is None
    )


def _has_numbers(sampler: Any) -> bool:
    """Say whether samples go by their number, and not by the key of a dict."""
    if type(sampler) is not SubsetRandomSampler or isinstance(sampler.indices, torch.Tensor):
        return True
    return all(isinstance(index, numbers.Integral) for index in sampler.indices)


def own_generators(*data: Any) -> list[Moving]:
    """Return the generators that DataLoaders and their samplers keep for themselves, and their epochs."""
    owners = list(data)
    for loader in data:
        if isinstance(loader, DataLoader):
            owners += [loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)]
            owners.append(loader.dataset)
    unique = {id(each): each for each in owners}.values()
    found = [getattr(each, "generator", None) for each in unique]
    generators = {id(each): each for each in found if isinstance(each, torch.Generator)}.values()
    return [*generators, *(OwnEpoch(each) for each in unique if OwnEpoch.is_kept_by(each))]


def is_shared_out(loader: DataLoader[Any]) -> bool:
    """Say whether a DataLoader may give each rank samples of its own; torch's plain samplers do not."""
    batches: Any = loader.batch_sampler
    if isinstance(loader.dataset, IterableDataset) or type(batches) not in (BatchSampler, type(None)):
        return True
    return type(loader.sampler if batches is None else batches.sampler) not in _PLAIN_SAMPLERS


def _batches_problem(data: Any, name: str, has_sample_settings: bool) -> str | None:
    found = type(data).__name__
    is_map_style = isinstance(data, Dataset) or hasattr(data, "__getitems__")  # as Hugging Face's
    if is_map_style and not isinstance(data, IterableDataset):
        return f"{name} is a dataset of samples ({found}): say how many make a batch with batch_size=64."
    if isinstance(data, (torch.Tensor, str, bytes)) or not isinstance(data, Iterable):
        called = f"{getattr(data, '__name__', 'it')}()"
        hint = f" Call it: pass {called}; for several epochs an object whose __iter__ returns {called}."
        return (
            f"{name} must be a dataset (with batch_size=), a DataLoader or an iterable of batches, "
            f"got {found}." + (hint if inspect.isroutine(data) else "")
        )
    if has_sample_settings:
        return (
            f"shuffle, drop_last and collate_fn need a dataset of samples and batch_size=, but {name} "
            f"({found}) yields batches itself. Set them there, or pass its dataset."
        )
    if length_or_none(data) == 0:
        return f"{name} ({found}) is empty: it yields no batch."
    return None


def _shards_problem(
    data: Any, name: str, batch_size: int | None, num_shards: int, world_size: int
) -> str | None:
    if not isinstance(num_shards, numbers.Integral) or num_shards < 1:
        return f"num_shards must be an integer of 1 or more, got {num_shards!r}."
    if batch_size is None or not isinstance(data, IterableDataset):
        if num_shards == 1:
            return None
        return (
            f"num_shards is for an IterableDataset with batch_size=, but {name} is a {type(data).__name__} "
            f"with batch_size={batch_size}. Leave out num_shards."
        )
    if num_shards % world_size:
        return (
            f"{world_size} ranks share the shards of {name}, so num_shards must be a multiple of that, "
            f"got {num_shards}. Set num_shards={-(-num_shards // world_size) * world_size}; if the dataset "
            "gives each rank its part itself, pass DataLoader(dataset, batch_size) instead."
        )
    return None


def _iterable_problem(data: Any, name: str, batch_size: int, shuffle: bool) -> str | None:
    found = type(data).__name__
    if problem := _batch_size_problem(batch_size):
        return problem
    if shuffle:
        return f"shuffle needs samples with numbers, but {name} ({found}) has none. Shuffle in its __iter__."
    return f"{name} ({found}) is empty: it yields no sample." if length_or_none(data) == 0 else None


def _batch_size_problem(batch_size: int) -> str | None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, numbers.Integral) or batch_size < 1:
        return f"batch_size must be an integer of 1 or more, got {batch_size!r}."
    return None


def _samples_problem(data: Any, name: str, batch_size: int) -> str | None:
    found = type(data).__name__
    if problem := _batch_size_problem(batch_size):
        return problem
    if isinstance(data, DataLoader):
        return f"{name} is a DataLoader, which has a batch size of its own: leave out batch_size."
    if not hasattr(data, "__getitem__") or not isinstance(data, Sized):
        return (
            f"{name} with batch_size must have __getitem__ and __len__, got {found}. "
            "Leave out batch_size if it yields batches."
        )
    if (count := length_or_none(data)) is None:
        return (
            f"{name} ({found}) is a dataset whose __len__ raises, so nobody knows which samples it has. "
            "Return their number, or make it an IterableDataset, whose length may be unknown."
        )
    return f"{name} ({found}) is empty: it has no sample." if count == 0 else None


def _share_problem(
    name: str, num_samples: int, batch_size: int, drop_last: bool, world_size: int
) -> str | None:
    if num_samples < world_size:
        return (
            f"{name} has {num_samples} samples, fewer than the {world_size} ranks that share them: a rank "
            "would have none. Start fewer ranks, or pass a DataLoader, whose samples are not shared out."
        )
    if drop_last and num_samples // world_size < batch_size:
        each = "" if world_size == 1 else f" for each of {world_size} ranks"
        return (
            f"{name} has {num_samples} samples, fewer than one batch of {batch_size}{each}, and drop_last "
            "leaves none. Lower batch_size or set drop_last=False."
        )
    return None
