"""Checkpoints: written whole or not at all, and read without running code from the file."""

from __future__ import annotations

import math
import os
import pickle
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import CheckpointError
from pipeline.state import TrainState

FORMAT = 1


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that `path` holds either the old one or the new one, never half of it.

    Args:
        path: Where it goes; its folder exists.
        state: Tensors and plain containers.

    Runs on:
        Loop thread, for as long as serialising and an fsync take.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def load_checkpoint(path: str | Path, *, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint that `save_checkpoint` wrote.

    Raises:
        CheckpointError: If there is none, or it is damaged or something else.
    """
    try:
        found = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint at {path}.") from error
    except (RuntimeError, EOFError, ValueError, OSError, pickle.UnpicklingError) as error:
        reason = re.sub(r"\x1b\[\d*m", "", str(error)).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this library (format {FORMAT}).")
    return found


def load_model(path: str | Path, model: torch.nn.Module) -> None:
    """Load a checkpoint's weights into a model: the average where one was kept.

    Raises:
        CheckpointError: If the file is no checkpoint, or belongs to another model.
    """
    found = load_checkpoint(path)
    try:
        model.load_state_dict(found.get("ema", found["model"]))
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path} belongs to another model: {error}") from error


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return  # elsewhere a folder cannot be opened, and a rename is durable by itself
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class CheckpointFolder:
    """Keeps ``last.pt`` and ``best.pt`` of one run.

    Args:
        folder: Where they go; made if it is not there.
        mode: Whether the monitored metric's ``min`` or its ``max`` is best.

    Runs on:
        Loop thread, between two steps.
    """

    def __init__(self, folder: Path, mode: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._sign = 1.0 if mode == "min" else -1.0
        self._best = math.inf
        self.last: Path | None = None
        self.best: Path | None = None

    def save_last(self, state: TrainState) -> None:
        """Write ``last.pt``."""
        self.last = self._folder / "last.pt"
        save_checkpoint(self.last, state.state_dict())

    def save_if_best(self, state: TrainState, monitored: float) -> None:
        """Write ``best.pt`` if the monitored metric is better than it ever was."""
        value = self._sign * monitored
        if value < self._best:
            self._best = value
            self.best = self._folder / "best.pt"
            save_checkpoint(self.best, {**state.state_dict(), "monitored": monitored})
