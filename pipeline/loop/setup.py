"""Checks and arrangements before the first step: what a wrong combination is refused for."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from pipeline.checkpoint import CheckpointFolder
from pipeline.errors import ConfigError, noting_on
from pipeline.loggers import JsonlLogger, ProgressBar
from pipeline.loop.callback import Callback, EarlyStopping
from pipeline.loop.objective import Objective, from_loss_fn, from_step
from pipeline.protocols import Logger, LossFn, Metrics, Scheduler, StatefulMetric, Step
from pipeline.settings import AUTO_RUN_DIR, AUTOCAST_DTYPE, Precision, Settings


def make_objective(loss_fn: LossFn | None, step: Step | None) -> Objective:
    """Return the objective that the user described.

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
    return from_step(step) if step is not None else from_loss_fn(loss_fn)  # type: ignore[arg-type]


def check_model(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Scheduler | None,
    val_data: Any,
) -> None:
    """Refuse what could only train nothing.

    Raises:
        ConfigError: Naming every problem found.
    """
    problems = []
    if not isinstance(model, torch.nn.Module) or not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            "fit takes a torch.nn.Module and one torch.optim.Optimizer, got "
            f"{type(model).__name__} and {type(optimizer).__name__}."
        )
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    optimized = {id(each) for group in optimizer.param_groups for each in group["params"]}
    if not trainable:
        problems.append(
            f"model ({type(model).__name__}) has no trainable parameters: there is nothing to learn. "
            "Set requires_grad=True on what is to be trained."
        )
    elif not trainable & optimized:
        problems.append(
            "optimizer holds none of the model's trainable parameters, so no step would change the "
            "model. Make it from model.parameters()."
        )
    if scheduler is not None and scheduler.optimizer is not optimizer:
        problems.append(
            "scheduler was made for another optimizer: its learning rates would never be used. Make "
            "it from the optimizer that is passed to fit."
        )
    if isinstance(scheduler, ReduceLROnPlateau) and val_data is None:
        problems.append("ReduceLROnPlateau looks at validations, and there are none: pass val_data=.")
    if problems:
        raise ConfigError(problems)


def check_listeners(
    callbacks: Sequence[Callback], loggers: Sequence[Logger], metrics: Metrics, val_data: Any
) -> None:
    """Refuse what could not be told anything.

    Raises:
        ConfigError: Naming every one of them.
    """
    for name, listeners in (("callbacks", callbacks), ("loggers", loggers)):
        if not isinstance(listeners, (list, tuple)):
            raise ConfigError(f"{name} must be a list, got {listeners!r}.")
    if not isinstance(metrics, Mapping) or not all(
        callable(each) or isinstance(each, StatefulMetric) for each in metrics.values()
    ):
        raise ConfigError(f"metrics must be a dict of names and functions, got {metrics!r}.")
    problems = [
        f"callbacks must be objects of a subclass of pipeline.Callback, got {each!r}."
        for each in callbacks
        if not isinstance(each, Callback)
    ]
    problems += [
        f"a logger must have the methods log, flush and close, got {each!r}."
        for each in loggers
        if not all(hasattr(each, name) for name in ("log", "flush", "close"))
    ]
    if val_data is None and any(isinstance(each, EarlyStopping) for each in callbacks):
        problems.append("EarlyStopping looks at validations, and there are none: pass val_data=.")
    if problems:
        raise ConfigError(problems)


def check_monitor(monitor: str, loss_fn: LossFn | None, val_data: Any, metrics: Metrics) -> None:
    """Refuse to monitor what will not be computed, where that is known beforehand.

    Raises:
        ConfigError: If `monitor` names no validation metric.
    """
    known = ["val/loss", *(f"val/{name}" for name in metrics)]
    if loss_fn is not None and val_data is not None and monitor not in known:
        raise ConfigError(
            f"monitor must be one of {', '.join(known)}, got {monitor!r}. Pass the metric in metrics=."
        )


