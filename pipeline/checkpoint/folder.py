"""The checkpoints of one run: their names, which are kept, and which is the newest that can be used."""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint.file import SUFFIX, read_file, sync_folder, write_file
from pipeline.errors import CheckpointError


class CheckpointFolder:
    """Keeps ``step-00000120.safetensors`` and ``best-00000100.safetensors`` of one run.

    Args:
        folder: Where they go; made if it is not there. Halves that a killed run left are removed.
        mode: Whether the monitored metric's ``min`` or its ``max`` is best.
        keep_last: How many of the newest are kept.
        keep_best: How many of the best are kept, apart from those.

    Attributes:
        last: The newest one written or resumed from.
        best: The values of the best and their names, the best first.

    Runs on:
        `save` and `keep_as_best` where the loggers run; everything else on the loop thread.
    """

    def __init__(self, folder: Path, mode: str, keep_last: int = 2, keep_best: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._sign = folder, 1.0 if mode == "min" else -1.0
        self._keep_last, self._keep_best = keep_last, keep_best
        self.last: Path | None = None
        self.best: list[tuple[float, str]] = []
        for half in folder.glob(f".*{SUFFIX}.*.tmp"):
            half.unlink()

    @property
    def best_path(self) -> Path | None:
        """The best one's file."""
        return self._folder / self.best[0][1] if self.best else None

    def offer(self, step: int, monitored: float) -> bool:
        """Say whether a step is among the best, and note it if it is; NaN never is."""
        if math.isnan(monitored) or not self._keep_best:
            return False
        name = _name("best", step)
        others = [each for each in self.best if each[1] != name]
        ranked = sorted([*others, (monitored, name)], key=lambda each: self._sign * each[0])
        self.best = ranked[: self._keep_best]  # of equals the older one stays: the sort is stable
        return any(each[1] == name for each in self.best)

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], structure: Any) -> int:
        """Write a checkpoint, and remove those that are not kept any more; return its size in bytes.

        Raises:
            OSError: If it cannot be written; the older ones are all there then.
        """
        path = self._folder / _name("step", step)
        num_bytes = write_file(path, tensors, structure)
        self.last = path
        for old in self._steps()[self._keep_last :]:
            old.unlink(missing_ok=True)
        return num_bytes

    def keep_as_best(self, step: int) -> None:
        """Give the step's checkpoint a second name that stays while it is among the best."""
        source, path = self._folder / _name("step", step), self._folder / _name("best", step)
        temporary = self._folder / f".{path.name}.link.tmp"
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:  # a file system without second names
            shutil.copyfile(source, temporary)
        os.replace(temporary, path)
        sync_folder(self._folder)
        self.drop_old_best()

    def take_best(self, best: Sequence[tuple[float, str]]) -> None:
        """Take over what a checkpoint knows of the best; a second name that is missing is given again."""
        self.best = [(value, name) for value, name in best]
        for _, name in self.best:
            step = _step_of(Path(name))
            if not (self._folder / name).exists() and (self._folder / _name("step", step)).exists():
                self.keep_as_best(step)
        self.best = [each for each in self.best if (self._folder / each[1]).exists()]
        self.drop_old_best()

    def drop_old_best(self) -> None:
        """Remove what is not among the best any more."""
        kept = {name for _, name in self.best}
        for path in self._folder.glob(f"best-*{SUFFIX}"):
            if path.name not in kept:
                path.unlink(missing_ok=True)

    def newest(self) -> tuple[Path, Any] | None:
        """Return the newest checkpoint that can be used, and what it holds; None if there is no file.

        One that cannot be used is named in a warning, with the reason, and put aside.

        Raises:
            CheckpointError: If there are some, and none can be used.
        """
        reasons = []
        for path in self._steps():
            try:
                found = path, read_file(path)
            except CheckpointError as error:
                reasons.append(str(error))
                continue
            for reason in reasons:
                warnings.warn(f"{reason} The one before it is used: {path}.", stacklevel=2)
            self.put_aside_behind(_step_of(path), "unusable")
            self.last = path
            return found
        if reasons:
            raise CheckpointError(
                "no checkpoint can be used:\n" + "\n".join(reasons) + "\nTo begin from the first step, name "
                "another run_dir, or remove the folder."
            )
        return None

    def put_aside_behind(self, step: int, why: str) -> None:
        """Rename the checkpoints of later steps, so that nobody takes them for the newest."""
        for path in self._steps():
            if _step_of(path) > step:
                path.rename(path.with_name(f"{path.name}.{why}"))

    def _steps(self) -> list[Path]:
        """Return the files of steps, the newest first."""
        return sorted(self._folder.glob(f"step-*{SUFFIX}"), key=_step_of, reverse=True)


def _name(kind: str, step: int) -> str:
    return f"{kind}-{step:08d}{SUFFIX}"


def _step_of(path: Path) -> int:
    number = path.name.removesuffix(SUFFIX).partition("-")[2]
    return int(number) if number.isdigit() else -1
