"""The loop itself, `_train_epoch`, and below it what happens between two steps and two epochs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pipeline.batch import Batch, Media, MediaKind, Progress, Row, Scalars, num_samples
from pipeline.checkpoint import CheckpointFolder
from pipeline.device import ReadDetector, StepLimiter
from pipeline.errors import NonFiniteError, StageError, add_stage_note, noting_on
from pipeline.loop.callback import (
    EpochFinished,
    Event,
    FitFailed,
    FitFinished,
    FitStarted,
    StepFinished,
    StepRead,
    Validated,
    monitored,
)
from pipeline.loop.callback_list import CallbackList
from pipeline.loop.clock import CHECKPOINT, DATA_WAIT, LOG, VALIDATE, StepClock
from pipeline.loop.collector import Collector
from pipeline.loop.gil import GilWatch
from pipeline.loop.journal import Journal
from pipeline.loop.outbound import Outbound
from pipeline.loop.rates import StepDone
from pipeline.loop.step import TrainStep
from pipeline.settings import Settings
from pipeline.state import TrainState


@dataclass
class Run:
    """The parts of one `fit`, wired by the Trainer.

    Args:
        inbound: The inbound belt: an epoch's batches on the device, at most so many.
        validate: Given whom to tell how far it is, returns the validation metrics without their prefix;
            None without validation data.
        count_tokens: Returns the tokens in a batch; None where nobody counts them.
        collector: Decides when garbage is collected; None leaves it to Python.
        detector: Finds the lines that wait for the device; None where nobody asked.
    """

    settings: Settings
    state: TrainState
    step: TrainStep
    inbound: Callable[[int, int | None, int], Generator[Batch]]
    outbound: Outbound
    journal: Journal
    limiter: StepLimiter | None
    callbacks: CallbackList
    checkpoints: CheckpointFolder | None
    validate: Callable[[Callable[[Progress], None]], dict[str, float]] | None
    max_batches: int | None
    scheduler_interval: Literal["step", "epoch"]
    clock: StepClock
    gil: GilWatch
    detector: ReadDetector | None
    collector: Collector | None
    count_tokens: Callable[[Batch], int] | None
    history: list[Row] = field(default_factory=list)
    stop_reason: str = ""
    validated_step: int = -1
    num_samples: int = 0
    num_tokens: int = 0
    num_samples_before: int = 0  # the step under way
    num_tokens_before: int = 0

    def stop(self, reason: str) -> None:
        """End the run after the step under way; the first reason counts."""
        self.stop_reason = self.stop_reason or reason

    def tell(self, event: type[Event], *values: Any) -> None:
        """Tell the callbacks of an event."""
        self.callbacks.tell(event(self.state, self.stop, self.log_media, *values))

    def tell_read(self, done: StepDone, values: dict[str, float]) -> None:
        """Tell the callbacks of a step's numbers; the thread of the loggers."""
        self.callbacks.tell_read(StepRead(done.step, done.epoch, values, self.stop))

    def log_media(self, kind: MediaKind, name: str, data: torch.Tensor | str) -> None:
        """Send an image, a histogram or a text to the loggers."""
        self.outbound.put_media(Media(self.state.step, self.state.epoch, name, kind, data))


def fit(run: Run, run_dir: Path | None) -> None:
    """Train, and tell the callbacks how it began and how it ended."""
    if run.callbacks.has_read_listeners:
        run.journal.on_step = run.tell_read
    try:
        run.tell(FitStarted, run_dir)
        _train(run)
        run.tell(FitFinished, run.stop_reason)
        run.outbound.flush()
    except BaseException as error:
        run.journal.loggers.has_failed = True
        cause = _earlier_cause(run, error)
        with noting_on(cause):
            run.tell(FitFailed, cause)
        if cause is not error:
            raise cause from error
        raise


def _earlier_cause(run: Run, error: BaseException) -> BaseException:
    """Return the error that a plain loop would have met first: a loss not yet read may be NaN."""
    if isinstance(error, Exception):
        with noting_on(error):
            try:
                run.outbound.flush()
            except NonFiniteError as cause:
                return cause
    return error


def _train(run: Run) -> None:
    while not run.stop_reason:
        first_step = run.state.step
        try:
            with closing(run.inbound(run.state.epoch, _batches_left(run), 0)) as batches:
                _train_epoch(run, batches)
            _check_progress(run, run.state.step - first_step)
            _finish_epoch(run, first_step)
        except Exception as error:
            add_stage_note(error, "loop", step=run.state.step)
            raise


def _train_epoch(run: Run, batches: Iterator[Batch]) -> None:
    step, clock = run.step, run.clock
    clock.restart()
    for batch in batches:
        is_due = step.micro_batch(batch)
        run.num_samples += num_samples(batch)
        if run.count_tokens is not None:
            run.num_tokens += run.count_tokens(batch)
        if is_due:
            _finish_step(run)
            if run.stop_reason:
                return
        clock.enter(DATA_WAIT)
    if step.num_pending:
        _finish_step(run)


