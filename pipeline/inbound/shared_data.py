"""Data that several ranks share: see that they were given the same, and warn of what is not shared out."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from typing import Any, TypeAlias

import torch
from torch.utils.data import DataLoader, IterableDataset

from pipeline.batch import Batch, map_tensors
from pipeline.data import IterableSource, Source, is_shared_out
from pipeline.device import select_backend
from pipeline.errors import ConfigError, listed
from pipeline.protocols import Metrics, StatefulMetric
from pipeline.randomness.seeds import users_seed
from pipeline.ranks import ranks
from pipeline.settings import Settings

OpenEpoch: TypeAlias = Callable[[int, int | None, int], Generator[Batch]]


def seed_of_run(settings: Settings, data: Any, batch_size: int | None) -> int:
    """Return the seed of a run over some training data; see `agreed_seed`."""
    device = select_backend(settings.device).device
    return agreed_seed(settings.seed, device, is_shared=shares_order(data, batch_size))


def agreed_seed(given: int | None, device: torch.device, *, is_shared: bool) -> int:
    """Return the seed of a run: the one that was given, or what torch was seeded with on rank zero.

    Args:
        given: By the user; None for none.
        device: On which the ranks can tell each other numbers, if they cannot on the host.
        is_shared: Whether ranks have shares of one order, which must be the same on all of them.

    Raises:
        ConfigError: If ranks that share an order were given different ones.

    Runs on:
        Loop thread, of every rank; waits for all of them.
    """
    own = users_seed() if given is None else given
    if ranks()[1] == 1:
        return own
    found = [
        (bool(is_given), high << 32 | low) for is_given, high, low in _told(given is not None, own, device)
    ]
    seeds = [seed for is_given, seed in found if is_given]
    if is_shared and seeds and (len(set(seeds)) > 1 or len(seeds) < len(found)):
        missing = "" if len(seeds) == len(found) else ", and none on some of them"
        raise ConfigError(
            f"seed must be the same on all ranks, got {min(seeds)} to {max(seeds)}{missing}. Give each rank "
            "the same, or none: without seed= all ranks take what torch was seeded with on rank zero."
        )
    return found[0][1] if given is None else given


def _told(is_given: bool, seed: int, device: torch.device) -> list[list[int]]:
    """Return what each rank has: whether its seed was given, and the two halves of that."""
    halves = divmod(seed & ((1 << 64) - 1), 1 << 32)
    own = torch.tensor([is_given, *halves], dtype=torch.int64, device=_meeting_place(device))
    found = [torch.empty_like(own) for _ in range(ranks()[1])]
    torch.distributed.all_gather(found, own)
    return [each.tolist() for each in found]


def _meeting_place(device: torch.device) -> torch.device:
    """Return where the ranks' tensors must lie to be told: the host's with gloo, a device's with NCCL."""
    backend = torch.distributed.get_backend()
    if backend == "gloo":
        return torch.device("cpu")
    return torch.device("cuda") if backend == "nccl" and device.type == "cpu" else device


def shares_order(data: Any, batch_size: int | None) -> bool:
    """Say whether ranks have shares of one order of the samples, and not iterables of their own."""
    return batch_size is not None and not isinstance(data, IterableDataset)


def warn_of_all_samples(data: Any, name: str, stacklevel: int) -> None:
    """Say it if a DataLoader gives each of several ranks all of its samples."""
    if ranks()[1] > 1 and isinstance(data, DataLoader) and not is_shared_out(data):
        warnings.warn(
            f"{name} is a DataLoader that gives each of the {ranks()[1]} ranks all samples, unless its "
            "dataset is a rank's share already. Pass the dataset itself with batch_size=, which shares it "
            "out, or a DataLoader with sampler=DistributedSampler(dataset).",
            stacklevel=stacklevel + 1,
        )


