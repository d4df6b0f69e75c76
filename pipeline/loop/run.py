"""One `fit` under way: its parts, and how far it is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline.batch import Batch, Media, MediaKind, Progress, Row
from pipeline.callbacks.callback_list import CallbackList
from pipeline.callbacks.events import Event, StepRead
from pipeline.device import ReadDetector, StepLimiter
from pipeline.inbound.belt import Inbound
from pipeline.outbound.belt import Outbound
from pipeline.outbound.journal import Journal
from pipeline.outbound.rates import StepDone
from pipeline.outbound.saver import Saver
from pipeline.randomness.seeds import Moving
from pipeline.ranks import agreed_to_stop
from pipeline.settings import Settings
from pipeline.state import TrainState
from pipeline.step.step import TrainStep
from pipeline.watch.clock import StepClock
from pipeline.watch.garbage_collector import Collector
from pipeline.watch.gil_watch import GilWatch

STOPPING_SIGNALS = ("SIGINT", "SIGTERM")
_REASONS = ("", "max_time", *STOPPING_SIGNALS)  # of several, the last one counts for all ranks


@dataclass
class Run:
    """The parts of one `fit`, wired by the Trainer.

    Args:
        inbound: The inbound belt: an epoch's batches on the device, at most so many, from a position.
        validate: Given whom to tell how far it is, returns the validation metrics without their prefix;
            None without validation data.
        count_samples: Returns the samples in a batch.
        count_tokens: Returns the tokens in a batch; None where nobody counts them.
        collector: Decides when garbage is collected; None leaves it to Python.
        detector: Finds the lines that wait for the device; None where nobody asked.
        saver: Writes checkpoints; None where there are to be none.
        run_dir: The folder with the run's files; None if nothing is written.
        data: The inbound belt itself, for the data's own state and the samples of a batch.
        generators: Those that the data keeps for itself.
        checkpoint: What a run that is resumed goes on from; None for a new one.
        ends_at_s: When `max_time` is up, by `time.perf_counter`.
        is_seed_given: Whether it was with ``seed=``; else it is what torch was seeded with.

    Attributes:
        stop_reason: Why the run is over; a run that was interrupted goes on when it is resumed.
        has_ranks: Whether others train the same model.
        asked_by: What asked this rank to stop.
        interrupted_by: The signal, or ``max_time``.
        is_ending: Whether it has one of the two: the loop ends after the step under way.
        worker_death: What torch said of a worker of the user's DataLoader.
        position: Batches of the epoch that were consumed.
        is_epoch_open: Whether an epoch was begun and not finished.
        epoch_first_step: Steps finished when the epoch began.
        epoch_generators: Where the generators stood then.
    """

    settings: Settings
    state: TrainState
    step: TrainStep
    inbound: Callable[[int, int | None, int], Generator[Batch]]
    outbound: Outbound
    journal: Journal
    limiter: StepLimiter | None
    callbacks: CallbackList
    saver: Saver | None
    validate: Callable[[Callable[[Progress], None]], dict[str, float]] | None
    max_batches: int | None
    scheduler_interval: Literal["step", "epoch"]
    clock: StepClock
    gil: GilWatch
    detector: ReadDetector | None
    collector: Collector | None
    count_samples: Callable[[Batch], int]
    count_tokens: Callable[[Batch], int] | None
    history: list[Row] = field(default_factory=list)
    stop_reason: str = ""
    validated_step: int = -1
    num_samples: int = 0
    num_tokens: int = 0
    num_samples_before: int = 0  # the step under way
    num_tokens_before: int = 0
    num_samples_earlier: int = 0  # by the runs that this one goes on from
    run_dir: Path | None = None
    data: Inbound | None = None
    generators: Sequence[Moving] = ()
    checkpoint: dict[str, Any] | None = None
    ends_at_s: float = math.inf
    has_ranks: bool = False
    is_seed_given: bool = False
    asked_by: str = ""
    interrupted_by: str = ""
    is_ending: bool = False
    worker_death: str = ""
    position: int = 0
    is_epoch_open: bool = False
    epoch_first_step: int = 0
    epoch_generators: dict[str, Any] = field(default_factory=dict)

    def stop(self, reason: str) -> None:
        """End the run after the step under way; the first reason counts."""
        self.stop_reason = self.stop_reason or reason
        self.is_ending = True

    def interrupt(self, reason: str) -> None:
        """End the run after the step under way, in the middle of its epoch; it can be resumed there.

        Among several ranks, which must all stop at the same step, it is only asked for; see `agree`.
        """
        self.asked_by = self.asked_by or reason
        if not self.has_ranks:
            self.interrupted_by, self.is_ending = self.asked_by, True

    def agree(self) -> None:
        """Stop if any rank was asked to; each calls this at the same steps, and waits for the others."""
        if found := agreed_to_stop(self.asked_by, _REASONS, self.step.device):
            self.interrupted_by, self.is_ending = found, True

    def tell(self, event: type[Event], *values: Any) -> None:
        """Tell the callbacks of an event."""
        self.callbacks.tell(event(self.state, self.stop, self.log_media, *values))

    def tell_read(self, done: StepDone, values: dict[str, float]) -> None:
        """Tell the callbacks of a step's numbers; the thread of the loggers."""
        self.callbacks.tell_read(StepRead(done.step, done.epoch, values, self.stop))

    def note_nonfinite(self, done: StepDone, loss: float) -> Path | None:
        """Write which batches and samples a step had that was not finite, and return where.

        Runs on:
            The thread of the loggers.
        """
        if self.run_dir is None or self.data is None:
            return None
        each = self.settings.accumulate_grad_batches
        first = (done.step - 1 - self.epoch_first_step) * each
        batches = list(range(first, first + each))
        samples = [self.data.sample_indices(position) for position in batches]
        line = {"step": done.step - 1, "epoch": done.epoch, "loss": str(loss), "batches": batches}
        path = self.run_dir / "nonfinite.jsonl"
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "samples": samples}) + "\n")
        return path

    def log_media(self, kind: MediaKind, name: str, data: torch.Tensor | str) -> None:
        """Send an image, a histogram or a text to the loggers."""
        self.outbound.put_media(Media(self.state.step, self.state.epoch, name, kind, data))
