"""Several metrics over the same batches, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pipeline.batch import map_tensors
from pipeline.errors import CheckpointError, StageError
from pipeline.metrics.mean import Mean
from pipeline.metrics.over_ranks import merge_over_ranks
from pipeline.protocols import MetricFn, Metrics, StatefulMetric


class MetricSet:
    """Accumulates on the device and computes on the host, once.

    Args:
        metrics: Functions, and objects with update, compute and reset; the latter are reset.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._functions: dict[str, MetricFn] = {}
        self._stateful: dict[str, StatefulMetric] = {}
        for name, metric in metrics.items():
            if isinstance(metric, StatefulMetric):
                self._stateful[name] = metric
            else:
                self._functions[name] = metric
        self.reset()

    def reset(self) -> None:
        """Forget every batch."""
        self._means = dict.fromkeys(self._functions, Mean())
        for metric in self._stateful.values():
            metric.reset()

    def update(self, *args: Any, num_samples: int) -> dict[str, Mean]:
        """Add a batch, and return what each function said of it.

        Args:
            args: ``(outputs, target)`` with `loss_fn`, else whatever `step` returned.
            num_samples: In the batch.
        """
        of_batch = {name: Mean.of(function(*args), num_samples) for name, function in self._functions.items()}
        for name, mean in of_batch.items():
            self._means[name] = self._means[name].merge(mean)
        for metric in self._stateful.values():
            metric.update(*args)
        return of_batch

    def state_dict(self) -> dict[str, Any]:
        """Return what has been accumulated, live and not copied."""
        means = {name: {"total": mean.total, "count": mean.count} for name, mean in self._means.items()}
        return {
            "means": means,
            "stateful": {name: _state_of(metric, name) for name, metric in self._stateful.items()},
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on accumulating from there; metrics that were not there before begin anew."""
        for name, found in state["means"].items():
            total = found["total"]
            if name in self._means:
                self._means[name] = Mean(None if total is None else total.to(device), found["count"])
        for name, found in state["stateful"].items():
            if name in self._stateful:
                _load_state(self._stateful[name], found, device)

    def compute(self, *, merges_ranks: bool = False) -> dict[str, float]:
        """Return every metric by name; waits for the device.

        A metric that computes several numbers gives each a name of its own: ``name/key`` for a dict,
        ``name/0`` and so on for a vector.

        Args:
            merges_ranks: Compute over the samples of all ranks; those of torchmetrics do so anyway.
        """
        means = merge_over_ranks(self._means) if merges_ranks else self._means
        values = {name: mean.compute() for name, mean in means.items()}
        for name, metric in self._stateful.items():
            values |= _named(name, metric.compute())
        return values


def _state_of(metric: Any, name: str) -> dict[str, Any]:
    """Return a metric's state: that of torchmetrics, of its own ``state_dict``, or its attributes."""
    if hasattr(metric, "metric_state"):  # torchmetrics leave it out of their state_dict
        return {"attributes": {**metric.metric_state, "_update_count": metric._update_count}}
    if hasattr(metric, "state_dict") and hasattr(metric, "load_state_dict"):
        return {"state_dict": metric.state_dict()}
    if hasattr(metric, "__dict__"):
        return {"attributes": dict(vars(metric))}
    raise CheckpointError(
        f"metric {name!r} ({type(metric).__name__}) has a state that cannot be seen. Give it state_dict and "
        "load_state_dict, or set enable_checkpointing=False."
    )


def _load_state(metric: Any, found: dict[str, Any], device: torch.device) -> None:
    if "state_dict" in found:
        metric.load_state_dict(found["state_dict"])
        return
    for name, value in found["attributes"].items():
        setattr(metric, name, map_tensors(value, lambda tensor: tensor.to(device)))


def _named(name: str, computed: Any) -> dict[str, float]:
    if isinstance(computed, Mapping):
        parts = [_named(f"{name}/{key}", value) for key, value in computed.items()]
        return {key: value for part in parts for key, value in part.items()}
    if not isinstance(computed, torch.Tensor) or computed.numel() == 1:
        return {name: float(computed)}
    if computed.ndim > 1:
        raise StageError(
            f"metric {name!r} computed a tensor of shape {tuple(computed.shape)}, which is no number to log. "
            "Reduce it to a number, a vector or a dict of them.",
            stage="metric",
        )
    return {f"{name}/{place}": value for place, value in enumerate(computed.tolist())}
