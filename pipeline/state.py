"""What training changes: the model, its optimizer and schedule, and how far they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pipeline.errors import CheckpointError
from pipeline.protocols import Scheduler


@dataclass
class TrainState:
    """Everything that a step reads and writes.

    Args:
        model: The user's module, on the device.
        optimizer: The user's optimizer.
        scheduler: The user's scheduler, or None.
        scaler: Scales the loss in float16; None in the other precisions.
        ema: The averaged copy of the model, or None.
        epoch: The epoch under way, counted from 0.
        step: Optimizer steps finished.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler | None = None
    scaler: torch.amp.GradScaler | None = None
    ema: torch.optim.swa_utils.AveragedModel | None = None
    epoch: int = 0
    step: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the parts' states, live and not copied."""
        states = {
            name: _scaler_state(part) if name == "scaler" else part.state_dict()
            for name, part in self._parts().items()
        }
        if "scheduler" in states:  # functions, which a fresh scheduler has itself
            states["scheduler"] = {
                name: value for name, value in states["scheduler"].items() if not callable(value)
            }
        return {"epoch": self.epoch, "step": self.step, **states, "buffers": self._unsaved_buffers()}

    def load_state_dict(self, found: dict[str, Any]) -> None:
        """Take over the parts' states.

        Raises:
            CheckpointError: If one is missing, or belongs to another model.
        """
        parts = self._parts()
        missing = [name for name in parts if name not in found]
        if missing:
            raise CheckpointError(f"it has no {' and no '.join(missing)}: the run was set up differently.")
        for name, part in parts.items():
            try:
                part.load_state_dict(_numbers(found[name]) if name == "scaler" else found[name])
            except (RuntimeError, KeyError, ValueError, AttributeError, TypeError) as error:
                raise CheckpointError(f"its {name} does not fit this run's: {error}") from error
        with torch.no_grad():
            buffers = self._unsaved_buffers()
            for name, value in found.get("buffers", {}).items():
                if name in buffers and buffers[name].shape == value.shape:
                    buffers[name].copy_(value)
        self.epoch, self.step = found["epoch"], found["step"]
        if self.step:  # or torch takes a scheduler's next step for one before the first of the optimizer
            self.optimizer._opt_called = True  # type: ignore[attr-defined]

    def _parts(self) -> dict[str, Any]:
        parts = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "ema": self.ema,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _unsaved_buffers(self) -> dict[str, torch.Tensor]:
        """Return the buffers that the model leaves out of its state: they may decide the next step too."""
        saved = self.model.state_dict().keys()
        return {name: value for name, value in self.model.named_buffers() if name not in saved}


def _scaler_state(scaler: Any) -> dict[str, Any]:
    """Return the scaler's state with its numbers still on the device: its own method waits for them."""
    state: dict[str, Any] = {
        "growth_factor": scaler.get_growth_factor(),
        "backoff_factor": scaler.get_backoff_factor(),
        "growth_interval": scaler.get_growth_interval(),
    }
    if getattr(scaler, "_scale", None) is None:  # not used yet
        return dict(scaler.state_dict())
    return {"scale": scaler._scale, **state, "_growth_tracker": scaler._growth_tracker}


def _numbers(state: dict[str, Any]) -> dict[str, Any]:
    return {name: each.item() if isinstance(each, torch.Tensor) else each for name, each in state.items()}
