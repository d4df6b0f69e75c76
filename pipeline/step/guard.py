"""Weights stay clean of NaN and infinity, whoever learns of it when.

At each step loss, gradients and buffers are looked at, before the update is made. Where the host can look
for nothing (the CPU, this file) a step that is not finite is left out: the optimizer is not called, and the
buffers become what they were before the forward passes (`step/buffers.py`). A device that runs ahead does
the same without a read (`step/guard_device.py`), and a GradScaler has a guard of its own
(`step/guard_scaled.py`).

Gradients whose norm is moderate are finite, and an update of torch's usual optimizers cannot overflow with
them. Where the norm is not, which may be an overflow of the norm alone, each number is looked at; and the
update is made from a copy (`step/update.py`), looked at, and taken back if it has made NaN or infinity of
finite numbers. Optimizers that are not torch's are always let go from a copy.

With ``stop`` nothing is changed any more after the first such step; with ``skip`` each step has its own.
The scheduler, the average of the weights and the counters go on in either case.

Gradients that ranks have averaged are the same on each of them, a loss or a buffer is not: among several
ranks the gradients alone decide over the update, so that all do the same.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, Literal

import torch

from pipeline.batch import Scalars
from pipeline.errors import listed
from pipeline.state import TrainState
from pipeline.step.buffers import BufferKeeper
from pipeline.step.finite import MODERATE, are_finite, are_moderate, has_numbers
from pipeline.step.update import UpdateCopy, gradients_of, is_tame, parameters_of

SKIPPED = "train/skipped"

# What a step's SKIPPED is made of; 0 if all was well.
LEFT_OUT = 1  # the update was not made, or had no effect
GRADIENTS = 2  # a gradient is NaN or infinite
HUGE = 4  # a gradient is too large for a fused optimizer's own numbers, which nobody looks at
BUFFERS = 8  # a buffer has NaN, or statistics infinity
UPDATE = 16  # weights or the optimizer's state would have
SPOILED = 32  # the weights have NaN already
SCALED = 64  # scaled gradients overflowed, as a GradScaler expects now and then


class Guard:
    """Keeps an update from being made if its step is not finite; on a device where a read waits for nothing.

    Args:
        state: What is trained.
        mode: ``stop`` or ``skip``; with ``ignore`` there is no guard.
        modules: Those with buffers: the model, and a loss that is a module.
        knows_norm: Whether ``train/grad_norm`` is computed at each step anyway.
        has_ranks: Whether others train the same model.

    Runs on:
        Loop thread. Processor time a step on the CPU: 20 to 30 µs for 6 small tensors; 0.2 ms for 10
        convolutions with batch norm; for a ResNet-18 0.25 ms for its 60 buffers, and one reading of the
        gradients, 3 to 5 ms (measured on two cores that others used too).
    """

    def __init__(
        self,
        state: TrainState,
        mode: Literal["stop", "skip"],
        modules: Sequence[torch.nn.Module],
        *,
        knows_norm: bool = False,
        has_ranks: bool = False,
    ) -> None:
        self._state, self._mode = state, mode
        self._knows_norm, self._has_ranks = knows_norm, has_ranks
        self._modules, self._buffers = modules, BufferKeeper(modules)
        self._copy = UpdateCopy(state.optimizer)
        self._is_bad: bool | torch.Tensor = False
        self._has_tripped: bool | torch.Tensor = False
        self._has_said = False
        self._is_known = False  # whether the optimizer's state was clean once

    def begin(self) -> None:
        """Keep what the forward passes of a step will change."""
        self._buffers.keep()

    def look(self, loss: torch.Tensor | float) -> None:
        """Take a micro-batch's loss into account; one that was read already as a float."""
        value = loss if isinstance(loss, float) else loss.item()
        self._is_bad = self._is_bad or not math.isfinite(value)

    def settle(self) -> None:
        """Decide what has to be decided before the gradients are clipped: nothing."""

    def step(self, scalars: Scalars) -> None:
        """Make the optimizer's step or leave it out; a step that was not finite is marked."""
        has_bad_loss, self._is_bad = bool(self._is_bad), False
        gradients = gradients_of(self._state.optimizer)
        is_moderate = self._are_moderate(gradients, scalars)
        found = 0 if is_moderate or are_finite(gradients) else GRADIENTS
        found |= self._look_at_buffers()
        is_spoiled = has_bad_loss or bool(found)
        is_left_out = bool(self._has_tripped) or bool(found & GRADIENTS)
        is_left_out = is_left_out or (is_spoiled and not self._has_ranks)
        if not is_left_out and not self._update(is_moderate):
            found, is_left_out = found | UPDATE, True
        self._conclude(scalars, found, is_left_out, is_spoiled)

    def spoiled_part(self) -> str:
        """Say what is not finite by now, of what a step should leave clean; nothing if all is. Waits."""
        trained = {id(each) for each in parameters_of(self._state.optimizer)}
        weights = [each for module in self._modules for each in module.named_parameters()]
        if names := [name for name, each in weights if not _is_clean(each, id(each) in trained)]:
            return f"weights: {listed(names, 3)}"
        if not are_finite(parameters_of(self._state.optimizer)):
            return "weights"
        if not self._has_clean_state():
            return "optimizer's state"
        buffers = [each for module in self._modules for each in module.named_buffers()]
        names = [name for name, each in buffers if not _is_clean(each, counts_infinity=False)]
        return f"buffers: {listed(names, 3)}" if names else ""

    def state_dict(self) -> dict[str, Any]:
        """Return what is known of the step under way."""
        return {"is_bad": self._is_bad, "buffers": self._buffers.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a step that had begun; the model's buffers have its values by now."""
        self._is_bad = state["is_bad"]
        self._buffers.load_state_dict(state["buffers"])

    def _are_moderate(self, gradients: list[torch.Tensor], scalars: Scalars) -> bool:
        known = scalars.get("train/grad_norm") if self._knows_norm else None
        return are_moderate(gradients) if known is None else bool(float(known) <= MODERATE)

    def _look_at_buffers(self) -> int:
        return BUFFERS if self._buffers.is_kept and self._buffers.are_spoiled() else 0

    def _has_clean_state(self) -> bool:
        """Say whether the optimizer's state is finite; a single number may be meant, such as a least loss."""
        return are_finite(each for each in self._copy.live_state() if has_numbers(each) and each.ndim)

    def _update(self, is_moderate: bool) -> bool:
        """Make the update, and say whether it may stay."""
        has_no_risk = is_tame(self._state.optimizer)
        if not self._is_known:  # it may have come with NaN, from a file or from somebody else's loop
            self._is_known = self._has_clean_state()
            has_no_risk = has_no_risk and self._is_known
        if is_moderate and has_no_risk:
            self._make_update()
            return True
        self._copy.take()
        if not has_no_risk and self._is_known:
            self._say_why()
        self._make_update()
        if self._copy.is_finite():
            return True
        self._copy.restore()
        return False

    def _make_update(self) -> None:
        self._state.optimizer.step()

    def _conclude(self, scalars: Scalars, found: int, is_left_out: bool, is_spoiled: bool) -> None:
        if is_left_out or is_spoiled:
            self._note_left_out()
            if self._buffers.is_kept:
                self._buffers.restore()
            found |= LEFT_OUT if is_left_out else 0
            if self._mode == "stop":
                self._has_tripped = True
            elif _has_nan([each for each in self._copy.live() if has_numbers(each)]):
                found |= SPOILED
            scalars[SKIPPED] = float(found)
        self._buffers.forget()

    def _note_left_out(self) -> None:
        optimizer: Any = self._state.optimizer
        optimizer._opt_called = True  # or torch warns of a scheduler that moves before its optimizer

    def _say_why(self) -> None:
        self._say_cost("is none of torch's usual ones, or has hooks, or settings that may overflow")

    def _say_cost(self, reason: str, remedy: str = "") -> None:
        if self._has_said:
            return
        self._has_said = True
        print(
            f"on_nonfinite={self._mode}: {type(self._state.optimizer).__name__} {reason}, so each update is "
            f"made from a copy, which takes {self._copy.nbytes / 1e6:,.1f} MB more memory. {remedy}"
            "on_nonfinite=ignore leaves it out.",
            file=sys.stderr,
        )


def _is_clean(tensor: torch.Tensor, counts_infinity: bool) -> bool:
    if not has_numbers(tensor):
        return True
    return are_finite([tensor]) if counts_infinity else not _has_nan([tensor])


def _has_nan(tensors: Sequence[torch.Tensor]) -> bool:
    return not are_moderate(tensors) and any(bool(torch.isnan(each).any().item()) for each in tensors)
