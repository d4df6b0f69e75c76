"""Checkpoints of a run: when one is due, and how it gets from the loop to the disk."""

from __future__ import annotations

import re
import threading
import time
import warnings
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.checkpoint import CheckpointFolder, UnsaveableError, pack
from pipeline.device import Backend, Snapshot, Snapshotter
from pipeline.errors import CheckpointError, add_stage_note
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
        self._rehearsed: Callable[[], dict[str, Any]] | None = None
        self._is_written = threading.Event()
        self._is_written.set()

    def resume(self, step: int, best: list[tuple[float, str]]) -> None:
        """Go on counting from a step, and with what was best so far."""
        self.folder.take_best(best)
        if self._every is not None:
            self._every.load_state_dict({"last_step": step, "since_s": 0.0})

    def rehearse(self, capture: Callable[[], dict[str, Any]]) -> None:
        """Try whether everything that a checkpoint will hold can be held; nothing is copied or written.

        It is tried now, before the first step, and again after it, when optimizers have their state.

        Args:
            capture: Returns the state of the run.

        Raises:
            CheckpointError: If something cannot be held; it says what, and what to do.

        Runs on:
            Loop thread; some 5 µs a tensor, twice in a run.
        """
        self._rehearsed = capture
        try:
            _packed(capture(), {})
        except CheckpointError as error:
            self._rehearsed = None
            self._fail(error, 0, "none of this run's checkpoints can be written")
        except Exception:  # a state that begins with the first step: tried again after it, and said then
            return

    def rehearse_data(self, state: Any) -> None:
        """Try the same with the state of the data, once it has given a batch."""
        try:
            _packed({"data": state}, {})
        except CheckpointError as error:
            self._fail(error, 0, "none of this run's checkpoints can be written")

    def _rehearse_again(self, step: int) -> None:
        capture, self._rehearsed = self._rehearsed, None
        assert capture is not None
        try:
            _packed(capture(), {})
        except CheckpointError as error:
            self._fail(error, step, "no checkpoint can be written as things are")
        except Exception as error:
            warnings.warn(
                f"no checkpoint could be made after step {step}: {type(error).__name__}: {error}. "
                "If that is a callback's state_dict, let it return something from the beginning.",
                RuntimeWarning,
                stacklevel=2,
            )

    def is_due(self, step: int) -> bool:
        """Say whether a checkpoint is to be made after this step; the first time, try whether it can be."""
        if self._rehearsed is not None:
            self._rehearse_again(step)
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

    def take(self, step: int, state: dict[str, Any], began_s: float) -> SaveJob | None:
        """Return the snapshot of a state as it is now, ready to be written; None if it cannot be held.

        Args:
            step: Its step.
            state: Live.
            began_s: Since when the loop has waited for it, by `time.perf_counter`.

        Raises:
            CheckpointError: If it cannot be held, unless ``on_checkpoint_error='warn'``.
        """
        tensors: dict[str, torch.Tensor] = {}
        try:
            structure = _packed(state, tensors)
        except CheckpointError as error:
            self._fail(error, step, f"the checkpoint of step {step} could not be written")
            return None
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
        except (OSError, CheckpointError) as error:
            self._fail(error, job.step, f"the checkpoint of step {job.step} could not be written")
            num_bytes = 0
        finally:
            self._is_written.set()
        write_s = time.perf_counter() - began_s
        self.reports.append(SaveReport(job.step, job.stall_s, write_s, num_bytes))

    def name_best(self, job: BestJob) -> None:
        """Give the checkpoint of a step its second name."""
        if not job.is_best:
            return
        try:
            self.folder.keep_as_best(job.step)
        except OSError as error:  # the file, which could not be written, may not be there
            self._fail(error, job.step, f"the best checkpoint, of step {job.step}, could not be kept")

    def _fail(self, error: Exception, step: int, what: str) -> None:
        """Raise what went wrong, or warn of it and go on, as the user wants it."""
        add_stage_note(error, "checkpoint", step=step)
        if self._raises:
            raise error
        warnings.warn(
            f"{what}: {str(error).rstrip('.')}. The older ones are kept, and training goes on without it.",
            RuntimeWarning,
            stacklevel=3,
        )


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


_SPOKEN = (
    (re.compile(r"callbacks\.callbacks\.(\d+)\.state\b\.?"), r"callbacks[\1]"),
    (re.compile(r"data\.state\b\.?"), "train_data"),
    (re.compile(r"(model|optimizer|scheduler)\b\.?"), r"\1"),
)


def _packed(state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    """Pack a state; what cannot be held is called what its owner knows it as."""
    try:
        return pack(state, tensors)
    except UnsaveableError as error:
        raise UnsaveableError(_spoken(error.path), error.reason) from None


def _spoken(path: str) -> str:
    """Return a place in a checkpoint as an expression: ``callbacks[0].state_dict()['seen']``."""
    for pattern, owner in _SPOKEN:
        if found := pattern.match(path):
            key = f"[{path[found.end() :]!r}]" if found.end() < len(path) else ""
            return f"{found.expand(owner)}.state_dict(){key}"
    return path


def _every(settings: Settings) -> Every | None:
    steps, minutes = settings.checkpoint_every_n_steps, settings.checkpoint_every_n_minutes
    if steps is None and minutes is None:
        return None
    return Every(steps=steps, seconds=None if minutes is None else minutes * 60)


def _as_tensor(losses: array[float]) -> torch.Tensor:
    # A copy: an array that lends its memory cannot grow.
    return torch.frombuffer(losses, dtype=torch.float64).clone() if losses else torch.empty(0).double()
