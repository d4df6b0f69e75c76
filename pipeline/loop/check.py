"""What a wrong combination is refused for, before the first step: every problem, with what to type."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset

from pipeline.callbacks.early_stopping import EarlyStopping
from pipeline.callbacks.events import Callback
from pipeline.data import is_read_once, own_generators, several_sets_problem
from pipeline.errors import ConfigError
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
    problems = _step_problems(optimizer)
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


def _step_problems(optimizer: Any) -> list[str]:
    """Say what is wrong with an optimizer whose step must be given something; from its signature."""
    try:
        parameters = inspect.signature(optimizer.step).parameters.values()
    except (AttributeError, TypeError, ValueError):
        return []
    needed = [
        each.name
        for each in parameters
        if each.default is each.empty
        and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        and each.name != "self"  # of a method that a scheduler has wrapped
    ]
    name, given = type(optimizer).__name__, ", ".join(needed)
    why = " (which computes the loss again, several times a step)" if "closure" in needed else ""
    return needed and [
        f"optimizer ({name}) makes no step by itself: its step() must be given {given}{why}, and fit makes "
        "one forward and one backward a step. Pass another, such as torch.optim.AdamW(model.parameters()), "
        "or write the loop: for batch in pipeline.Loader(train_data, batch_size=64): "
        f"optimizer.step({given})."
    ]


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
    settings: Settings,
    loss_fn: LossFn | None,
    train_data: Any,
    val_data: Any,
    batch_size: int | None,
    metrics: Metrics,
    scheduler_interval: str,
) -> None:
    """Refuse to monitor what will not be computed, and data that cannot be validated on, where that is known.

    Raises:
        ConfigError: If `monitor` names no validation metric, the scheduler has an unknown interval, or the
            data would fail at a validation.
    """
    check_choice("scheduler_interval", scheduler_interval, ("step", "epoch"))
    known = ["val/loss", *(f"val/{name}" for name in metrics)]
    if loss_fn is not None and val_data is not None and settings.monitor not in known:
        raise ConfigError(
            f"monitor must be one of {', '.join(known)}, got {settings.monitor!r}. Pass the metric in "
            "metrics=."
        )
    if loss_fn is not None and batch_size is None:
        _check_pairs(val_data)
    _check_iterators(settings, train_data, val_data)
    _warn_of_shared_generator(settings, train_data, val_data)


def _warn_of_shared_generator(settings: Settings, train_data: Any, val_data: Any) -> None:
    """Say that a validation in the middle of an epoch may find a generator elsewhere than a plain loop does.

    What a sampler draws at its end, or a belt ahead of the loop, may come on the other side of it.
    """
    mine, others = ({id(each) for each in own_generators(data)} for data in (train_data, val_data))
    if settings.val_check_interval is not None and mine & others:
        warnings.warn(
            "train_data and val_data draw from one generator, and validations come in the middle of epochs: "
            "the orders that they draw may differ from a plain loop's. Give each a generator of its own.",
            stacklevel=4,
        )


def _check_pairs(val_data: Any) -> None:
    """Refuse a list of what are no pairs; several sets are left to `as_source`."""
    if not isinstance(val_data, (list, tuple)) or several_sets_problem(val_data, "val_data", None):
        return
    for first in val_data[:1]:
        if not isinstance(first, (list, tuple)) or len(first) != 2:
            raise ConfigError(
                f"with loss_fn a batch must be a pair (inputs, target), but val_data[0] is a "
                f"{type(first).__name__}. Pass pairs, or step= instead of loss_fn=."
            )


def _check_iterators(settings: Settings, train_data: Any, val_data: Any) -> None:
    """Refuse to read an iterator several times; warn where nobody knows how often it would be read."""
    num_epochs, every_n = settings.epoch_limit or 1, settings.check_val_every_n_epoch
    has_end = is_read_once(train_data) and not isinstance(train_data, itertools.cycle)
    if has_end and num_epochs > 1 and settings.limit_train_batches is None:
        raise ConfigError(_read_once("train_data", train_data, "the second epoch"))
    if not is_read_once(val_data) or settings.limit_val_batches is not None:
        return
    if isinstance(val_data, itertools.cycle):
        raise ConfigError("val_data is an itertools.cycle, which never ends: set limit_val_batches.")
    problem = _read_once("val_data", val_data, "a second validation")
    if settings.max_steps is not None or settings.val_check_interval is not None:
        warnings.warn(problem, stacklevel=4)
    elif every_n is not None and num_epochs > every_n:
        raise ConfigError(problem)


def _read_once(name: str, data: Any, when: str) -> str:
    limit = "limit_train_batches" if name == "train_data" else "limit_val_batches"
    return (
        f"{name} is an iterator ({type(data).__name__}), which can be read only once: {when} would find it "
        f"empty. Pass a DataLoader, a list, or an object whose __iter__ starts anew; or set {limit}, if it "
        "is long enough to be read on."
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
