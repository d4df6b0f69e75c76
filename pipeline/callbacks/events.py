"""Callbacks: told of typed events, on the loop thread; may ask the run to stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.batch import MediaKind, Scalars
from pipeline.errors import ConfigError
from pipeline.every import Every
from pipeline.state import TrainState


@dataclass(frozen=True, slots=True)
class Event:
    """What every event carries.

    Args:
        state: Model, optimizer, epoch and step, live.
        stop: Call it with a reason to end the run after this step; the reason becomes
            `FitResult.stop_reason`.
        log_media: What `log_image`, `log_histogram` and `log_text` are made of.
    """

    state: TrainState
    stop: Callable[[str], None]
    log_media: Callable[[MediaKind, str, torch.Tensor | str], None]

    def log_image(self, name: str, image: torch.Tensor) -> None:
        """Give an image ``[C, H, W]``, uint8 or float from 0 to 1, to the loggers that keep images."""
        self.log_media("image", name, image)

    def log_histogram(self, name: str, values: torch.Tensor) -> None:
        """Give the distribution of a tensor's values to the loggers that keep histograms."""
        self.log_media("histogram", name, values)

    def log_text(self, name: str, text: str) -> None:
        """Give a text to the loggers that keep texts."""
        self.log_media("text", name, text)


@dataclass(frozen=True, slots=True)
class FitStarted(Event):
    """Before the first batch. `run_dir` is None if nothing is written."""

    run_dir: Path | None


@dataclass(frozen=True, slots=True)
class StepFinished(Event):
    """After an optimizer step was queued. Reading `scalars` here would wait for the device."""

    scalars: Scalars


@dataclass(frozen=True, slots=True)
class EpochFinished(Event):
    """After an epoch's last step, before its validation."""


@dataclass(frozen=True, slots=True)
class Validated(Event):
    """After a validation: its metrics by name, ``val/loss`` among them."""

    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class FitFinished(Event):
    """After the last step of a run that was not ended by an exception."""

    stop_reason: str


@dataclass(frozen=True, slots=True)
class FitFailed(Event):
    """When an exception ends the run; it goes on to the caller afterwards."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class StepRead:
    """After a step's numbers have reached the host, some steps later: there is no live state any more.

    Args:
        step: Optimizer steps finished with this one.
        epoch: Its epoch.
        values: Its numbers by name, such as ``train/loss``.
        stop: As for the other events; the run ends after the step that is under way by now.
    """

    step: int
    epoch: int
    values: Mapping[str, float]
    stop: Callable[[str], None]


class Callback:
    """Override what you need; which method you take says on which thread it runs.

    `on_step_read` gets the host's numbers, late, in order, on the thread of the loggers. All others get
    the live state (``event.state``: model, optimizer, epoch, step), run on the loop thread, which waits
    for them, and are timed in `FitResult.outbound`. Each event has ``event.stop(reason)``.

    Attributes:
        every: How often the two methods of a step are called; at each step if None.
    """

    every: Every | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what the callback must know to go on, for a checkpoint; loop thread, between two steps."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back when a run is resumed, after `on_fit_started`."""

    def on_fit_started(self, event: FitStarted) -> None:
        """Before the first batch: ``event.run_dir``."""

    def on_step_finished(self, event: StepFinished) -> None:
        """After each optimizer step: ``event.state.step``, ``event.scalars`` on the device."""

    def on_step_read(self, event: StepRead) -> None:
        """After each step's numbers were read: ``event.step``, ``event.values`` on the host."""

    def on_epoch_finished(self, event: EpochFinished) -> None:
        """After an epoch's last step: ``event.state.epoch``."""

    def on_validated(self, event: Validated) -> None:
        """After each validation: ``event.metrics``, by name."""

    def on_fit_finished(self, event: FitFinished) -> None:
        """After the last step: ``event.stop_reason``."""

    def on_fit_failed(self, event: FitFailed) -> None:
        """When an exception ends the run: ``event.error``."""


def monitored(metrics: dict[str, float], name: str, key: str) -> float:
    """Return a metric that a setting names.

    Raises:
        ConfigError: If it was not computed.
    """
    if name not in metrics:
        raise ConfigError(
            f"{key} must name a validation metric, got {name!r}. There are: {', '.join(sorted(metrics))}."
        )
    return metrics[name]