def check_ranks(
    settings: Mapping[str, int], metrics: Metrics, device: torch.device, **data: tuple[Any, Mapping[str, Any]]
) -> None:
    """See that ranks which share data were given the same; warn of what is not shared out.

    Args:
        settings: What the order of training samples depends on, by name; they matter where it is shared out.
        metrics: Of the validation.
        device: Of the model.
        data: Training and validation data by their names, each with its batch size and collate function.

    Raises:
        ConfigError: If ranks were given different data: each would have its share of another epoch.

    Runs on:
        Loop thread, of every rank; waits for all of them.
    """
    if ranks()[1] == 1:
        return
    found: dict[str, int] = {}
    for name, (samples, batching) in data.items():
        size = batching["batch_size"] if samples is not None else None
        found |= {
            f"len({name})": len(samples) if shares_order(samples, size) else 0,
            f"batch_size of {name}": size or 0,
        }
        found[f"num_shards of {name}"] = batching.get("num_shards", 1)
    # A hash is the number itself, if it fits torch's integers. All ranks compare as many numbers.
    is_ordered = bool(found["len(train_data)"])
    _check_same(found | {name: hash(each) * is_ordered for name, each in settings.items()}, device)
    warn_of_all_samples(data["train_data"][0], "train_data", stacklevel=3)
    lonely = [
        name for name, each in metrics.items() if isinstance(each, StatefulMetric) and not _merges(each)
    ]
    if lonely and found["len(val_data)"]:
        warnings.warn(
            f"metrics {listed(lonely)}: an object with update and compute sees the samples of its own "
            "rank alone, unless it merges ranks itself. Pass a function, a metric of torchmetrics, or "
            "val_data as a DataLoader, of which each rank sees all.",
            stacklevel=3,
        )


def watch_ranks(inbound: OpenEpoch, source: Source, device: torch.device) -> OpenEpoch:
    """Return the inbound belt of training data, which warns if it gives each rank the same batches.

    That is looked for in what yields batches itself, where nobody can know it before, by the first one.

    Args:
        inbound: The belt.
        source: Of its batches.
        device: On which the ranks can tell each other numbers, if they cannot on the host.

    Runs on:
        Loop thread, of every rank; waits for all of them once. Reads one batch from the device.
    """
    if ranks()[1] == 1 or not isinstance(source, IterableSource):
        return inbound
    data = source.data
    if isinstance(data, DataLoader) and not is_shared_out(data):
        return inbound  # which is warned of already
    is_first = iter([True])

    def compared(batches: Generator[Batch]) -> Generator[Batch]:
        with closing(batches):
            for batch in batches:
                if next(is_first, False):
                    _warn_of_same(batch, data, device)
                yield batch

    return lambda epoch, limit, start: compared(inbound(epoch, limit, start))


def _warn_of_same(batch: Batch, data: Any, device: torch.device) -> None:
    checksums = _checksums(batch)
    found = _told(bool(checksums), hash(tuple(checksums)), device)
    if checksums and all(each == found[0] for each in found):
        warnings.warn(
            f"train_data ({type(data).__name__}) gives each of the {ranks()[1]} ranks the same first batch. "
            "It yields batches itself, so it is not shared out: have it yield a part of its own on each rank "
            "(torch.distributed.get_rank()), or pass a dataset with batch_size=, which is shared out.",
            stacklevel=2,
        )


def _checksums(batch: Batch) -> list[int]:
    """Return a number for each plain tensor of a batch."""
    found: list[int] = []

    def take(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            found.append(zlib.crc32(flat.view(torch.uint8).numpy().tobytes()))
        return tensor

    map_tensors(batch, take)
    return found


def _merges(metric: Any) -> bool:
    return bool(getattr(metric, "sync_on_compute", False))  # as torchmetrics call it


def _check_same(numbers: Mapping[str, int], device: torch.device) -> None:
    own = torch.tensor(list(numbers.values()), device=_meeting_place(device))
    ends = torch.cat([own, -own])
    torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX)
    most, least = ends.tolist()[: len(own)], [-each for each in ends.tolist()[len(own) :]]
    problems = [
        f"{name} must be the same on all ranks, got {low} to {high}. Give each rank all of the data, which "
        "is shared out, and the same settings; or pass a DataLoader of the rank's own share."
        for name, low, high in zip(numbers, least, most, strict=True)
        if low != high
    ]
    if problems:
        raise ConfigError(problems)
