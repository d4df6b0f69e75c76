"""What training changes: the model, its optimizer and schedule, and how far they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pipeline.errors import CheckpointError
from pipeline.protocols import Scheduler
from pipeline.state import groups
from pipeline.state.naming import notes_of, with_names_of, with_notes, with_plain_names


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
        """Return the parts' states, live and not copied; names in them are those of the plain model."""
        states = {name: part.state_dict() for name, part in self._parts().items() if name != "scaler"}
        model = with_plain_names(self.model, states["model"])
        states["model"] = dict(model)
        states["optimizer"] = groups.without_wrappers(self.model, self.optimizer, states["optimizer"])
        if "scheduler" in states:  # functions, which a fresh scheduler has itself
            states["scheduler"] = _without_functions(states["scheduler"])
        if self.scaler is not None:
            states["scaler"] = _scaler_state(self.scaler)
        if self.ema is not None:
            weights = with_plain_names(self.ema.module, self.ema.module.state_dict())
            states["ema"] = {"n_averaged": self.ema.n_averaged, "weights": dict(weights)}
        return {
            "epoch": self.epoch,
            "step": self.step,
            **states,
            "modules": notes_of(model),
            "buffers": with_plain_names(self.model, self._unsaved_buffers()),
            "trained": groups.describe(self.model, self.optimizer),
        }

    def load_state_dict(self, found: dict[str, Any]) -> None:
        """Take over the parts' states.

        Raises:
            CheckpointError: If one is missing, or belongs to another model.
        """
        self.load_weights(found)
        self.load_training(found)

    def load_weights(self, found: dict[str, Any]) -> None:
        """Take over the weights, their average, and how far the run was: what does not depend on callbacks.

        Raises:
            CheckpointError: If a part is missing, or belongs to another model.
        """
        missing = [name for name in self._parts() if name not in found]
        if missing:
            raise CheckpointError(f"it has no {' and no '.join(missing)}: the run was set up differently.")
        model = with_notes(found["model"], found.get("modules"))
        self._load("model", with_names_of(self.model, self.model.state_dict(), model))
        if self.ema is not None:
            self._load("ema", _ema_state(self.ema, found["ema"], found.get("modules")))
        buffers = self._unsaved_buffers()
        for name, value in with_names_of(self.model, buffers, found.get("buffers", {})).items():
            _put_buffer(self.model, name, value)
        self.epoch, self.step = found["epoch"], found["step"]

    def load_training(self, found: dict[str, Any]) -> None:
        """Take over what trains the weights, once callbacks have had their turn to add groups of parameters.

        Groups that they added in the run that was stopped, and have not added now, are added here.

        Raises:
            CheckpointError: If a part belongs to another model.
        """
        state = found["optimizer"]
        if "trained" in found:
            groups.restore(self.model, self.optimizer, found["trained"], state["param_groups"])
        self._load("optimizer", groups.with_own_names(self.optimizer, state))
        groups.keep_dtypes(self.optimizer, state)
        if self.scheduler is not None:
            _check_functions(self.scheduler, found["scheduler"])
        for name in ("scheduler", "scaler"):
            if getattr(self, name) is not None:
                self._load(name, _numbers(found[name]) if name == "scaler" else found[name])
        if self.step:  # or torch takes a scheduler's next step for one before the first of the optimizer
            self.optimizer._opt_called = True  # type: ignore[attr-defined]

    def _load(self, name: str, state: dict[str, Any]) -> None:
        try:
            self._parts()[name].load_state_dict(state)
        except (RuntimeError, KeyError, ValueError, AttributeError, TypeError) as error:
            raise CheckpointError(f"its {name} does not fit this run's: {error}") from error

    def _parts(self) -> dict[str, Any]:
        parts = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "ema": self.ema,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _unsaved_buffers(self) -> dict[str, torch.Tensor | None]:
        """Return the buffers that the model leaves out of its state: they may decide the next step too."""
        saved, ids = self.model.state_dict().keys(), set[int]()
        found: dict[str, torch.Tensor | None] = {}
        for prefix, module in self.model.named_modules():
            for leaf, each in module._buffers.items():
                name = f"{prefix}.{leaf}" if prefix else leaf
                is_there = each is not None or leaf in module._non_persistent_buffers_set
                if is_there and name not in saved and id(each) not in ids:
                    found[name] = each
                    ids |= set() if each is None else {id(each)}
        return found


def _check_functions(scheduler: Scheduler, found: dict[str, Any]) -> None:
    """Refuse a scheduler that has another number of functions than groups: its next step would fail."""
    before, now = found.get("lr_lambdas"), getattr(scheduler, "lr_lambdas", None)
    if isinstance(before, list) and isinstance(now, list) and len(before) != len(now):
        raise CheckpointError(
            f"its scheduler has {len(before)} functions in lr_lambdas, this run's has {len(now)}: they are "
            "not in a file. Let the callback that appended them do so again in its load_state_dict."
        )


def _without_functions(state: Any) -> Any:
    """Return a scheduler's state without its functions, and without lists of nothing else, at any depth."""
    if isinstance(state, dict):
        kept = {name: value for name, value in state.items() if not _is_functions(value)}
        is_plain = type(state) is dict  # others, such as a Counter, hold no states of schedulers
        return {name: _without_functions(value) for name, value in kept.items()} if is_plain else state
    return [_without_functions(each) for each in state] if type(state) is list else state


def _is_functions(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(callable, value))
    return callable(value)


def _ema_state(
    ema: torch.optim.swa_utils.AveragedModel, found: dict[str, Any], notes: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the average's state as torch has it, which is how older files have it."""
    before = {name.removeprefix("module."): each for name, each in found.items() if name != "n_averaged"}
    weights = with_names_of(
        ema.module, ema.module.state_dict(), with_notes(found.get("weights", before), notes)
    )
    state = {"n_averaged": found["n_averaged"], **{f"module.{name}": each for name, each in weights.items()}}
    notes = notes_of(weights) or {}
    return with_notes(state, {f"module.{name}".rstrip("."): each for name, each in notes.items()} or None)


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


@torch.no_grad()
def _put_buffer(model: torch.nn.Module, name: str, value: torch.Tensor | None) -> None:
    """Give a buffer its value back, which may have another shape by then, or be there only since a step."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:  # one that a step has added
        return
    now = module._buffers.get(leaf)
    if now is not None and value is not None and now.shape == value.shape:
        now.copy_(value)
        return
    device = next((each.device for each in model.parameters()), None) if now is None else now.device
    value = None if value is None else value.to(device)
    if leaf in module._buffers:
        module._buffers[leaf] = value
    elif not hasattr(module, leaf):
        module.register_buffer(leaf, value, persistent=False)
