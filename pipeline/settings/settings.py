"""Every setting of a Trainer, its default, and what it may be."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import numbers
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import torch

from pipeline.device import Backend
from pipeline.errors import ConfigError
from pipeline.settings.hints import describe, fits, meant, suggested
from pipeline.settings.ranges import range_problems

Schedule = Literal["auto", "overlap", "textbook"]
PlaceName = Literal["textbook", "inline", "thread", "process"]
Placement = Literal["auto", "inline", "thread", "process"]
GilMode = Literal["account", "signals", "off"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]

AUTO_RUN_DIR = "auto"
NO_ARGUMENTS: Mapping[str, str] = {}
AUTOCAST_DTYPE: dict[Precision, torch.dtype | None] = {
    "32-true": None,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}


Kind = TypeVar("Kind")


def _refusing_unknown(kind: type[Kind]) -> type[Kind]:
    """Have a class of settings refuse an unknown one as it refuses a wrong value; its signature stays."""
    open_kind: Any = kind
    assign = open_kind.__init__

    @functools.wraps(assign)
    def refuse_or_assign(self: Any, *values: Any, **settings: Any) -> None:
        if not settings.keys() <= set(setting_names()):
            raise ConfigError(type_problems(settings, arguments=_arguments_of(type(self))))
        assign(self, *values, **settings)

    open_kind.__init__ = refuse_or_assign
    return kind


@_refusing_unknown
@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train. Names are Lightning's where it has one.

    Args:
        max_epochs: Stop after so many epochs; 1 if `max_steps` is not given either. Give one of them.
        max_steps: Stop after so many optimizer steps.
        accumulate_grad_batches: Batches whose gradients are averaged into one optimizer step. A
            smaller last group of an epoch is divided by the same number.
        gradient_clip_val: Clip gradients to this; None does not clip.
        gradient_clip_algorithm: ``norm`` of all gradients together, or each ``value``.
        precision: ``32-true``, or autocast to ``bf16-mixed`` or ``16-mixed`` (with a GradScaler).
        log_every_n_steps: Give the loggers a row every so many steps. Every step's loss is in
            `FitResult.losses` regardless.
        log_grad_norm: Log ``train/grad_norm`` at each step, as clipping by norm does anyway.
        peak_tflops: What the device does at best in this precision, in TFLOP/s: with it, rows have
            ``rate/mfu_ratio``, from the FLOPs of the first micro-batch, forward and backward.
        max_log_lag: Steps that the loggers may be behind the loop in ``overlap``. The numbers of a
            step are with them some 50 ms after it, if they keep up.
        log_overflow: What happens beyond `max_log_lag`: the loop has to ``wait``; or loggers are not told of
            the oldest steps (``drop``), which are counted; or memory may ``grow``. A slow logger holds up
            the loop in the first case alone; none of them loses a loss of `FitResult.losses`.
        detect_host_reads: Find the lines that make the loop wait for the device, such as an
            ``.item()`` in a step, and name them in `FitResult.outbound`. Free on CUDA; elsewhere each
            operation takes some 10 µs longer, so it is for looking.
        measure_gain: Measure what overlap wins: short windows of both schedules take turns in the run, with
            the same numbers, until `FitResult.report` can say how many times as fast as the textbook loop
            it is, with an interval. Some hundred steps; the rest of the run is in the faster of the two.
        gc: What Python's garbage collector may do: ``default`` leaves it alone; ``freeze`` takes what
            lives after some steps out of its walks; ``every_n_steps`` also turns it off between steps of
            your choice, and collects at the end of an epoch, with a guard that turns it on again if
            much garbage gathers. Everything is put back after the run.
        gc_every_n_steps: Steps between two collections with ``gc=every_n_steps``.
        check_val_every_n_epoch: Validate every so many epochs; None leaves it to `val_check_interval`.
        val_check_interval: Validate every so many optimizer steps as well.
        limit_train_batches: Use at most this many batches an epoch, or this share (a float).
        limit_val_batches: Use at most this many batches a validation, or this share (a float).
        fast_dev_run: One step, one validation batch, no files: does it run at all?
        monitor: The metric that decides which checkpoint is best, and what a ReduceLROnPlateau sees.
        monitor_mode: Whether its ``min`` or its ``max`` is best.
        enable_progress_bar: Show a bar on a terminal, a line for each validation elsewhere.
        enable_checkpointing: Write checkpoints to the run folder: at the end of each epoch, when the run is
            stopped, and of the best validation.
        checkpoint_every_n_steps: Write a checkpoint every so many optimizer steps as well.
        checkpoint_every_n_minutes: Write one whenever so many minutes have passed as well.
        keep_last: How many of the newest checkpoints are kept; the one before the newest is there in case
            that cannot be read.
        keep_best: How many of the best checkpoints by `monitor` are kept besides.
        on_checkpoint_error: What happens if a checkpoint cannot be written, the disk being full, or something
            in it of a kind that no file holds: ``stop`` with the error, or ``warn`` and go on. The older
            ones stay.
        resume: Go on where another run was stopped. ``auto`` takes the newest checkpoint in `run_dir` that
            can be used, and begins a run if there is none yet; or the path of a checkpoint.
        max_time: Save and stop after so much time in `fit`: seconds, or ``[DD:]HH:MM:SS``.
        ema_decay: Keep an average of the weights with this decay (0 to 1), and validate with it.
        compile: Compile the model: True, or the keywords of `torch.compile`.
        channels_last: Keep model and images in channels-last memory format.
        deterministic: Use torch's deterministic algorithms for the length of the run.
        on_nonfinite: ``stop`` with a NonFiniteError when a step is not finite; ``skip`` its update and go
            on, which ``train/skipped`` says in its row; or ``ignore`` it. Looked at are the loss, the
            gradients, the buffers, and what an update makes where that may overflow. Weights, optimizer
            and buffers stay clean, and ``nonfinite.jsonl`` in the run folder has the samples.
        schedule: ``textbook`` fetches, steps, reads the loss and logs, one after the other on one
            thread; the loggers are told every 50 ms or so. ``overlap`` fetches ahead on a prefetch
            thread and reads and logs behind on a writer thread. Losses and weights are the same.
            ``auto`` reads and logs behind the loop on a device that runs ahead of the host, at each
            step on one that does not, and leaves where batches are made to `placement`.
        placement: Where batches are made: ``inline``, on the prefetch thread; ``thread``, on several, which
            is for work that releases the GIL; ``process``, in worker processes, for work that holds it.
            ``auto`` tries on the run which is fastest, the loop thread included (with ``schedule=overlap``
            it is ``inline``). The batches are the same.
        num_workers: Threads or processes, where `placement` is named; 0 is as many as there are cores.
        check_data: Look at the data and compare batches before they are made ahead, and go on doing so; see
            docs/checks.md. If False, they are made wherever that is fastest, or where `placement` says.
        threads_per_worker: Threads of each worker process, with ``placement=process``: for work that both
            waits, such as for storage, and holds the GIL. The dataset must bear several threads then.
        prefetch_depth: Batches that may wait for the loop.
        max_steps_in_flight: Steps that may be queued on the device before the loop waits.
        stall_timeout_s: Seconds that the loop waits for one batch, or for a logger, before it is taken to
            hang: a StallError names the stage and the sample and shows the stack. ``textbook``, which
            has no thread to wait with, shows the stack and waits on. None waits for ever.
        gil: ``signals`` counts how often the GIL changes hands and warns, once, if the loop loses much
            of its steps to another thread (the convoy); it looks closer for a second if it must.
            ``account`` measures for the whole run who holds the GIL and who waits for it, by thread
            and stage: `FitResult.gil`, and ``gil.json`` and ``gil_trace.json`` in the run folder.
            ``off`` does neither.
        seed: Decides the order of the samples and the random numbers of each. None takes what torch was
            seeded with (`torch.initial_seed`) when `fit` begins, so that ``torch.manual_seed(n)`` decides
            them as it does the model's own (initial weights, dropout); rank zero's on all ranks, the
            checkpoint's in a run that is resumed. `FitResult.seed` says which it was. Two fits without a new
            seed in between see the same order.
        device: ``auto``, or a torch device.
        run_dir: Where files go: ``auto`` is ``runs/<time>``, None writes nothing.

    Raises:
        ConfigError: Naming every wrong setting at once, and what was probably meant by an unknown one.
    """

    max_epochs: int | None = None
    max_steps: int | None = None
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: Literal["norm", "value"] = "norm"
    precision: Precision = "32-true"
    log_every_n_steps: int = 1
    log_grad_norm: bool = False
    peak_tflops: float | None = None
    max_log_lag: int = 2048
    log_overflow: Literal["wait", "drop", "grow"] = "wait"
    detect_host_reads: bool = False
    measure_gain: bool = False
    gc: Literal["default", "freeze", "every_n_steps"] = "default"
    gc_every_n_steps: int = 50
    check_val_every_n_epoch: int | None = 1
    val_check_interval: int | None = None
    limit_train_batches: int | float | None = None
    limit_val_batches: int | float | None = None
    fast_dev_run: bool = False
    monitor: str = "val/loss"
    monitor_mode: Literal["min", "max"] = "min"
    enable_progress_bar: bool = True
    enable_checkpointing: bool = True
    checkpoint_every_n_steps: int | None = None
    checkpoint_every_n_minutes: float | None = None
    keep_last: int = 2
    keep_best: int = 1
    on_checkpoint_error: Literal["stop", "warn"] = "stop"
    resume: str | Path | None = None
    max_time: str | float | None = None
    ema_decay: float | None = None
    compile: bool | Mapping[str, Any] = False
    channels_last: bool = False
    deterministic: bool = False
    on_nonfinite: Literal["stop", "skip", "ignore"] = "stop"
    schedule: Schedule = "auto"
    placement: Placement = "auto"
    num_workers: int = 0
    threads_per_worker: int = 1
    check_data: bool = True
    prefetch_depth: int = 8
    max_steps_in_flight: int = 4
    stall_timeout_s: float | None = 600.0
    gil: GilMode = "signals"
    seed: int | None = None
    device: str | torch.device | Backend = "auto"
    run_dir: str | Path | None = AUTO_RUN_DIR

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(Settings)
        right = {name: value for name, value in vars(self).items() if fits(value, hints[name])}
        problems = [*type_problems(vars(self)), *range_problems(right)]
        if problems:
            raise ConfigError(problems)
        for name, value in right.items():
            if isinstance(value, numbers.Number) and hasattr(value, "item"):  # one of NumPy's
                object.__setattr__(self, name, value.item())
        if self.fast_dev_run:
            for name, value in _DEV_RUN.items():
                object.__setattr__(self, name, value)

    def with_seed(self, seed: int) -> Self:
        """Return the same settings with the seed that is used."""
        found = copy.copy(self)
        object.__setattr__(found, "seed", seed)
        return found

    @property
    def epoch_limit(self) -> int | None:
        """Epochs after which to stop; None where `max_steps` decides."""
        return 1 if self.max_epochs is None and self.max_steps is None else self.max_epochs


