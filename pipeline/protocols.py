"""The roles that a user's objects can play."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch

from pipeline.batch import Batch, Row

LossFn: TypeAlias = Callable[[Any, Any], torch.Tensor]
"""``loss_fn(outputs, target)`` returns a scalar tensor."""

Step: TypeAlias = Callable[[torch.nn.Module, Batch], Any]
"""``step(model, batch)`` returns the loss, or a dict with ``loss`` and further scalars to log."""

MetricFn: TypeAlias = Callable[..., torch.Tensor]
"""Per-sample values ``[B]``, or one value for the batch, of ``(outputs, target)``."""


@runtime_checkable
class StatefulMetric(Protocol):
    """A metric that keeps its own state, as those of torchmetrics do."""

    def update(self, *args: Any) -> None: ...
    def compute(self) -> Any: ...
    def reset(self) -> None: ...


Metrics: TypeAlias = Mapping[str, "MetricFn | StatefulMetric"]


class Scheduler(Protocol):
    """A learning-rate scheduler of torch, or anything shaped like one."""

    optimizer: torch.optim.Optimizer

    def step(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class RunInfo:
    """What a logger may want to know of a run before its first row.

    Args:
        run_dir: The folder with the run's files, or None if nothing is written.
        hparams: What describes the run: `fit`'s ``hparams``, and the Trainer's settings under ``trainer``.
        resumed_step: Steps finished when the run was taken up again; None for a new run. Rows of later
            steps, which a logger may have from before, come again.
    """

    run_dir: Path | None
    hparams: dict[str, Any]
    resumed_step: int | None = None

    def flat_hparams(self) -> dict[str, bool | int | float | str]:
        """Return them under names with dots, such as ``trainer.max_epochs``; what is no scalar as text."""
        return _flat(self.hparams, "")


class Logger(Protocol):
    """Writes rows somewhere.

    Further methods are called where a logger has them: ``open(info)`` with a `RunInfo`, before anything
    else; ``log_media(media)`` with each `Media`; ``mark_failed()`` before `close`, if an exception ends
    the run.

    Runs on:
        The writer thread in ``overlap``, the loop thread in ``textbook``; never two at once.
    """

    def log(self, row: Row) -> None:
        """Write one row; rows come in order."""

    def flush(self) -> None:
        """Make what was written so far readable by others."""

    def close(self) -> None:
        """Flush and release what is held; called once, also after an error."""


@dataclass(frozen=True)
class Datasets:
    """What a data builder of a recipe returns.

    Args:
        train: Anything `Trainer.fit` takes as training data.
        val: The same for validation, or None.
        input_shape: The shape of one sample's input, without the batch: ``(C, H, W)`` for images.
        num_classes: The number of classes.
    """

    train: Any
    val: Any
    input_shape: tuple[int, ...]
    num_classes: int


def _flat(hparams: Mapping[str, Any], prefix: str) -> dict[str, bool | int | float | str]:
    found: dict[str, bool | int | float | str] = {}
    for name, value in hparams.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return found
