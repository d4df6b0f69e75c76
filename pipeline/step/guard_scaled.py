"""The guard beside a GradScaler, which looks at the gradients by itself, and at nothing else.

A loss or a buffer that is not finite is passed on to it as a NaN in one gradient, before it looks: then it
makes no update and lowers its scale, as it would for any other NaN. Scaled gradients that overflow are what
it expects now and then: such an update is left out and marked, but is no error, and the buffers keep what
the forward pass did, as in a plain loop. With a scale of 1 or less it is no longer the scale: then gradients
are not finite by themselves.
"""

from __future__ import annotations

from typing import Any

import torch

from pipeline.batch import Scalars
from pipeline.step.finite import are_moderate, dense
from pipeline.step.guard import BUFFERS, GRADIENTS, LEFT_OUT, SCALED, SKIPPED, UPDATE, Guard
from pipeline.step.update import gradients_of


class ScaledGuard(Guard):
    """Tells a GradScaler what it does not look at, and says what it has done.

    Args:
        is_on_host: Whether a read waits for nothing.

    Runs on:
        Loop thread; reads no more than the scaler does, but in a fused optimizer's first update, whose
        state torch leaves uninitialised if it is left out, and in a step in which a buffer came, went or
        changed its shape.
    """

    def __init__(self, *args: Any, is_on_host: bool, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._is_on_host = is_on_host
        self._overflow = torch.zeros(())
        self._of_buffers: bool | torch.Tensor = False
        self._has_other_places = False
        self._has_stepped = False

    def look(self, loss: torch.Tensor | float) -> None:
        """Take a micro-batch's loss into account."""
        if isinstance(loss, float) or self._is_on_host:
            super().look(loss)
        else:
            self._is_bad = ~torch.isfinite(loss.detach()) | self._is_bad

    @torch.no_grad()
    def settle(self) -> None:
        """Pass on what the scaler does not look at, before it looks: that is when gradients are clipped."""
        self._of_buffers, self._has_other_places = False, False
        if self._buffers.is_kept:
            self._has_other_places = self._is_on_host or self._buffers.has_other_places()
            flag = self._buffers.are_spoiled() if self._has_other_places else self._buffers.spoiled()
            self._of_buffers = False if flag is None else flag
        is_bad = self._has_tripped
        if not self._has_ranks:
            is_bad = is_bad | self._is_bad | self._of_buffers
        if is_bad is not False:
            _spoil(gradients_of(self._state.optimizer), is_bad)

    @torch.no_grad()
    def step(self, scalars: Scalars) -> None:
        """Make the scaler's step; one that was not finite, or that the scaler left out, is marked."""
        scaler: Any = self._state.scaler
        is_low = scaler._scale <= 1
        is_kept = self._update_scaled()
        has_overflow = self._overflow > 0
        scaler.update()
        is_spoiled = (has_overflow & is_low) | self._is_bad | self._of_buffers | self._has_tripped
        self._is_bad = False
        if self._is_on_host:
            is_spoiled = bool(is_spoiled) or not is_kept
        code = has_overflow.to(torch.float32) * LEFT_OUT + (has_overflow & is_low) * GRADIENTS
        code = code + torch.as_tensor(self._of_buffers) * BUFFERS
        code = code + (has_overflow & ~torch.as_tensor(is_spoiled)) * SCALED
        scalars[SKIPPED] = code if is_kept else code + (UPDATE + LEFT_OUT)
        self._note_left_out()
        self._take_back(is_spoiled)

    def _update_scaled(self) -> bool:
        if self._is_on_host:
            return self._update(are_moderate(gradients_of(self._state.optimizer)))
        self._make_update()
        return True

    def _take_back(self, is_spoiled: bool | torch.Tensor) -> None:
        if self._buffers.is_kept:
            if not self._has_other_places:
                assert isinstance(is_spoiled, torch.Tensor)
                self._buffers.select(is_spoiled)
            elif is_spoiled:  # which waits for the device
                self._buffers.restore()
        if self._mode == "stop":
            self._has_tripped = self._has_tripped | is_spoiled
        self._buffers.forget()

    def _make_update(self) -> None:
        scaler: Any = self._state.scaler
        optimizer: Any = self._state.optimizer
        if not self._has_stepped and getattr(optimizer, "_step_supports_amp_scaling", False):
            # torch gives a fused SGD's momentum memory, and no values, if its first update is left out.
            found = scaler._found_inf_per_device(optimizer) or scaler._check_inf_per_device(optimizer)
            self._has_stepped = not any(each.item() for each in found.values())
            if self._has_stepped:
                scaler.step(optimizer)
        else:
            scaler.step(optimizer)
        flags = scaler._found_inf_per_device(optimizer).values()
        self._overflow = torch.stack([each.to(scaler._scale.device) for each in flags]).sum()


def _spoil(gradients: list[torch.Tensor], is_bad: bool | torch.Tensor) -> None:
    """Make a number of one gradient NaN if a flag is set."""
    for each in gradients:
        number = dense(each)
        if not number.numel():
            continue
        while number.ndim:
            number = number[0]
        if isinstance(is_bad, torch.Tensor):
            torch.where(is_bad, torch.full_like(number, torch.nan), number, out=number)
        else:
            number.fill_(torch.nan)
        return
