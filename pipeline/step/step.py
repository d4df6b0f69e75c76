"""One optimizer step: forward and backward for each micro-batch, then the update."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pipeline.batch import Batch, Scalars
from pipeline.errors import add_stage_note
from pipeline.settings import AUTOCAST_DTYPE, Settings
from pipeline.state import TrainState
from pipeline.step.clipping import make_clipping
from pipeline.step.guard import Guard
from pipeline.step.objective import Computed, Objective, refuse_graphless
from pipeline.step.out_of_memory import note_out_of_memory
from pipeline.step.train_metrics import TrainMetrics
from pipeline.watch.clock import BACKWARD, FORWARD, OPTIMIZER, StepClock

_TORCHS_ZERO_GRAD = torch.optim.Optimizer.zero_grad  # as it is before anybody replaces it


class TrainStep:
    """Runs the user's model; reads nothing from the device.

    Args:
        state: What is trained.
        forward_model: The model as it is called: `state.model`, or its compiled form.
        objective: From a batch to a loss.
        settings: Accumulation, clipping, precision.
        device: Where the model is.
        scheduler_interval: Whether the scheduler moves with each ``step`` or each ``epoch``.
        clock: Told when forward, backward and the optimizer begin.
        metrics: Of the training batches; None for none.
        guard: Keeps the weights clean of NaN; None lets them be.
        reads_at_once: Whether to read a step's numbers where they are made, which on the CPU waits for
            nothing, and costs less than to keep them.

    Runs on:
        Loop thread.
    """

    def __init__(
        self,
        state: TrainState,
        forward_model: torch.nn.Module,
        objective: Objective,
        settings: Settings,
        device: torch.device,
        scheduler_interval: Literal["step", "epoch"],
        clock: StepClock,
        metrics: TrainMetrics | None = None,
        guard: Guard | None = None,
        *,
        reads_at_once: bool = False,
    ) -> None:
        self._enter_stage = clock.enter
        self._state, self._model, self._objective = state, forward_model, objective
        self._settings, self.device, self.metrics = settings, device, metrics
        self._guard = guard
        self._keep_buffers = None if guard is None else guard.begin
        self._settle_guard = None if guard is None or state.scaler is None else guard.settle
        self._num_accumulated = settings.accumulate_grad_batches
        self._reads_at_once = reads_at_once and self._num_accumulated == 1
        self._autocast_dtype = AUTOCAST_DTYPE[settings.precision]
        self._clip = make_clipping(settings, state)
        self._steps_scheduler = (
            scheduler_interval == "step"
            and state.scheduler is not None
            and not isinstance(state.scheduler, ReduceLROnPlateau)
        )
        self._scalars: Scalars = {}  # sums over the micro-batches so far, and of how many
        self._counts: dict[str, int] = {}
        self.num_pending = 0

    def micro_batch(self, batch: Batch) -> bool:
        """Forward and backward; the gradients add to those of the micro-batches before.

        Returns:
            Whether an update is due: the gradients of enough micro-batches are there.

        Raises:
            StageError: If the batch or the loss is not what it should be.
            Exception: The user's own, with a note.
        """
        self._enter_stage(FORWARD)
        if self._keep_buffers is not None and not self.num_pending:
            self._keep_buffers()
        try:
            if self._autocast_dtype is None:
                computed = self._objective(self._model, batch)
            else:
                with torch.autocast(self.device.type, self._autocast_dtype):
                    computed = self._objective(self._model, batch)
            loss = computed.loss
            if not loss.requires_grad:
                refuse_graphless()
            if self._num_accumulated > 1:
                loss = loss / self._num_accumulated
            if self._state.scaler is not None:
                loss = self._state.scaler.scale(loss)
            self._enter_stage(BACKWARD)
            loss.backward()  # type: ignore[no-untyped-call]
            of_metrics = {} if self.metrics is None else self.metrics.add(computed, batch)
            read = float(computed.loss.item()) if self._reads_at_once else None
            if self._guard is not None:
                self._guard.look(computed.loss if read is None else read)
        except Exception as error:
            note_out_of_memory(error, self.device, batch)
            add_stage_note(error, "step", step=self._state.step)
            raise
        if read is not None:
            self._scalars = {**_read(computed.scalars), **of_metrics} if computed.scalars else of_metrics
            self._scalars["train/loss"] = read
        elif computed.scalars or self._num_accumulated > 1:
            self._add_scalars(computed, of_metrics)
        else:
            # The loss as it is: its graph is freed, and a detach costs 4 µs.
            self._scalars = {"train/loss": computed.loss, **of_metrics}
        self.num_pending += 1
        return self.num_pending >= self._num_accumulated

    def state_dict(self) -> dict[str, Any]:
        """Return what the micro-batches since the last update have left: gradients and sums, live."""
        if not self.num_pending:
            return {"num_pending": 0}
        gradients = [None if each.grad is None else each.grad for each in self._parameters()]
        return {
            "num_pending": self.num_pending,
            "guard": None if self._guard is None else self._guard.state_dict(),
            "scalars": dict(self._scalars),
            "counts": dict(self._counts),
            "gradients": gradients,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with an accumulation."""
        self.num_pending = state["num_pending"]
        if not self.num_pending:
            return
        if self._guard is not None and state.get("guard") is not None:
            self._guard.load_state_dict(state["guard"])
        self._counts = dict(state["counts"])
        self._scalars = {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in state["scalars"].items()
        }
        for parameter, gradient in zip(self._parameters(), state["gradients"], strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)

    def spoiled_part(self) -> str | None:
        """Say what is not finite by now, if there is a guard; nothing if all is. Waits for the device."""
        return None if self._guard is None else self._guard.spoiled_part()

    def _parameters(self) -> list[torch.Tensor]:
        """Return every parameter once: the model's, and those that only the optimizer knows."""
        of_optimizer = [each for group in self._state.optimizer.param_groups for each in group["params"]]
        return list({id(each): each for each in [*self._state.model.parameters(), *of_optimizer]}.values())

    def update(self) -> Scalars:
        """Clip, step the optimizer and what follows it, and return the step's scalars.

        Returns:
            ``train/loss`` and what the user's step returned, averaged over the micro-batches;
            ``train/lr`` as it was for this update; ``train/grad_norm`` where it was computed.
        """
        self._enter_stage(OPTIMIZER)
        state, scalars = self._state, self._scalars
        self._scalars, self.num_pending = {}, 0
        if self._counts:
            self._average(scalars)
        rate = state.optimizer.param_groups[0]["lr"]
        # A tensor is what a scheduler changes in place: keep it as it was for this update.
        scalars["train/lr"] = rate if isinstance(rate, float) else _kept(rate)
        try:
            if self._settle_guard is not None:
                self._settle_guard()
            if self._clip is not None:
                self._clip(scalars)
            if self._guard is not None:
                self._guard.step(scalars)
            elif state.scaler is None:
                state.optimizer.step()
            else:
                state.scaler.step(state.optimizer)
                state.scaler.update()
            clear_gradients(state.optimizer)
            if self._steps_scheduler and state.scheduler is not None:
                state.scheduler.step()
            if state.ema is not None:
                state.ema.update_parameters(state.model)
        except Exception as error:
            note_out_of_memory(error, self.device)
            add_stage_note(error, "optimizer", step=state.step)
            raise
        state.step += 1
        return scalars

    def _add_scalars(self, computed: Computed, of_metrics: Scalars) -> None:
        found: Scalars = {}
        for name, value in computed.scalars.items():
            # A snapshot: what the user returned may be a live buffer, or a weight about to change.
            snapshot = value.detach().clone() if isinstance(value, torch.Tensor) else float(value)
            found[_full(name)] = snapshot
        found |= of_metrics
        found["train/loss"] = computed.loss.detach()
        for name, value in found.items():
            self._counts[name] = self._counts.get(name, 0) + 1
            self._scalars[name] = self._scalars[name] + value if name in self._scalars else value

    def _average(self, scalars: Scalars) -> None:
        for name, count in self._counts.items():
            if count > 1:
                scalars[name] = scalars[name] / count
        self._counts = {}


def clear_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Do as `zero_grad` does; call that itself, if it is not torch's own.

    torch's own has a range of the profiler around it, which in the middle of a training takes 50 µs, whether
    anybody profiles or not.
    """
    zero_grad: Any = optimizer.zero_grad
    if getattr(zero_grad, "__func__", None) is not _TORCHS_ZERO_GRAD:
        zero_grad()
        return
    for group in zero_grad.__self__.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def _read(scalars: Scalars) -> dict[str, float]:
    return {
        _full(name): float(value.item() if isinstance(value, torch.Tensor) else value)
        for name, value in scalars.items()
    }


def _full(name: str) -> str:
    return name if "/" in name else f"train/{name}"


def _kept(rate: torch.Tensor | float) -> torch.Tensor | float:
    return rate.detach().clone() if isinstance(rate, torch.Tensor) else rate
