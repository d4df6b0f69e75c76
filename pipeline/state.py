"""What training changes: the model, its optimizer and schedule, and how far they are."""

from __future__ import annotations

import numbers
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

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
        """Return plain containers and tensors only, so that loading never runs code."""
        parts = {
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "ema": None if self.ema is None else self.ema.module,
        }
        states = {name: part.state_dict() for name, part in parts.items() if part is not None}
        states["model"] = self.model.state_dict()
        return {"epoch": self.epoch, "step": self.step, **_plain(states)}


def _plain(value: Any) -> Any:
    """Return NumPy's scalars as Python's own: a file that holds them cannot be read without code."""
    if isinstance(value, (torch.Tensor, str)):
        return value
    if type(value) in (dict, OrderedDict):
        return type(value)((name, _plain(each)) for name, each in value.items())
    if type(value) in (list, tuple):
        return type(value)(_plain(each) for each in value)
    return value.item() if isinstance(value, numbers.Number) and hasattr(value, "item") else value
