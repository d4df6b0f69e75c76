"""The loop itself, `_train_epoch`, and below it what happens between two steps and two epochs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, nullcontext
from functools import partial
from math import isfinite

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pipeline.batch import Batch, Row, Scalars
from pipeline.callbacks.events import (
    EpochFinished,
    FitFailed,
    FitFinished,
    FitStarted,
    StepFinished,
    Validated,
    monitored,
)
from pipeline.errors import NonFiniteError, StageError, add_stage_note, noting_on
from pipeline.loop.cut_off import stopping_where_data_ends, validated
from pipeline.loop.resume import open_epoch, resume
from pipeline.loop.run import Run
from pipeline.loop.save import rehearse, save, save_epoch
from pipeline.outbound.rates import StepDone
from pipeline.step.guard import SKIPPED
from pipeline.watch.clock import BETWEEN, CALLBACKS, DATA_WAIT, LOG, VALIDATE

AGREE_EVERY_N_STEPS = 16  # the steps after which ranks tell each other that one of them was asked to stop


def fit(run: Run) -> None:
    """Train, and tell the callbacks how it began and how it ended."""
    run.journal.on_nonfinite = run.note_nonfinite
    if run.callbacks.has_read_listeners:
        run.journal.on_step = run.tell_read
    try:
        run.tell(FitStarted, run.run_dir)
        resume(run)
        rehearse(run)
        _train(run)
        run.tell(FitFinished, run.interrupted_by or run.stop_reason)
        run.outbound.flush()
    except BaseException as error:
        run.journal.loggers.has_failed = True
        cause = _earlier_cause(run, error)
        with noting_on(cause):
            if isinstance(cause, NonFiniteError):
                cause.spoiled_part = run.step.spoiled_part()
        with noting_on(cause):
            run.tell(FitFailed, cause)
        if cause is not error:
            raise cause from error
        raise
    finally:
        run.outbound.settle()


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
    _check_limits(run)
    while run.is_epoch_open or not run.is_ending:
        try:
            is_cut_short = False
            if not run.is_ending:
                with (
                    stopping_where_data_ends(run),
                    closing(open_epoch(run, _batches_left(run))) as batches,
                ):
                    _train_epoch(run, batches)
                    if is_cut_short := run.is_ending:
                        _save_the_rest(run)  # in the middle of its epoch, while its data stands there
                _check_progress(run)
            if run.is_ending and not is_cut_short:  # its data was cut off: it goes on there, if it is told to
                is_cut_short = True
                _save_the_rest(run)
            if run.interrupted_by:
                return
            _finish_epoch(run)
            save_epoch(run, is_cut_short)
        except Exception as error:
            add_stage_note(error, "loop", step=run.state.step)
            raise


def _save_the_rest(run: Run) -> None:
    """Save a run that ends in the middle of an epoch."""
    if not run.interrupted_by:
        run.outbound.flush()  # what the device is still busy with is training time too
    run.clock.pause()
    save(run)


def _train_epoch(run: Run, batches: Iterator[Batch]) -> None:
    step, clock = run.step, run.clock
    clock.restart()
    for batch in batches:
        is_due = step.micro_batch(batch)
        run.position += 1
        run.num_samples += run.count_samples(batch)
        if run.count_tokens is not None:
            run.num_tokens += run.count_tokens(batch)
        if is_due:
            _finish_step(run)
            if run.is_ending:
                return
        elif run.saver is not None and run.saver.is_asked:
            save(run)
        clock.enter(DATA_WAIT)
    if step.num_pending:
        _finish_step(run)


def _finish_step(run: Run) -> None:
    scalars = run.step.update()
    if run.data is not None and run.data.age is not None:
        scalars["time/age_batches"] = float(run.data.age)
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
        run.clock.enter(CALLBACKS)
        run.tell(StepFinished, plain)
        run.clock.enter(LOG)
    if settings.max_steps is not None and state.step >= settings.max_steps:
        run.stop("max_steps")
    if run.clock.began_s >= run.ends_at_s:
        run.interrupt("max_time")
    if run.has_ranks and state.step % AGREE_EVERY_N_STEPS == 0:
        run.agree()
    every_n = settings.val_check_interval
    is_validated = every_n is not None and state.step % every_n == 0
    if is_validated:
        run.outbound.flush()
        run.clock.pause()
        with nullcontext() if run.detector is None else run.detector.reads.paused():
            _validate(run, {})
    if run.saver is None or run.is_ending or not run.saver.is_due(state.step):
        return is_validated
    run.clock.pause()
    save(run)
    return True


def _finish_epoch(run: Run) -> None:
    state, settings = run.state, run.settings
    run.outbound.flush()
    if run.collector is not None:
        run.collector.idle()
    _check_weights(run)
    run.clock.pause()  # what the device was still busy with is training time too
    run.tell(EpochFinished)
    losses = run.journal.losses[run.epoch_first_step : state.step]
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
    state.epoch += 1
    run.position, run.is_epoch_open = 0, False


def _check_weights(run: Run) -> None:
    """Refuse to skip for ever: an epoch whose last step is bad may have NaN in weights or state.

    Raises:
        NonFiniteError: If it has.
    """
    step, losses = run.state.step - 1, run.journal.losses
    if run.settings.on_nonfinite != "skip" or not losses:
        return
    is_left_out = SKIPPED in run.journal.last_values
    is_bad = is_left_out or not isfinite(losses[-1])
    if is_bad and (run.step.spoiled_part() or "buffers").partition(":")[0] != "buffers":
        raise NonFiniteError(step, step, losses[-1], cause="update" if isfinite(losses[-1]) else "loss")


def _validate(run: Run, means: dict[str, float]) -> None:
    """Validate, report, and act on the result."""
    if run.validate is None:
        return _report(run, means)
    run.outbound.flush()
    run.clock.enter(VALIDATE)
    run.validated_step = run.state.step
    try:
        found = validated(run, partial(run.validate, run.outbound.put_progress))
    except Exception as error:
        add_stage_note(error, "validate", step=run.state.step)
        raise
    run.clock.enter(BETWEEN)
    metrics = {f"val/{name}": value for name, value in found.items()}
    _report(run, {**means, **metrics})
    value = monitored(metrics, run.settings.monitor, "monitor")
    if isinstance(run.state.scheduler, ReduceLROnPlateau):
        run.state.scheduler.step(value)
    if run.saver is not None:
        run.saver.offer(run.state.step, value)
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
        left = steps_left * run.settings.accumulate_grad_batches - run.step.num_pending
        limits.append(run.position + left)
    return min(limits, default=None)


def _check_limits(run: Run) -> None:
    """End a run before its first step that was over when it was resumed."""
    settings, state = run.settings, run.state
    if settings.max_steps is not None and state.step >= settings.max_steps:
        run.stop("max_steps")
    if settings.epoch_limit is not None and state.epoch >= settings.epoch_limit:
        run.stop("max_epochs")


def _check_progress(run: Run) -> None:
    """Refuse to go round and round over data that has run dry.

    Raises:
        StageError: If the epoch had no batch.
    """
    if run.position or run.interrupted_by:
        return
    if run.state.step:
        save(run)
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
