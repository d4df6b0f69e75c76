"""The guard of a device that runs ahead: flags on the device say what the host cannot know yet.

A fused optimizer takes such a flag. Any other is let go, and what it changed is selected on the device from
a copy, which costs that copy and a kernel for each tensor; how much that is, is printed once. Buffers are
selected likewise.

What cannot be selected is waited for: the first update of a parameter, in which an optimizer makes state of
which only it knows how it begins; a step in which a buffer came, went or changed its shape; one whose
learning rate is NaN or infinite. For most runs that is the first step.

A fused optimizer's own arithmetic is not looked at. So that it cannot overflow it is not let go with
a gradient beyond 1e18 (SGD's: 1e34), though it is finite.
"""

from __future__ import annotations

from typing import Any

import torch

from pipeline.batch import Scalars
from pipeline.step.finite import MODERATE, largest_of
from pipeline.step.guard import BUFFERS, GRADIENTS, HUGE, LEFT_OUT, SKIPPED, UPDATE, Guard
from pipeline.step.update import gradients_of

_SQUARABLE, _ADDABLE = 1e18, 1e34  # in float32, with room for momentum and a large learning rate


class DeviceGuard(Guard):
    """Lets an update have no effect if its step is not finite, and reads nothing.

    Runs on:
        Loop thread; waits for the device in the first step, and in those that the module names.
    """

    _begun: set[int] | None = None  # the parameters that were updated once

    def look(self, loss: torch.Tensor | float) -> None:
        """Take a micro-batch's loss into account."""
        assert isinstance(loss, torch.Tensor)
        self._is_bad = ~torch.isfinite(loss.detach()) | self._is_bad

    def step(self, scalars: Scalars) -> None:
        """Make the optimizer's step, or one without effect; a step that was not finite is marked."""
        if self._begins_something():
            super().step(scalars)
            if not scalars.get(SKIPPED, 0.0):
                self._note_begun()
            return
        with torch.no_grad():
            scalars[SKIPPED] = self._step_ahead(scalars)
        self._buffers.forget()

    def _step_ahead(self, scalars: Scalars) -> torch.Tensor:
        has_bad_loss, self._is_bad = self._is_bad, False
        flags = self._look_ahead()
        is_left_out = flags[GRADIENTS] | flags.get(HUGE, False) | self._has_tripped
        is_spoiled = is_left_out | has_bad_loss | flags.get(BUFFERS, False)
        if not self._has_ranks:
            is_left_out = is_spoiled
        if HUGE in flags:
            self._step_with_flag(is_left_out)
        else:
            flags[UPDATE] = self._step_and_select(is_left_out)
            is_left_out = is_left_out | flags[UPDATE]
            is_spoiled = is_spoiled | flags[UPDATE]
        if self._buffers.is_kept:
            self._buffers.select(is_spoiled)
        if self._mode == "stop":
            self._has_tripped = is_spoiled
        return _encoded({LEFT_OUT: is_left_out, **flags})

    def _look_ahead(self) -> dict[int, torch.Tensor]:
        """Return flags of gradients and buffers; one of size for an optimizer that takes a flag itself."""
        largest = largest_of(gradients_of(self._state.optimizer))
        flags = {GRADIENTS: ~torch.isfinite(largest)}
        if getattr(self._state.optimizer, "_step_supports_amp_scaling", False):  # torch's own, if fused
            flags[HUGE] = self._flag_size(largest)
        of_buffers = self._buffers.spoiled() if self._buffers.is_kept else None
        return flags if of_buffers is None else {**flags, BUFFERS: of_buffers}

    def _flag_size(self, largest: torch.Tensor) -> torch.Tensor:
        """Return whether a gradient is so large that a fused optimizer's own numbers may overflow."""
        is_squared = not isinstance(self._state.optimizer, torch.optim.SGD)
        return largest.to(torch.float32) > (_SQUARABLE if is_squared else _ADDABLE)

    def _step_with_flag(self, is_left_out: torch.Tensor) -> None:
        optimizer: Any = self._state.optimizer
        optimizer.grad_scale, optimizer.found_inf = None, is_left_out.to(torch.float32)
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf

    def _step_and_select(self, is_left_out: torch.Tensor) -> torch.Tensor:
        """Make the update and take it back if the flag is set or it was not finite, which is returned."""
        self._copy.take()
        self._state.optimizer.step()
        of_update = self._copy.spoiled()
        can_take_flag = "fused" in self._state.optimizer.defaults
        self._say_cost(
            f"takes no flag, and {len(self._copy.live())} kernels a step select what it did",
            "With fused=True it costs neither; " if can_take_flag else "",
        )
        self._copy.select(is_left_out | of_update)
        return of_update

    def _say_why(self) -> None:
        """Say nothing of a copy for one step."""

    def _begins_something(self) -> bool:
        if self._buffers.is_kept and self._buffers.has_other_places():
            return True
        if not all(_is_usable(group["lr"]) for group in self._state.optimizer.param_groups):
            return True
        if self._begun is None:
            self._begun = self._begun_before()
        return not self._updated() <= self._begun

    def _updated(self) -> set[int]:
        groups = self._state.optimizer.param_groups
        return {id(each) for group in groups for each in group["params"] if each.grad is not None}

    def _note_begun(self) -> None:
        self._begun = (self._begun or set()) | self._updated()

    def _begun_before(self) -> set[int]:
        """Return the parameters that a resumed run had updated: those with state, or all if none has any."""
        state = self._state.optimizer.state
        if not self._state.step:
            return set()
        return {id(each) for each in state} if state else self._updated()


def _is_usable(rate: Any) -> bool:
    return isinstance(rate, torch.Tensor) or 0 <= rate <= MODERATE


def _encoded(flags: dict[int, torch.Tensor]) -> torch.Tensor:
    code = torch.zeros((), device=flags[GRADIENTS].device)
    for number, flag in flags.items():
        code = torch.add(code, flag, alpha=number)
    return code
