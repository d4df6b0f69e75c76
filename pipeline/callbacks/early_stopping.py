"""Stop a run whose validation metric no longer gets better."""

from __future__ import annotations

import math
from typing import Any, Literal

from pipeline.callbacks.events import Callback, FitStarted, Validated, monitored
from pipeline.errors import ConfigError


class EarlyStopping(Callback):
    """Stop when a metric has not improved for some validations.

    Args:
        monitor: A validation metric, such as ``val/loss``.
        mode: Whether its ``min`` or its ``max`` is best.
        patience: Stop after so many validations in a row without improvement.
        min_delta: What counts as an improvement.
    """

    def __init__(
        self,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        min_delta: float = 0.0,
    ) -> None:
        if mode not in ("min", "max"):
            raise ConfigError(f"EarlyStopping.mode must be min or max, got {mode!r}.")
        self._monitor, self._sign = monitor, 1.0 if mode == "min" else -1.0
        self._patience, self._min_delta = patience, min_delta

    def on_fit_started(self, event: FitStarted) -> None:
        self._best, self._num_waited = math.inf, 0

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "num_waited": self._num_waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._best, self._num_waited = state["best"], state["num_waited"]

    def on_validated(self, event: Validated) -> None:
        value = self._sign * monitored(event.metrics, self._monitor, "EarlyStopping.monitor")
        if value < self._best - self._min_delta:
            self._best, self._num_waited = value, 0
            return
        self._num_waited += 1
        if self._num_waited >= self._patience:
            event.stop("early_stopping")
