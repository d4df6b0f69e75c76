"""Arrangements before the first step: device, precision, folders, loggers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from pipeline.errors import ConfigError
from pipeline.protocols import LossFn, Scheduler, Step
from pipeline.settings import AUTOCAST_DTYPE, Precision, Settings
from pipeline.state import TrainState
from pipeline.step.objective import Objective, from_loss_fn, from_step


def make_objective(loss_fn: LossFn | None, step: Step | None, *, has_metrics: bool = False) -> Objective:
    """Return the objective that the user described.

    Args:
        loss_fn: Or `step`.
        step: Or `loss_fn`.
        has_metrics: Whether metrics are called with what the step returned.

    Raises:
        ConfigError: If neither or both of the two were given.
    """
    if isinstance(loss_fn, type):
        raise ConfigError(f"loss_fn is a class: pass {loss_fn.__name__}(), an object that can be called.")
    if (loss_fn is None) == (step is None):
        found = "neither" if loss_fn is None else "both"
        raise ConfigError(
            f"give either loss_fn=, for batches of (inputs, target), or step=, a function of (model, "
            f"batch) that returns the loss; got {found}."
        )
    if step is not None:
        return from_step(step, has_metrics=has_metrics)
    assert loss_fn is not None
    return from_loss_fn(loss_fn)


def check_counters(count_samples: Any, count_tokens: Any = None) -> None:
    """Refuse what cannot be asked how many samples or tokens a batch has.

    Raises:
        ConfigError: Naming it.
    """
    counters = {"count_samples": count_samples}
    if count_tokens is not None:
        counters["count_tokens"] = count_tokens
    for name, found in counters.items():
        if not callable(found):
            raise ConfigError(
                f"{name} must be a function of a batch that returns a number, got {found!r}. Leave it out, "
                f"or pass one such as {name}=lambda batch: batch[0].size(0)."
            )


def at_most(count: int | None, limit: int | None) -> int | None:
    """Return the smaller of two numbers, of which None is unknown or unlimited."""
    return min((each for each in (count, limit) if each is not None), default=None)


def place(
    settings: Settings,
    device: torch.device,
    model: torch.nn.Module,
    *parts: Any,
) -> None:
    """Put the model, and a loss and metrics that have tensors of their own, on the device."""
    model.to(device)
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    for part in parts:
        if isinstance(part, torch.nn.Module):
            part.to(device)


def compile_model(model: torch.nn.Module, keywords: bool | Mapping[str, Any]) -> torch.nn.Module:
    """Return the model as it is to be called; its parameters stay those of the user's module."""
    if keywords is False:
        return model
    compiled: Any = torch.compile(model, **({} if keywords is True else dict(keywords)))
    return compiled  # type: ignore[no-any-return]


def make_autocast(precision: Precision, device: torch.device) -> Callable[[], Any]:
    """Return what makes the context in which the model runs."""
    dtype = AUTOCAST_DTYPE[precision]
    return contextlib.nullcontext if dtype is None else partial(torch.autocast, device.type, dtype)


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler | None:
    """Return the loss scaling that float16 needs.

    Reads from the device at each step unless the optimizer was made with ``fused=True``.
    """
    return torch.amp.GradScaler(device.type) if precision == "16-mixed" else None


@contextlib.contextmanager
def deterministic_algorithms(is_enabled: bool) -> Iterator[None]:
    """Use torch's deterministic algorithms inside the block, and put the settings back.

    cuBLAS needs a workspace of fixed size for it, which it reads from the environment when it starts.
    """
    if not is_enabled:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    has_workspace = "CUBLAS_WORKSPACE_CONFIG" in os.environ
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        yield
    finally:
        if not has_workspace:
            del os.environ["CUBLAS_WORKSPACE_CONFIG"]
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark


def to_channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """Lay out images ``[B, C, H, W]`` with the channels last; leave everything else as it is."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def make_state(
    settings: Settings,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Scheduler | None,
    device: torch.device,
) -> TrainState:
    """Return what training changes, with the loss scaling and the average that the settings ask for."""
    scaler = make_scaler(settings.precision, device)
    return TrainState(model, optimizer, scheduler, scaler, make_ema(model, settings.ema_decay))


def make_ema(model: torch.nn.Module, decay: float | None) -> Any:
    """Return the averaged copy of a model; batch-norm statistics are copied, not averaged."""
    if decay is None:
        return None
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
