"""From a batch to a loss: the user's `loss_fn` or `step`, and what is wrong with what it returns."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeAlias

import torch

from pipeline.batch import Batch, Scalars
from pipeline.errors import StageError, listed, warn_harmlessly
from pipeline.protocols import LossFn, Step


class Computed(NamedTuple):
    """What a forward pass gave.

    Args:
        loss: A scalar tensor.
        scalars: Further numbers that the user's step returned, by name.
        metric_args: What metrics are called with.
    """

    loss: torch.Tensor
    scalars: Scalars
    metric_args: tuple[Any, ...]


Objective: TypeAlias = Callable[[torch.nn.Module, Batch], Computed]


def from_loss_fn(loss_fn: LossFn) -> Objective:
    """Take batches of ``(inputs, target)``, and give metrics ``(outputs, target)``."""

    def compute(model: torch.nn.Module, batch: Batch) -> Computed:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise StageError(
                f"with loss_fn a batch must be a pair (inputs, target), got {_describe(batch)}. "
                "Return pairs from the dataset or collate_fn, or pass step= instead of loss_fn=.",
                stage="step",
            )
        inputs, target = batch
        outputs = model(inputs)
        loss = loss_fn(outputs, target)
        if not isinstance(loss, torch.Tensor) or loss.ndim:
            _refuse_loss(loss)
        return Computed(loss, {}, (outputs, target))

    return compute


def from_step(step: Step, *, has_metrics: bool = False) -> Objective:
    """Take any batch; the step returns the loss, or a dict with ``loss`` and numbers to log.

    Args:
        step: The user's.
        has_metrics: Whether metrics take what the step returned: then it may hold more than numbers. So may
            a model's own output that is a kind of dict: its numbers are logged, and the rest is said once.
    """
    said = set[type]()

    def compute(model: torch.nn.Module, batch: Batch) -> Computed:
        returned = step(model, batch)
        if not isinstance(returned, dict):
            return Computed(_checked(returned), {}, (returned,))
        if "loss" not in returned:
            raise StageError(
                f"the dict that step returned must have the key 'loss', got {sorted(map(str, returned))}.",
                stage="step",
            )
        loss = _checked(returned["loss"])
        is_plain = type(returned).__module__ in ("builtins", "collections")
        takes_all = has_metrics or not is_plain
        scalars = {
            str(name): value if _is_scalar(value) else _as_scalar(name, value)
            for name, value in returned.items()
            if name != "loss" and (not takes_all or _is_scalar(value))
        }
        if not (is_plain or has_metrics or type(returned) in said):
            said.add(type(returned))
            _say_what_is_not_logged(returned)
        return Computed(loss, scalars, (returned,))

    return compute


def _say_what_is_not_logged(returned: dict[Any, Any]) -> None:
    rest = {str(name): each for name, each in returned.items() if name != "loss" and each is not None}
    names = [name for name, each in rest.items() if not _is_scalar(each)]
    if names:
        warn_harmlessly(
            f"step returned a {type(returned).__name__}: its numbers are logged, and {listed(names)} not. "
            "Return the loss alone, or a dict with it and the numbers that are wanted."
        )


def refuse_graphless() -> NoReturn:
    """Refuse a loss that nothing can be learned from: it does not depend on a parameter."""
    raise StageError(
        "the loss has no graph: it does not depend on any trainable parameter. Compute it from "
        "the model's outputs, without detach(), .item() or torch.no_grad().",
        stage="step",
    )


def _checked(loss: Any) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor) or loss.ndim:
        _refuse_loss(loss)
    return loss


def _refuse_loss(loss: Any) -> NoReturn:
    if not isinstance(loss, torch.Tensor):
        raise StageError(
            f"the loss must be a scalar tensor, got {_describe(loss)}. Return the tensor itself.",
            stage="step",
        )
    raise StageError(
        f"the loss must be a scalar, got shape {tuple(loss.shape)}. Reduce it with .mean().",
        stage="step",
    )


def _is_scalar(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.ndim == 0 and not value.is_complex()
    return isinstance(value, numbers.Real)  # NumPy's scalars too


def _as_scalar(name: Any, value: Any) -> torch.Tensor | float:
    """Return the number in a value that holds exactly one; refuse what is none by its name.

    Raises:
        StageError: If it is no number.
    """
    is_complex = isinstance(value, torch.Tensor) and value.is_complex()
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not is_complex:
        return value.reshape(())
    if getattr(value, "size", None) == 1 and getattr(getattr(value, "dtype", None), "kind", "") in "biuf":
        return float(value.item())  # NumPy's arrays of one
    raise StageError(
        f"step returned {name!r} beside the loss, which must be a number to be logged, got "
        f"{_describe(value)}. Reduce it, as with .mean() or .abs(), or leave it out of the dict; images, "
        "histograms and texts are logged by a callback, with event.log_image, log_histogram or log_text.",
        stage="step",
    )


def _describe(found: Any) -> str:
    if isinstance(found, torch.Tensor):
        return f"a tensor of shape {tuple(found.shape)}"
    if isinstance(found, dict):
        return f"a dict with keys {sorted(map(str, found))}"
    size = f" of length {len(found)}" if isinstance(found, (tuple, list)) else ""
    return f"a {type(found).__name__}{size}"
