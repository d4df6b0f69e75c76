"""Gradients are clipped, and their norm is noted, before an update."""

from __future__ import annotations

import torch

from pipeline.batch import Scalars
from pipeline.settings import Settings
from pipeline.state import TrainState


class Clipping:
    """Clips the gradients of an optimizer and notes their norm, as the settings say.

    Args:
        settings: `gradient_clip_val`, `gradient_clip_algorithm`, `log_grad_norm`.
        state: Has the optimizer and the scaler. A scaler's gradients are unscaled first.

    Runs on:
        Loop thread, once an update. Waits for nothing.
    """

    def __init__(self, settings: Settings, state: TrainState) -> None:
        self._state, self._limit = state, settings.gradient_clip_val
        self._clips_norm = self._limit is not None and settings.gradient_clip_algorithm == "norm"
        self._notes_norm = settings.log_grad_norm and not self._clips_norm  # else clipping computes it

    def __call__(self, scalars: Scalars) -> None:
        """Do so; the norm before clipping goes into ``train/grad_norm``."""
        scaler, optimizer = self._state.scaler, self._state.optimizer
        if scaler is not None:
            scaler.unscale_(optimizer)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self._notes_norm:
            gradients = [each.grad for each in parameters if each.grad is not None]
            scalars["train/grad_norm"] = torch.nn.utils.get_total_norm(gradients)
        if self._clips_norm:
            assert self._limit is not None
            scalars["train/grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, self._limit)
        elif self._limit is not None:
            torch.nn.utils.clip_grad_value_(parameters, self._limit)


def make_clipping(settings: Settings, state: TrainState) -> Clipping | None:
    """Return what clips and measures gradients; None if nobody asked for either."""
    is_asked = settings.log_grad_norm or settings.gradient_clip_val is not None
    return Clipping(settings, state) if is_asked else None
