"""What a wrong combination is refused for, before the first step: every problem, with what to type."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset

from pipeline.errors import ConfigError
from pipeline.loop.callback import Callback, EarlyStopping
from pipeline.protocols import Logger, LossFn, Metrics, Scheduler, StatefulMetric
from pipeline.settings import Settings


def check_model(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Scheduler | None,
    val_data: Any,
    settings: Settings,
) -> None:
    """Refuse what could only train nothing, or not from the first step on.

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
    problems += _lazy_problems(settings, model)
    if problems:
        raise ConfigError(problems)


def _lazy_problems(settings: Settings, model: torch.nn.Module) -> list[str]:
    """Return what needs a lazy module's tensors before its first batch has made them."""
    lazy = next((name for name, each in model.named_parameters() if is_lazy(each)), None)
    wanted = {"ema_decay": settings.ema_decay is not None, "channels_last": settings.channels_last}
    return [
        f"{name} needs every tensor of the model, and {lazy} is made by the first batch. Run one through the "
        "model before fit: with torch.no_grad(): model(inputs)."
        for name, is_wanted in wanted.items()
        if is_wanted and lazy is not None
    ]


def check_listeners(
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger],
    groups: Sequence[Metrics],
    val_data: Any,
) -> None:
    """Refuse what could not be told anything.

    Raises:
        ConfigError: Naming every one of them.
    """
    for name, listeners in (("callbacks", callbacks), ("loggers", loggers)):
        if not isinstance(listeners, (list, tuple)):
            raise ConfigError(f"{name} must be a list, got {listeners!r}.")
    for metrics in groups:
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


def check_targets(
    monitor: str, loss_fn: LossFn | None, val_data: Any, metrics: Metrics, scheduler_interval: str
) -> None:
    """Refuse to monitor what will not be computed, where that is known beforehand.

    Raises:
        ConfigError: If `monitor` names no validation metric, or the scheduler has an unknown interval.
    """
    check_choice("scheduler_interval", scheduler_interval, ("step", "epoch"))
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
    num_shards: int = 1,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return which batch size, collate function and number of shards go with which data.

    A DataLoader has its own. If only one of the two is a DataLoader, they are for the other; given
    with nothing but DataLoaders they are a mistake, which is left for `as_source` to refuse. Shards are for
    iterable datasets; if only one of the two is, they are for that one.
    """
    train, val = _split_batching(train_data, val_data, {"batch_size": batch_size, "collate_fn": collate_fn})
    if isinstance(val_data, IterableDataset):
        val["num_shards"] = num_shards
    if isinstance(train_data, IterableDataset) or "num_shards" not in val:
        train["num_shards"] = num_shards
    return train, val


def _split_batching(
    train_data: Any, val_data: Any, given: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    none = dict.fromkeys(given)
    is_loader = [isinstance(data, DataLoader) for data in (train_data, val_data)]
    if val_data is None or all(is_loader):
        return dict(given), dict(given)
    return none if is_loader[0] else given, none if is_loader[1] else dict(given)


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


def check_choice(name: str, found: str, choices: tuple[str, ...]) -> None:
    """Refuse a value outside of a closed set.

    Raises:
        ConfigError: Naming the choices.
    """
    if found not in choices:
        raise ConfigError(f"{name} must be {' or '.join(choices)}, got {found!r}.")