def _finish_step(run: Run) -> None:
    scalars = run.step.update()
    step_ns, data_wait_ns = run.clock.step_ended()
    done = StepDone(
        run.state.step,
        run.state.epoch,
        step_ns,
        data_wait_ns,
        run.clock.began_s,
        run.num_samples - run.num_samples_before,
        run.num_tokens - run.num_tokens_before,
    )
    run.num_samples_before, run.num_tokens_before = run.num_samples, run.num_tokens
    run.outbound.put_step(done, scalars)  # never waits for the device in `overlap`
    if run.limiter is not None:
        run.limiter.step_queued()  # waits for the step `max_steps_in_flight` ago
    if run.clock.since_ns >= run.gil.next_ns:
        run.gil.look(run.state.step, run.state.epoch)
    if run.collector is not None:
        run.collector.step_done(run.state.step)
    if _after_step(run, scalars):
        run.clock.restart()  # a validation is no training time


def _after_step(run: Run, scalars: Scalars) -> bool:
    """Do what is due between two steps; say whether it took time of its own."""
    state, settings = run.state, run.settings
    if run.callbacks.has_step_listeners:
        plain = {
            name: value.detach() if isinstance(value, torch.Tensor) else value
            for name, value in scalars.items()
        }
        run.tell(StepFinished, plain)
    if settings.max_steps is not None and state.step >= settings.max_steps:
        run.stop("max_steps")
    every_n = settings.val_check_interval
    if every_n is not None and state.step % every_n == 0:
        with nullcontext() if run.detector is None else run.detector.reads.paused():
            _validate(run, {})
        return True
    return False


def _finish_epoch(run: Run, first_step: int) -> None:
    state, settings = run.state, run.settings
    run.outbound.flush()
    if run.collector is not None:
        run.collector.idle()
    run.clock.training_paused()  # what the device was still busy with is training time too
    run.tell(EpochFinished)
    losses = run.journal.losses[first_step : state.step]
    means = {"train/epoch_loss": sum(losses) / len(losses)}
    if run.step.metrics is not None:
        means |= run.step.metrics.finish_epoch()
    if settings.epoch_limit is not None and state.epoch + 1 >= settings.epoch_limit:
        run.stop("max_epochs")
    every_n = settings.check_val_every_n_epoch
    is_due = every_n is not None and ((state.epoch + 1) % every_n == 0 or run.stop_reason)
    if is_due and run.validated_step != state.step:
        _validate(run, means)
    else:
        _report(run, means)
    scheduler = state.scheduler
    if run.scheduler_interval == "epoch" and scheduler and not isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step()
    if run.checkpoints is not None:
        run.clock.enter(CHECKPOINT)
        run.checkpoints.save_last(state)
    state.epoch += 1


def _validate(run: Run, means: dict[str, float]) -> None:
    """Validate, report, and act on the result."""
    if run.validate is None:
        return _report(run, means)
    run.outbound.flush()
    run.clock.enter(VALIDATE)
    run.validated_step = run.state.step
    try:
        found = run.validate(run.outbound.put_progress)
    except Exception as error:
        add_stage_note(error, "validate", step=run.state.step)
        raise
    run.clock.enter(LOG)
    metrics = {f"val/{name}": value for name, value in found.items()}
    _report(run, {**means, **metrics})
    value = monitored(metrics, run.settings.monitor, "monitor")
    if isinstance(run.state.scheduler, ReduceLROnPlateau):
        run.state.scheduler.step(value)
    if run.checkpoints is not None:
        run.clock.enter(CHECKPOINT)
        run.checkpoints.save_if_best(run.state, value)
        run.clock.enter(LOG)
    run.tell(Validated, metrics)
    return None


def _report(run: Run, values: dict[str, float]) -> None:
    row = Row(run.state.step, run.state.epoch, values)
    if values:
        run.history.append(row)
        run.outbound.put_row(row)


def _batches_left(run: Run) -> int | None:
    """Return the most batches that the coming epoch may use, so that none is made in vain."""
    limits = [] if run.max_batches is None else [run.max_batches]
    if run.settings.max_steps is not None:
        steps_left = run.settings.max_steps - run.state.step
        limits.append(steps_left * run.settings.accumulate_grad_batches)
    return min(limits, default=None)


def _check_progress(run: Run, num_steps: int) -> None:
    """Refuse to go round and round over data that has run dry.

    Raises:
        StageError: If the epoch had no batch.
    """
    if num_steps:
        return
    if run.checkpoints is not None and run.state.step:
        run.checkpoints.save_last(run.state)
    if run.settings.max_steps is not None:
        wanted = f"{run.state.step} of {run.settings.max_steps} steps"
    else:
        wanted = f"{run.state.epoch} of {run.settings.epoch_limit} epochs"
    raise StageError(
        f"train_data ended early: it gave no batch in epoch {run.state.epoch}, after {wanted}. An "
        "iterator can be read only once: pass a DataLoader, a list, or an object whose __iter__ "
        "starts anew.",
        stage="fetch",
        step=run.state.step,
    )
