"""Checkpoints: written whole or not at all, checked when read, and read without running code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint.file import SUFFIX, read_file, write_file
from pipeline.checkpoint.folder import CheckpointFolder
from pipeline.checkpoint.tree import UnsaveableError, pack, unpack
from pipeline.errors import CheckpointError
from pipeline.state.naming import with_names_of, with_notes

__all__ = [
    "SUFFIX",
    "CheckpointFolder",
    "UnsaveableError",
    "load_checkpoint",
    "load_model",
    "load_weights",
    "pack",
    "save_checkpoint",
    "unpack",
    "write_file",
]


def save_checkpoint(path: Path, state: dict[str, Any]) -> int:
    """Write a state so that `path` holds either the old one or the new one, never half of it.

    Args:
        path: Where it goes; its folder exists.
        state: Tensors of the host and plain containers.

    Returns:
        The file's size in bytes.

    Raises:
        CheckpointError: If something in it cannot be held; named.
        OSError: If it cannot be written.

    Runs on:
        The calling thread, for as long as digests, writing and an fsync take.
    """
    tensors: dict[str, torch.Tensor] = {}
    return write_file(path, tensors, pack(state, tensors))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, on the host.

    Raises:
        CheckpointError: If there is none, or it is damaged or something else.
    """
    found = read_file(path)
    if not isinstance(found, dict) or "model" not in found:
        raise CheckpointError(f"{path} is not a checkpoint of a run: it has no model.")
    return found


def load_weights(path: str | Path) -> dict[str, Any]:
    """Return the state of a checkpoint's model by name: the average where one was kept.

    Raises:
        CheckpointError: If it is no checkpoint.
    """
    found = load_checkpoint(path)
    average = found.get("ema") or {}
    kept = average.get("weights") or {  # older files have torch's names
        name.removeprefix("module."): each for name, each in average.items() if name != "n_averaged"
    }
    weights: dict[str, Any] = kept or found["model"]
    return with_notes({_without_compiler(name): each for name, each in weights.items()}, found.get("modules"))


def load_model(path: str | Path, model: torch.nn.Module) -> None:
    """Load a checkpoint's weights into a model, plain or wrapped: the average where one was kept.

    Raises:
        CheckpointError: If the file is no checkpoint, or belongs to another model.
    """
    weights = with_names_of(model, model.state_dict(), load_weights(path))
    try:
        model.load_state_dict(weights)
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path} belongs to another model: {error}") from error


def _without_compiler(name: str) -> str:
    """Return a name of an older file without what torch.compile put into it: no attribute of a user's."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
