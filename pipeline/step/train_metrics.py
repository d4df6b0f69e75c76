"""Metrics of the training batches: of each step in its row, of the epoch at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pipeline.batch import Batch, Scalars, map_tensors
from pipeline.metrics import MetricSet
from pipeline.protocols import Metrics
from pipeline.step.objective import Computed


class TrainMetrics:
    """Adds metrics to a step's scalars, and keeps them for the epoch; reads nothing.

    Args:
        metrics: As for validation. Functions are in every step's row; objects with update and compute
            are computed at the end of the epoch alone, where reading is allowed.
        count_samples: Returns the samples in a batch.
    """

    def __init__(self, metrics: Metrics, count_samples: Callable[[Batch], int]) -> None:
        self._metrics, self._count_samples = MetricSet(metrics), count_samples

    @torch.no_grad()
    def add(self, computed: Computed, batch: Batch) -> Scalars:
        """Return a micro-batch's metrics as ``train/<name>``, on their device."""
        args = [_detached(each) for each in computed.metric_args]
        means = self._metrics.update(*args, num_samples=self._count_samples(batch))
        return {
            f"train/{name}": mean.total / mean.count for name, mean in means.items() if mean.total is not None
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what the epoch has accumulated."""
        return self._metrics.state_dict()

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on with an epoch."""
        self._metrics.load_state_dict(state, device)

    def finish_epoch(self) -> dict[str, float]:
        """Return the epoch's metrics as ``train/epoch_<name>``, and begin the next one; reads."""
        values = {f"train/epoch_{name}": value for name, value in self._metrics.compute().items()}
        self._metrics.reset()
        return values


def _detached(outputs: Any) -> Any:
    # A metric that keeps its outputs must not keep their graph.
    return (
        outputs.detach() if isinstance(outputs, torch.Tensor) else map_tensors(outputs, torch.Tensor.detach)
    )
