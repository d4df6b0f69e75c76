"""Means over the samples of all ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pipeline.metrics.mean import Mean


def merge_over_ranks(means: Mapping[str, Mean]) -> dict[str, Mean]:
    """Return each mean over the samples of all ranks, in one reduction.

    Args:
        means: By name; every rank must have the same names.

    Returns:
        The same as it was given where there is but one rank.

    Runs on:
        The thread that calls it, on every rank; waits for all of them.
    """
    is_alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    if is_alone or torch.distributed.get_world_size() == 1 or not means:
        return dict(means)
    names = sorted(means)
    device = next((each.total.device for each in means.values() if each.total is not None), "cpu")
    # float64 holds the counts, and sums of whole numbers up to 2**53, exactly.
    packed = torch.zeros(2, len(names), dtype=torch.float64, device=device)
    for place, name in enumerate(names):
        total = means[name].total
        packed[0, place] = 0.0 if total is None else total
        packed[1, place] = means[name].count
    torch.distributed.all_reduce(packed)
    counts = packed[1].tolist()
    return {
        name: Mean(packed[0, place], int(count))
        for place, (name, count) in enumerate(zip(names, counts, strict=True))
    }
