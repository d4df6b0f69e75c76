"""A run's folder: made, or taken up where a run was stopped."""

from __future__ import annotations

import datetime
import itertools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint import CheckpointFolder, load_checkpoint
from pipeline.errors import CheckpointError, ConfigError
from pipeline.ranks import is_rank_zero
from pipeline.settings import AUTO_RUN_DIR, Settings


@dataclass(frozen=True)
class Opened:
    """Where a run's files go, and what it goes on from.

    Args:
        run_dir: The folder; None if nothing is written.
        folder: The checkpoints; None if there are to be none.
        path: The checkpoint that is resumed; None for a new run.
        checkpoint: What it holds.
    """

    run_dir: Path | None
    folder: CheckpointFolder | None
    path: Path | None = None
    checkpoint: dict[str, Any] | None = None

    @property
    def resumed_step(self) -> int | None:
        """Steps finished at the checkpoint; None for a new run."""
        return None if self.checkpoint is None else int(self.checkpoint["step"])


def open_run_dir(settings: Settings) -> Opened:
    """Make or take up a run's folder.

    Raises:
        ConfigError: If it holds a run, and nobody asked to resume it.
        CheckpointError: If there are checkpoints, and none can be used.
    """
    if settings.resume is None:
        run_dir = make_run_dir(settings.run_dir)
        return Opened(run_dir, _make_folder(settings, run_dir))
    if settings.resume != "auto":
        return _open_with(settings, Path(settings.resume))
    if settings.run_dir is None or settings.run_dir == AUTO_RUN_DIR:
        raise ConfigError(
            f"resume='auto' looks into run_dir, which must be named, got {settings.run_dir!r}. Name it, or "
            "name a checkpoint: resume='runs/…/checkpoints/step-….safetensors'."
        )
    return _open_newest(settings, Path(settings.run_dir))


def make_run_dir(run_dir: str | Path | None) -> Path | None:
    """Make the folder for a run's files: ``runs/<time>`` for ``auto``, none for None.

    Ranks other than zero write nothing.

    Raises:
        ConfigError: If it holds a run already.
    """
    if run_dir is None or not is_rank_zero():
        return None
    if run_dir != AUTO_RUN_DIR:
        if (Path(run_dir) / "metrics.jsonl").exists():
            raise ConfigError(
                f"run_dir must be a new folder, but {run_dir} holds a run already. Name another, leave it "
                "out for runs/<time>, or go on with that run with resume='auto'."
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


def cut_rows(path: Path, num_bytes: int, step: int) -> None:
    """Remove the rows that were written after a checkpoint.

    Args:
        path: ``metrics.jsonl``.
        num_bytes: Its size at the checkpoint, a whole number of lines.
        step: The checkpoint's, which decides if the file was changed meanwhile.
    """
    if not path.exists():
        return
    data = path.read_bytes()
    head = data[:num_bytes]
    if len(head) < num_bytes or (head and not head.endswith(b"\n")):
        raise CheckpointError(
            f"{path} has fewer rows than the checkpoint of step {step} knows of: it was changed. Put it "
            "back, or resume in another run_dir with resume=<the checkpoint>."
        )
    if len(data) > num_bytes:
        with path.open("r+b") as file:
            file.truncate(num_bytes)


def _make_folder(settings: Settings, run_dir: Path | None) -> CheckpointFolder | None:
    if run_dir is None or not settings.enable_checkpointing:
        return None
    return CheckpointFolder(
        run_dir / "checkpoints", settings.monitor_mode, settings.keep_last, settings.keep_best
    )


def _open_with(settings: Settings, path: Path) -> Opened:
    """Go on from a certain checkpoint, in its own run folder or in a new one."""
    found = load_checkpoint(path)
    run_dir = None if settings.run_dir in (None, AUTO_RUN_DIR) else Path(str(settings.run_dir))
    if run_dir is None or run_dir.resolve() != path.resolve().parent.parent:
        run_dir = make_run_dir(settings.run_dir)
    elif not is_rank_zero():
        run_dir = None
    else:
        cut_rows(run_dir / "metrics.jsonl", found["journal"]["num_bytes"], found["step"])
    folder = _make_folder(settings, run_dir)
    if folder is not None:
        folder.put_aside_behind(found["step"], "superseded")  # their rows have just been cut
    return Opened(run_dir, folder, path, found)


def _open_newest(settings: Settings, run_dir: Path) -> Opened:
    folder = CheckpointFolder(
        run_dir / "checkpoints", settings.monitor_mode, settings.keep_last, settings.keep_best
    )
    newest = folder.newest()
    if newest is None:
        rows = run_dir / "metrics.jsonl"
        if rows.exists() and is_rank_zero():
            warnings.warn(
                f"{run_dir} holds a run that was stopped before its first checkpoint: it begins again.",
                stacklevel=4,
            )
            rows.unlink()
        made = make_run_dir(run_dir)
        return Opened(made, _make_folder(settings, made))
    path, found = newest
    if not is_rank_zero():
        return Opened(None, None, path, found)
    cut_rows(run_dir / "metrics.jsonl", found["journal"]["num_bytes"], found["step"])
    return Opened(run_dir, folder if settings.enable_checkpointing else None, path, found)
