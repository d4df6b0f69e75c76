"""Checkpoints of a run: when one is due, and how it gets from the loop to the disk."""

from __future__ import annotations

import threading
import time
import warnings
from array import array
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.checkpoint import CheckpointFolder, pack
from pipeline.device import Backend, Snapshot, Snapshotter
from pipeline.errors import add_stage_note
from pipeline.every import Every
from pipeline.loggers import JsonlLogger
from pipeline.report import SaveReport
from pipeline.settings import Settings


class Saver:
    """Takes snapshots and writes them.

    Args:
        settings: When a checkpoint is due, and what happens if it cannot be written.
        folder: Where they go.
        backend: The device.
        rows: ``metrics.jsonl``, brought to the disk before each checkpoint.
        is_off_loop: Whether it is written on another thread than the loop's: then the state is copied.

    Attributes:
        is_asked: Whether somebody wants one now: it is made after the next batch.
        reports: What each one cost.
    """

    def __init__(
        self,
        settings: Settings,
        folder: CheckpointFolder,
        backend: Backend,
        rows: JsonlLogger,
        is_off_loop: bool,
    ) -> None:
        self.folder, self.rows = folder, rows
        self.is_asked = False
        self.reports: list[SaveReport] = []
        self._raises = settings.on_checkpoint_error == "stop"
        self._snapshotter = Snapshotter(backend) if is_off_loop else None
        self._every = _every(settings)
        self._best_step = -1
        self._saved: tuple[Any, ...] = ()
        self._is_written = threading.Event()
        self._is_written.set()

    def resume(self, step: int, best: list[tuple[float, str]]) -> None:
        """Go on counting from a step, and with what was best so far."""
        self.folder.take_best(best)
        if self._every is not None:
            self._every.load_state_dict({"last_step": step, "since_s": 0.0})

    def is_due(self, step: int) -> bool:
        """Say whether a checkpoint is to be made after this step."""
        is_time = self._every is not None and self._every.is_due(step)
        return is_time or self.is_asked or self._best_step == step

    def offer(self, step: int, monitored: float) -> None:
        """Note a step's validation; its checkpoint is kept if it is among the best."""
        if self.folder.offer(step, monitored):
            self._best_step = step

    def is_new(self, place: tuple[Any, ...]) -> bool:
        """Say whether this place of the run has no checkpoint yet, and note that it gets one."""
        is_new, self._saved, self.is_asked = place != self._saved, place, False
        return is_new

    @property
    def is_writing(self) -> bool:
        """Whether the last snapshot is not on the disk yet: its memory is in use."""
        return not self._is_written.is_set()

    def take(self, step: int, state: dict[str, Any], began_s: float) -> SaveJob:
        """Return the snapshot of a state as it is now, ready to be written.

        Args:
            step: Its step.
            state: Live.
            began_s: Since when the loop has waited for it, by `time.perf_counter`.
        """
        tensors: dict[str, torch.Tensor] = {}
        structure = pack(state, tensors)
        snapshot = Snapshot(tensors, None) if self._snapshotter is None else self._snapshotter.copy(tensors)
        self._is_written.clear()
        return SaveJob(
            self, step, structure, snapshot, self._best_step == step, time.perf_counter() - began_s
        )

    def take_name(self, step: int) -> BestJob:
        """Return what gives the step's checkpoint its second name, if it is among the best."""
        return BestJob(self, step, self._best_step == step)

    def write(self, job: SaveJob, losses: array[float], last_values: dict[str, float]) -> None:
        """Write a snapshot; where the loggers run, behind every row that came before it."""
        began_s = time.perf_counter()
        try:
            num_rows_bytes = self.rows.sync()
            tensors = dict(job.snapshot.resolve())
            journal = {"losses": _as_tensor(losses), "last_values": last_values, "num_bytes": num_rows_bytes}
            job.structure["journal"] = pack(journal, tensors, "journal")
            num_bytes = self.folder.save(job.step, tensors, job.structure)
            if job.is_best:
                self.folder.keep_as_best(job.step)
        except OSError as error:
            add_stage_note(error, "checkpoint", step=job.step)
            if self._raises:
                raise
            warnings.warn(
                f"the checkpoint of step {job.step} could not be written: {error}. The older ones are kept, "
                "and training goes on without it.",
                RuntimeWarning,
                stacklevel=2,
            )
            num_bytes = 0
        finally:
            self._is_written.set()
        write_s = time.perf_counter() - began_s
        self.reports.append(SaveReport(job.step, job.stall_s, write_s, num_bytes))

    def name_best(self, job: BestJob) -> None:
        """Give the checkpoint of a step its second name."""
        if job.is_best:
            self.folder.keep_as_best(job.step)


@dataclass(frozen=True, slots=True)
class SaveJob:
    """A snapshot on its way to the disk."""

    saver: Saver
    step: int
    structure: Any
    snapshot: Snapshot
    is_best: bool
    stall_s: float


@dataclass(frozen=True, slots=True)
class BestJob:
    """A checkpoint that was written before its validation."""

    saver: Saver
    step: int
    is_best: bool


def _every(settings: Settings) -> Every | None:
    steps, minutes = settings.checkpoint_every_n_steps, settings.checkpoint_every_n_minutes
    if steps is None and minutes is None:
        return None
    return Every(steps=steps, seconds=None if minutes is None else minutes * 60)


def _as_tensor(losses: array[float]) -> torch.Tensor:
    # A copy: an array that lends its memory cannot grow.
    return torch.frombuffer(losses, dtype=torch.float64).clone() if losses else torch.empty(0).double()