_DEV_RUN: dict[str, Any] = {
    "max_epochs": None,
    "max_steps": 1,
    "limit_val_batches": 1,
    "check_val_every_n_epoch": 1,
    "enable_checkpointing": False,
    "run_dir": None,
}


def type_problems(
    values: Mapping[str, Any], prefix: str = "", arguments: Mapping[str, str] = NO_ARGUMENTS
) -> list[str]:
    """Say which keys are no settings and which values have a wrong type.

    Args:
        values: Settings by name.
        prefix: Put before each name, so that the message has the key that a user types.
        arguments: What is no setting, but an argument of a method: the method by name.
    """
    hints = typing.get_type_hints(Settings)
    problems = []
    for name, value in values.items():
        if name not in hints:
            problems.append(f"{prefix}{name} is not a setting. {suggested(name, hints, arguments)}")
        elif not fits(value, hints[name]):
            wanted = describe(hints[name])
            problems.append(f"{prefix}{name} must be {wanted}, got {value!r}.{meant(value, hints[name])}")
    return problems


def setting_names() -> list[str]:
    """Return the names of all settings."""
    return [field.name for field in dataclasses.fields(Settings)]


def _arguments_of(kind: type) -> dict[str, str]:
    """Return the arguments of the methods of a class, with its name; `fit` comes first."""
    methods = [name for name in ("predict", "evaluate", "fit") if hasattr(kind, name)]
    return {
        argument: method
        for method in methods
        for argument in inspect.signature(getattr(kind, method)).parameters
        if argument != "self"
    }
