"""Metrics over a data set: accumulated on the device, computed once at the end.

Reading each batch's value would wait for the device at every batch; the sums stay there and are
read when the last batch has been added.
"""

from __future__ import annotations

from typing import Any

import torch

from pipeline.errors import StageError
from pipeline.protocols import MetricFn, Metrics, StatefulMetric


def accuracy(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Say for each sample whether the class with the highest score is the right one.

    Args:
        outputs: Scores, ``[B, num_classes]``.
        target: Class indices, int64 ``[B]``.

    Returns:
        bool ``[B]``.
    """
    return outputs.argmax(dim=1) == target


class Mean:
    """The mean over samples of what a function says of each batch.

    Sums of whole numbers stay whole numbers, so that counts are exact; others are added up in
    float64 where the device has it.
    """

    def __init__(self, function: MetricFn | None = None) -> None:
        self._function = function
        self.reset()

    def reset(self) -> None:
        self._sum: torch.Tensor | None = None
        self._count = 0

    @property
    def has_samples(self) -> bool:
        """Whether anything has been added."""
        return self._count > 0

    def update(self, *args: Any, num_samples: int) -> None:
        """Evaluate the function on a batch and add the result."""
        assert self._function is not None
        self.add(self._function(*args), num_samples)

    def add(self, value: torch.Tensor | float, num_samples: int) -> None:
        """Add a batch's value: one for each sample, or one mean for `num_samples` of them."""
        value = torch.as_tensor(value).detach()
        if value.ndim > 1:
            raise StageError(
                "a metric must return one value per sample or one per batch, got a tensor of shape "
                f"{tuple(value.shape)}. Reduce it over all but the first dimension.",
                stage="validate",
            )
        total = value.sum(dtype=_sum_dtype(value)) if value.ndim else _as_sum(value) * num_samples
        self._sum = total if self._sum is None else self._sum + total
        self._count += len(value) if value.ndim else num_samples

    def compute(self) -> float:
        """Return the mean; waits for the device."""
        return float("nan") if self._sum is None else self._sum.item() / max(self._count, 1)


class MetricSet:
    """Several metrics over the same batches, by name."""

    def __init__(self, metrics: Metrics) -> None:
        self._means: dict[str, Mean] = {}
        self._stateful: dict[str, StatefulMetric] = {}
        for name, metric in metrics.items():
            if isinstance(metric, StatefulMetric):
                metric.reset()
                self._stateful[name] = metric
            else:
                self._means[name] = Mean(metric)

    def update(self, *args: Any, num_samples: int) -> None:
        """Add a batch: ``(outputs, target)`` with `loss_fn`, else whatever `step` returned."""
        for mean in self._means.values():
            mean.update(*args, num_samples=num_samples)
        for metric in self._stateful.values():
            metric.update(*args)

    def compute(self) -> dict[str, float]:
        """Return every metric by name; waits for the device."""
        values = {name: mean.compute() for name, mean in self._means.items()}
        return values | {name: float(metric.compute()) for name, metric in self._stateful.items()}


def _sum_dtype(value: torch.Tensor) -> torch.dtype:
    if not value.is_floating_point():
        return torch.int64
    return torch.float32 if value.device.type == "mps" else torch.float64


def _as_sum(value: torch.Tensor) -> torch.Tensor:
    return value.to(_sum_dtype(value))
