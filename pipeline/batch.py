"""The records that travel along the flow, and how to reach the tensors inside a user's batch."""

from __future__ import annotations

import dataclasses
import sys
from abc import ABC
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from lightning_utilities.core.apply_func import apply_to_collection

Batch: TypeAlias = Any
"""What one step takes: a tensor, or a tuple, list, dict or dataclass of batches."""

Scalars: TypeAlias = dict[str, torch.Tensor | float]
"""The numbers of one step: 0-dimensional tensors still on their device, or floats of the host."""


MediaKind: TypeAlias = Literal["image", "histogram", "text"]


class Row(NamedTuple):
    """What the loggers are told about one moment of a run.

    Args:
        step: Optimizer steps finished.
        epoch: The epoch it belongs to, counted from 0.
        values: Name to number, such as ``train/loss``; times carry their unit in the name.
    """

    step: int
    epoch: int
    values: dict[str, float]


class Media(NamedTuple):
    """An image, a histogram or a text for the loggers that keep such things.

    Args:
        step: Optimizer steps finished.
        epoch: The epoch it belongs to, counted from 0.
        name: Such as ``val/samples``.
        kind: What it is.
        data: For an ``image`` a tensor ``[C, H, W]``, uint8 or float from 0 to 1; for a ``histogram``
            the tensor of its values; for a ``text`` a string. On the host, and nobody else's.
    """

    step: int
    epoch: int
    name: str
    kind: MediaKind
    data: torch.Tensor | str


class Progress(NamedTuple):
    """How far something is that makes no rows while it runs, such as a validation.

    Args:
        stage: What it is.
        done: Batches done.
        total: Batches to do, or None where nobody knows.
        is_last: Whether it is over.
    """

    stage: str
    done: int
    total: int | None
    is_last: bool


class _FrozenDataclass(ABC):  # noqa: B024  (it is made for isinstance alone)
    """Every frozen dataclass, for ``isinstance``; `apply_to_collection` can only mutate the others."""

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        parameters = getattr(other, "__dataclass_params__", None)
        return parameters is not None and bool(parameters.frozen)


def map_tensors(batch: Batch, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    """Return the batch with `function` applied to every tensor in it, at any depth.

    Tuples, named tuples, lists, mappings and dataclasses (frozen ones too) keep their types;
    whatever else is in a batch (strings, None, numbers) is passed on as it is.
    """

    def visit(found: Any) -> Any:
        if isinstance(found, torch.Tensor):
            return function(found)
        fields = (field.name for field in dataclasses.fields(found) if field.init)
        return dataclasses.replace(
            found, **{name: map_tensors(getattr(found, name), function) for name in fields}
        )

    return apply_to_collection(batch, (torch.Tensor, _FrozenDataclass), visit)


def copy_memory(batch: Batch) -> Batch:
    """Return the batch with tensors and arrays in memory of their own."""
    copied = map_tensors(batch, torch.clone)
    numpy = sys.modules.get("numpy")
    return copied if numpy is None else apply_to_collection(copied, numpy.ndarray, numpy.copy)


def num_samples(batch: Batch) -> int:
    """Return the length of the first tensor's first dimension: the samples in the batch.

    A batch without a tensor, or whose first one is 0-dimensional, counts as one sample.
    """
    # The most common batch first: this runs at every step.
    is_pair = isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], torch.Tensor)
    first = batch[0] if is_pair else _first_tensor(batch)
    return first.size(0) if first is not None and first.ndim else 1


def _first_tensor(batch: Batch) -> torch.Tensor | None:
    if isinstance(batch, torch.Tensor):
        return batch
    if isinstance(batch, Mapping):
        parts = list(batch.values())
    elif isinstance(batch, (list, tuple)):
        parts = list(batch)
    elif dataclasses.is_dataclass(batch):
        parts = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    else:
        return None
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)
