"""What a `fit` gives back."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from pipeline.batch import Row
from pipeline.gil import GilReport, StageTime
from pipeline.report import OutboundReport, SaveReport
from pipeline.report.placement_report import PlacementReport
from pipeline.report.record import RunReport


@dataclass(frozen=True)
class FitResult:
    """What a `fit` gave.

    Args:
        metrics: The last value of each metric: ``train/loss``, ``train/epoch_loss``, ``val/…``.
        history: One row for each epoch and each validation, in order.
        losses: The training loss of every optimizer step, in order.
        num_steps: Optimizer steps made.
        num_epochs: Epochs begun.
        schedule: The schedule that ran: ``overlap`` or ``textbook``.
        seed: What decided the order of the samples and the random numbers of each: the Trainer's ``seed=``,
            or what torch was seeded with, by you or by itself.
        samples_per_s: Training samples per second; validation and checkpoints not counted.
        train_s: Seconds spent training, without validation and checkpoints.
        stop_reason: ``max_epochs``, ``max_steps``, ``early_stopping``, or what a callback said; of a run
            that can be resumed ``max_time``, ``SIGTERM`` or ``SIGINT``.
        run_dir: The folder with the run's files, or None if nothing was written.
        last_checkpoint: The newest checkpoint, if one was written.
        best_checkpoint: The checkpoint with the best `monitor`, if one was written.
        stage_times: Wall and thread time of the loop thread's stages.
        handoffs_per_step: How often the GIL went to another thread; None where it cannot be read.
        gil: The GIL account, with ``gil='account'``.
        ema_model: The averaged model, if one was kept.
        resumed_from: The checkpoint that the run went on from; None for a new run.
        saves: What each checkpoint cost.
        outbound: What logging cost, how far it was behind, and which lines made the loop wait.
        placement: Where batches were made, and why.
        report: Where the time went, which ceiling binds, and what to change next; ``print`` shows it.
    """

    metrics: dict[str, float]
    history: list[Row] = field(repr=False)
    losses: array[float] = field(repr=False)
    num_steps: int
    num_epochs: int
    schedule: Literal["overlap", "textbook"]
    seed: int
    samples_per_s: float
    train_s: float
    stop_reason: str
    run_dir: Path | None
    last_checkpoint: Path | None
    best_checkpoint: Path | None
    stage_times: list[StageTime] = field(repr=False)
    handoffs_per_step: float | None
    gil: GilReport | None = field(repr=False)
    ema_model: torch.nn.Module | None = field(repr=False)
    resumed_from: Path | None
    saves: tuple[SaveReport, ...] = field(repr=False)
    outbound: OutboundReport = field(repr=False)
    placement: PlacementReport = field(repr=False)
    report: RunReport = field(repr=False)
