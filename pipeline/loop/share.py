"""Data that several ranks share: see that they were given the same, and warn of what is not shared out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from pipeline.data import is_shared_out, ranks
from pipeline.errors import ConfigError, listed
from pipeline.protocols import Metrics, StatefulMetric


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
        ConfigError: If ranks were given different data or seeds: each would have its share of another epoch.

    Runs on:
        Loop thread, of every rank; waits for all of them.
    """
    if ranks()[1] == 1:
        return
    found: dict[str, int] = {}
    for name, (samples, batching) in data.items():
        size = batching["batch_size"] if samples is not None else None
        is_shared = size is not None and not isinstance(samples, IterableDataset)
        found |= {f"len({name})": len(samples) if is_shared else 0, f"batch_size of {name}": size or 0}
        found[f"num_shards of {name}"] = batching.get("num_shards", 1)
    # A hash is the number itself, if it fits torch's integers. All ranks compare as many numbers.
    is_ordered = bool(found["len(train_data)"])
    _check_same(found | {name: hash(each) * is_ordered for name, each in settings.items()}, device)
    train_data = data["train_data"][0]
    if isinstance(train_data, DataLoader) and not is_shared_out(train_data):
        warnings.warn(
            f"train_data is a DataLoader that gives each of the {ranks()[1]} ranks all samples, unless its "
            "dataset is a rank's share already. Pass the dataset itself with batch_size=, which shares it "
            "out, or a DataLoader with sampler=DistributedSampler(dataset).",
            stacklevel=3,
        )
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


def _merges(metric: Any) -> bool:
    return bool(getattr(metric, "sync_on_compute", False))  # as torchmetrics call it


def _check_same(numbers: Mapping[str, int], device: torch.device) -> None:
    is_on_host = torch.distributed.get_backend() == "gloo"
    own = torch.tensor(list(numbers.values()), device="cpu" if is_on_host else device)
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