def split_batching(
    train_data: Any,
    val_data: Any,
    batch_size: int | None,
    collate_fn: Callable[[list[Any]], Any] | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return which batch size and collate function go with which data.

    A DataLoader has its own. If only one of the two is a DataLoader, they are for the other; given
    with nothing but DataLoaders they are a mistake, which is left for `as_source` to refuse.
    """
    given = {"batch_size": batch_size, "collate_fn": collate_fn}
    none = {"batch_size": None, "collate_fn": None}
    is_loader = [isinstance(data, DataLoader) for data in (train_data, val_data)]
    if val_data is None or all(is_loader):
        return given, given
    return none if is_loader[0] else given, none if is_loader[1] else given


def resolve_limit(name: str, limit: int | float | None, num_batches: int | None) -> int | None:
    """Return a limit in batches.

    Raises:
        ConfigError: For a share of a number that nobody knows.
    """
    if not isinstance(limit, float):
        return limit
    if num_batches is None:
        raise ConfigError(
            f"{name}={limit} is a share of the batches, but the data does not say how many there "
            "are. Give a number of batches."
        )
    return max(1, int(num_batches * limit))


def at_most(count: int | None, limit: int | None) -> int | None:
    """Return the smaller of two numbers, of which None is unknown or unlimited."""
    return min((each for each in (count, limit) if each is not None), default=None)


def check_choice(name: str, found: str, choices: tuple[str, ...]) -> None:
    """Refuse a value outside of a closed set.

    Raises:
        ConfigError: Naming the choices.
    """
    if found not in choices:
        raise ConfigError(f"{name} must be {' or '.join(choices)}, got {found!r}.")


def place(
    settings: Settings,
    device: torch.device,
    model: torch.nn.Module,
    loss_fn: LossFn | None,
    metrics: Metrics,
) -> None:
    """Put the model, and a loss and metrics that have tensors of their own, on the device."""
    model.to(device)
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    for part in (loss_fn, *metrics.values()):
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


def make_loggers(settings: Settings, run_dir: Path | None, num_batches: int | None) -> list[Logger]:
    """Return the loggers that every run has: ``metrics.jsonl`` and the bar."""
    loggers: list[Logger] = []
    if run_dir is not None:
        loggers.append(JsonlLogger(run_dir / "metrics.jsonl"))
    if settings.enable_progress_bar:
        num_steps = settings.max_steps
        if settings.epoch_limit is not None and num_batches is not None:
            num_steps = settings.epoch_limit * -(-num_batches // settings.accumulate_grad_batches)
        loggers.append(ProgressBar(num_steps))
    return loggers


def make_checkpoints(settings: Settings, run_dir: Path | None) -> CheckpointFolder | None:
    """Return where checkpoints go, or None if there are to be none."""
    if run_dir is None or not settings.enable_checkpointing:
        return None
    return CheckpointFolder(run_dir / "checkpoints", settings.monitor_mode)


@contextlib.contextmanager
def closing_all(loggers: Sequence[Logger]) -> Iterator[None]:
    """Close every logger after the block; an error of the block is not lost to one of theirs."""
    try:
        yield
    except BaseException as error:
        for logger in loggers:
            with noting_on(error):
                logger.close()
        raise
    with contextlib.ExitStack() as stack:
        for logger in loggers:
            stack.callback(logger.close)


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler | None:
    """Return the loss scaling that float16 needs.

    Reads from the device at each step unless the optimizer was made with ``fused=True``.
    """
    return torch.amp.GradScaler(device.type) if precision == "16-mixed" else None


def make_run_dir(run_dir: str | Path | None) -> Path | None:
    """Make the folder for a run's files: ``runs/<time>`` for ``auto``, none for None.

    Raises:
        ConfigError: If it holds a run already.
    """
    if run_dir is None:
        return None
    if run_dir != AUTO_RUN_DIR:
        if (Path(run_dir) / "metrics.jsonl").exists():
            raise ConfigError(
                f"run_dir must be a new folder, but {run_dir} holds a run already. Name another, or "
                "leave it out for runs/<time>."
            )
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        return Path(run_dir)
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for number in itertools.count():
        folder = Path("runs") / (f"{stamp}_{number}" if number else stamp)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("unreachable")


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


def make_ema(model: torch.nn.Module, decay: float | None) -> Any:
    """Return the averaged copy of a model; batch-norm statistics are copied, not averaged."""
    if decay is None:
        return None
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
