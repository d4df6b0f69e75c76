"""The records that travel along the flow."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import torch

Batch: TypeAlias = Any
"""What one step takes: a tensor, an object that can move itself, or a container of batches (see `tree`)."""

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
