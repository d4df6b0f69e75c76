"""A mean as a value: a total that stays on its device, and of how many."""

from __future__ import annotations

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


def _sum_dtype(value: torch.Tensor) -> torch.dtype:
    if not value.is_floating_point():
        return torch.int64
    return torch.float32 if value.device.type == "mps" else torch.float64
