"""What a checkpoint holds: everything that decides the next step."""

from __future__ import annotations

import platform
import sys
from functools import partial
from typing import Any

import torch

from pipeline.loop.run import Run
from pipeline.randomness.seeds import generator_states
from pipeline.ranks import ranks
from pipeline.settings import Settings
from pipeline.watch.clock import BETWEEN, CHECKPOINT, LOG

_COUNTERS = (
    "position",
    "epoch_first_step",
    "is_epoch_open",
    "validated_step",
    "stop_reason",
)


def save(run: Run) -> None:
    """Take a snapshot and have it written, behind the rows that came before it; once for each place.

    Runs on:
        Loop thread, between two batches. Waits for the copy, and for the checkpoint before it.
    """
    saver, state = run.saver, run.state
    place = (state.step, state.epoch, run.position, run.is_epoch_open, run.stop_reason)
    if saver is None or not saver.is_new(place):
        return
    run.clock.enter(CHECKPOINT)
    began_s = run.clock.since_ns / 1e9
    if saver.is_writing:
        run.outbound.flush()
    if (job := saver.take(state.step, capture(run), began_s)) is not None:
        run.outbound.put_job(job)
    run.clock.enter(BETWEEN if run.clock.is_paused else LOG)


def rehearse(run: Run) -> None:
    """See that everything that a checkpoint will hold can be held, before there is anything to lose.

    Raises:
        CheckpointError: Naming what cannot.
    """
    if run.saver is None:
        return
    run.saver.rehearse(partial(capture, run))
    if run.data is not None:  # its own state is tried when it has given its first batch
        run.data.keep_states(partial(_foresees, run), run.saver.rehearse_data)


def _foresees(run: Run, position: int) -> bool:
    """Say whether a checkpoint will be made at a position of the epoch under way, as far as it is known."""
    steps, rest = divmod(position, run.settings.accumulate_grad_batches)
    if rest:
        return False
    step, settings = run.epoch_first_step + steps, run.settings
    every = (settings.checkpoint_every_n_steps, settings.val_check_interval)
    return step == settings.max_steps or any(each is not None and step % each == 0 for each in every)


def save_epoch(run: Run, is_saved: bool) -> None:
    """Save what a finished epoch has left.

    Args:
        run: The run.
        is_saved: Whether it ended in the middle of the epoch and was saved there: what comes after the
            last step is done again when it is resumed.
    """
    if run.saver is None:
        return
    if is_saved:
        run.outbound.put_job(run.saver.take_name(run.state.step))
    else:
        save(run)


def capture(run: Run) -> dict[str, Any]:
    """Return the state of a run between two batches: live tensors, and containers of its own."""
    assert run.saver is not None
    return {
        **run.state.state_dict(),
        "counters": {name: getattr(run, name) for name in _COUNTERS} | _seen(run),
        "accumulation": run.step.state_dict(),
        "train_metrics": None if run.step.metrics is None else run.step.metrics.state_dict(),
        "callbacks": run.callbacks.state_dict(),
        "best": run.saver.folder.best,
        "history": [tuple(row) for row in run.history],
        "generators": generator_states(run.generators),
        "epoch_generators": run.epoch_generators,
        "data": _data_state(run),
        "settings": plain_settings(run.settings),
        "versions": versions(),
        "num_ranks": ranks()[1],
    }


def _data_state(run: Run) -> dict[str, Any] | None:
    """Return the data's own state; between two epochs a loader of ours alone has one: it counts them."""
    if run.data is None or not (run.is_epoch_open or run.data.source.is_ours):
        return None
    return run.data.state(run.position)


def restore_counters(run: Run, found: dict[str, Any]) -> None:
    """Give a run its counters back."""
    counters = found["counters"]
    for name in _COUNTERS:
        setattr(run, name, counters[name])
    # Rates and the report are of this process; what an accumulation has seen counts for its step.
    run.num_samples, run.num_tokens = counters["num_samples_pending"], counters["num_tokens_pending"]
    run.num_samples_earlier = counters["num_samples"] - run.num_samples
    is_over = bool(run.stop_reason) and run.stop_reason not in ("max_steps", "max_epochs")
    run.is_ending = is_over or bool(run.interrupted_by)  # by a signal that came meanwhile
    if not is_over:
        run.stop_reason = ""  # the limits may be others now


def _seen(run: Run) -> dict[str, int]:
    return {
        "num_samples": run.num_samples_earlier + run.num_samples,
        "num_samples_pending": run.num_samples - run.num_samples_before,
        "num_tokens_pending": run.num_tokens - run.num_tokens_before,
    }


def plain_settings(settings: Settings) -> dict[str, Any]:
    """Return the settings as numbers and texts."""
    plain = (bool, int, float, str, type(None))
    return {name: each if isinstance(each, plain) else str(each) for name, each in vars(settings).items()}


def versions() -> dict[str, str]:
    """Return what the run was made with."""
    found = {
        "pipeline": sys.modules["pipeline"].__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    return found | ({"numpy": sys.modules["numpy"].__version__} if "numpy" in sys.modules else {})
