"""Weights stay clean of NaN and infinity, though the host learns of them some steps late.

Where the host can look for nothing (the CPU), it looks at the loss before the update. On a device that
runs ahead it does not look at all: a flag on the device says whether loss or gradients are finite, and
the update is made without effect there. A fused optimizer takes such a flag. Any other is let go, and
what it changed is selected on the device from a copy, which costs that copy and a kernel for each tensor;
how much that is, is printed once. Batch norm's statistics, which the forward pass
changes, are selected likewise.

With ``stop`` the flag is sticky: after the first such step nothing is changed any more. With ``skip``
each step has its own. The scheduler, the average of the weights and the counters go on in either case.
"""

from __future__ import annotations

import math
import sys
from typing import Any, Literal

import torch

from pipeline.batch import Scalars
from pipeline.device import Backend, is_host
from pipeline.state import TrainState

SKIPPED = "train/skipped"


class Guard:
    """Keeps an update from being made, or from having an effect, if its step is not finite.

    Args:
        state: What is trained.
        backend: The device.
        mode: ``stop`` or ``skip``; with ``ignore`` there is no guard.

    Attributes:
        has_buffers: Whether the forward pass may change something that must be kept.

    Runs on:
        Loop thread; on the CPU 1 µs a step, and half a microsecond for each buffer. Reads nothing from a
        device that runs ahead.
    """

    def __init__(self, state: TrainState, backend: Backend, mode: Literal["stop", "skip"]) -> None:
        self._state, self._mode = state, mode
        self._is_host = is_host(backend)
        self._buffers = [each for each in state.model.buffers() if each.is_floating_point()]
        self.has_buffers = bool(self._buffers)
        self._kept_buffers: list[torch.Tensor] = []
        self._kept: dict[int, torch.Tensor] = {}
        self._is_bad: bool | torch.Tensor = False
        self._has_tripped: bool | torch.Tensor = False
        self._has_said = False

    def begin(self) -> None:
        """Keep what the forward pass of a step will change."""
        if self._kept_buffers:
            torch._foreach_copy_(self._kept_buffers, self._buffers)
        else:
            self._kept_buffers = [each.clone() for each in self._buffers]

    def look(self, loss: torch.Tensor | float) -> None:
        """Take a micro-batch's loss into account; one that was read already as a float."""
        if isinstance(loss, float):
            self._is_bad = self._is_bad or not math.isfinite(loss)
        elif self._is_host:
            self._is_bad = self._is_bad or not math.isfinite(loss.item())
        else:
            self._is_bad = ~torch.isfinite(loss.detach()) | self._is_bad

    def step(self, scalars: Scalars) -> None:
        """Make the optimizer's step, or one without effect; a step that was not finite is marked."""
        is_bad, self._is_bad = self._is_bad, False
        if self._is_host:
            self._step_on_host(bool(is_bad), scalars)
        else:
            assert isinstance(is_bad, torch.Tensor)
            self._step_on_device(is_bad, scalars)

    def _step_on_host(self, is_bad: bool, scalars: Scalars) -> None:
        if self._mode == "skip" and not is_bad:
            is_bad = not math.isfinite(self._norm(scalars).item())
        if self._mode == "stop":
            is_bad = self._has_tripped = bool(self._has_tripped) or is_bad
        if not is_bad:
            self._state.optimizer.step()
            return
        scalars[SKIPPED] = 1.0
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept_buffers)

    @torch.no_grad()
    def _step_on_device(self, is_bad: torch.Tensor, scalars: Scalars) -> None:
        is_bad = is_bad | ~torch.isfinite(self._norm(scalars))
        if self._mode == "stop":
            is_bad = self._has_tripped = is_bad | self._has_tripped
        optimizer: Any = self._state.optimizer
        if getattr(optimizer, "_step_supports_amp_scaling", False):  # torch's own, made with fused=True
            optimizer.grad_scale, optimizer.found_inf = None, is_bad.to(torch.float32)
            try:
                optimizer.step()
            finally:
                del optimizer.grad_scale, optimizer.found_inf
        else:
            kept = self._keep()
            optimizer.step()
            changed = self._live()
            self._say_cost(len(changed))
            for live in changed:
                old = kept.get(id(live))
                # What the step has made anew began as zeros in every optimizer of torch.
                torch.where(is_bad, torch.zeros_like(live) if old is None else old, live, out=live)
        for live, old in zip(self._buffers, self._kept_buffers, strict=True):
            torch.where(is_bad, old, live, out=live)
        scalars[SKIPPED] = is_bad

    def _norm(self, scalars: Scalars) -> torch.Tensor:
        known = scalars.get("train/grad_norm")
        if isinstance(known, torch.Tensor):
            return known
        gradients = [each.grad for each in self._parameters() if each.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _parameters(self) -> list[torch.Tensor]:
        return [each for group in self._state.optimizer.param_groups for each in group["params"]]

    def _live(self) -> list[torch.Tensor]:
        """Return what an optimizer's step changes, as far as it is on the device."""
        parameters, state = self._parameters(), self._state.optimizer.state
        of_state = [
            each
            for parameter in parameters
            for name, each in state.get(parameter, {}).items()
            if name != "step"  # the host's own count, which it reads
        ]
        tensors = [each for each in (*parameters, *of_state) if isinstance(each, torch.Tensor)]
        return [each for each in tensors if each.device == parameters[0].device]

    def _keep(self) -> dict[int, torch.Tensor]:
        """Copy what the step will change into memory that is kept from step to step."""
        before, self._kept = self._kept, {}
        live = self._live()
        for each in live:
            old = before.get(id(each))
            is_usable = old is not None and old.shape == each.shape and old.dtype == each.dtype
            self._kept[id(each)] = old if old is not None and is_usable else torch.empty_like(each)
        torch._foreach_copy_(list(self._kept.values()), live)
        return self._kept

    def _say_cost(self, num_tensors: int) -> None:
        if self._has_said:
            return
        self._has_said = True
        num_bytes = sum(each.nbytes for each in self._kept.values())
        print(
            f"on_nonfinite={self._mode}: {type(self._state.optimizer).__name__} takes no flag, so each "
            f"update is selected from a copy: {num_bytes / 1e6:,.1f} MB more memory, and {num_tensors} "
            "kernels a step. With fused=True it costs neither; on_nonfinite=ignore leaves it out.",
            file=sys.stderr,
        )
