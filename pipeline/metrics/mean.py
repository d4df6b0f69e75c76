"""A mean as a value: a total that stays on its device, and of how many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pipeline.errors import StageError


@dataclass(frozen=True)
class Mean:
    """A mean over samples that has not been divided yet, so that means of anything can be merged.

        mean = Mean.of(batch_values, num_samples) merged with the next one …
        mean.merge(Mean.of(...)).compute()

    Sums of whole numbers stay whole numbers, so that counts are exact; others are added up in
    float64 where the device has it.

    Args:
        total: The sum so far, on its device; None for no sample.
        count: The samples in it.

    Source:
        The metrics of google's CommonLoopUtils: accumulate, merge, compute.
    """

    total: torch.Tensor | None = None
    count: int = 0

    @classmethod
    def of(cls, value: torch.Tensor | float, num_samples: int) -> Mean:
        """Take a batch's value: one for each sample ``[B]``, or one mean for `num_samples` of them.

        Raises:
            StageError: If it has more than one dimension.
        """
        value = torch.as_tensor(value).detach()
        if value.ndim > 1:
            raise StageError(
                "a metric must return one value per sample or one per batch, got a tensor of shape "
                f"{tuple(value.shape)}. Reduce it over all but the first dimension.",
                stage="metric",
            )
        if value.ndim:
            return cls(value.sum(dtype=_sum_dtype(value)), len(value))
        return cls(value.to(_sum_dtype(value)) * num_samples, num_samples)

    def merge(self, other: Mean) -> Mean:
        """Return the mean over the samples of both; waits for nothing."""
        if self.total is None or other.total is None:
            return other if self.total is None else self
        return Mean(self.total + other.total, self.count + other.count)

    def compute(self) -> float:
        """Return the mean; waits for the device. NaN if there was no sample."""
        return float("nan") if self.total is None else self.total.item() / max(self.count, 1)


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


def _sum_dtype(value: torch.Tensor) -> torch.dtype:
    if not value.is_floating_point():
        return torch.int64
    return torch.float32 if value.device.type == "mps" else torch.float64
