"""A run that goes on where another was stopped: everything is put back."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Generator, Sequence
from typing import Any

import torch

from pipeline.batch import Batch, Row
from pipeline.data import IterableSource, Source, is_read_once
from pipeline.errors import CheckpointError
from pipeline.loop.run import Run
from pipeline.loop.save import plain_settings, restore_counters
from pipeline.randomness.seeds import generator_states, is_typed, restore_generators
from pipeline.ranks import ranks

# What changes the numbers of a run; the rest may be others after a resume.
_DECISIVE = (
    "seed",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "precision",
    "ema_decay",
    "limit_train_batches",
    "limit_val_batches",
    "check_val_every_n_epoch",
    "val_check_interval",
    "monitor",
    "deterministic",
)


def resumed_seed(
    given: int | None, seed: int, checkpoint: dict[str, Any] | None, sources: Sequence[Source]
) -> int:
    """Return the seed of a run: that of the checkpoint it goes on from, unless the user gives another one.

    Args:
        given: By the user; None for none.
        seed: Of the run if it is a new one; the sources have it.
        checkpoint: None for a new run.
        sources: Given the seed that is returned.
    """
    before = None if checkpoint is None else checkpoint["settings"].get("seed")
    if given is not None or before is None:
        return seed  # `resume` warns if the two differ
    if seed != before and is_typed(seed):
        warnings.warn(
            f"torch was seeded with {seed}, but the run goes on with the seed of its checkpoint, {before}, "
            f"as if it had not been stopped. Pass seed={seed} to have another order from here on.",
            stacklevel=3,
        )
    for source in sources:
        source.seed = int(before)
    return int(before)


def resume(run: Run) -> None:
    """Put everything back as the checkpoint has it; does nothing for a new run.

    The weights come first, then callbacks have their turn, then what trains the weights: the groups of
    parameters may be a callback's doing. The generators come last.

    Raises:
        CheckpointError: If it belongs to another run.
    """
    found = run.checkpoint
    if found is None:
        return
    _check_ranks(found)
    run.state.load_weights(found)
    restore_counters(run, found)
    run.callbacks.load_state_dict(found["callbacks"])  # which may add what they had added before
    run.state.load_training(found)
    run.step.load_state_dict(found["accumulation"])
    if run.step.metrics is not None and found["train_metrics"] is not None:
        run.step.metrics.load_state_dict(found["train_metrics"], run.step.device)
    run.history[:] = [Row(*row) for row in found["history"]]
    journal = found["journal"]
    run.journal.losses = array("d", journal["losses"].tolist())
    run.journal.last_values = journal["last_values"]
    run.epoch_generators = found["epoch_generators"]
    if run.data is not None and (run.is_epoch_open or run.data.source.is_ours):
        run.data.load_state(found["data"])
    if run.saver is not None:
        run.saver.resume(run.state.step, found["best"])
    _warn_of_changes(found["settings"], plain_settings(run.settings))
    _warn_of_iterator(run)
    restore_generators(found["generators"], run.generators)


def open_epoch(run: Run, max_batches: int | None) -> Generator[Batch]:
    """Return an epoch's batches: all of a new one, what is left of one that was begun.

    Where data draws its order from a generator, it finds it as it was when the epoch began. One of its own,
    which may be ahead of the loop, it goes on with from there, unless only others have drawn from it since.
    """
    if not run.is_epoch_open:
        run.epoch_first_step, run.position, run.is_epoch_open = run.state.step, 0, True
        if run.saver is not None:
            run.epoch_generators = generator_states(run.generators)
        batches = run.inbound(run.state.epoch, max_batches, 0)
        run.epoch_generators["opened"] = [each.get_state() for each in run.generators]
        return batches
    now = generator_states(run.generators)
    restore_generators(run.epoch_generators, run.generators)
    try:
        return run.inbound(run.state.epoch, max_batches, run.position)
    finally:
        opened = run.epoch_generators.get("opened", ())  # older checkpoints have none
        own = zip(run.generators, opened, now["more"], strict=False)
        for generator, state, later in own:  # a validation may have drawn, the epoch has not
            if torch.equal(generator.get_state(), state):
                generator.set_state(later)
        restore_generators(now)


def _check_ranks(found: dict[str, Any]) -> None:
    """Refuse to go on in the middle of an epoch that was shared out among another number of ranks."""
    before, now = found.get("num_ranks"), ranks()[1]
    if before in (None, now):
        return
    if found["counters"]["is_epoch_open"]:
        raise CheckpointError(
            f"the checkpoint is of the middle of an epoch shared by {before} ranks, and this run has {now}: "
            f"no share would be right. Start {before} ranks, or resume from a checkpoint of an epoch's end."
        )
    warnings.warn(
        f"the checkpoint is of a run with {before} ranks, this one has {now}: a step has another number of "
        "samples. The run goes on, but not as the one that was stopped would have.",
        stacklevel=4,
    )


def _warn_of_iterator(run: Run) -> None:
    """Say it if epochs that were used may come again: an iterator goes on from one to the next."""
    source = None if run.data is None else run.data.source
    if run.state.epoch and isinstance(source, IterableSource) and is_read_once(source.data):
        warnings.warn(
            f"train_data is an iterator ({type(source.data).__name__}), of which {run.state.epoch} epochs "
            "were used before the run was stopped. It is read from where it stands: if that is its "
            "beginning, their batches come again. Pass one that stands behind them, or an object whose "
            "__iter__ starts anew.",
            stacklevel=3,
        )


def _warn_of_changes(before: dict[str, Any], now: dict[str, Any]) -> None:
    changes = [
        f"{name} was {before[name]}, is {now[name]}"
        for name in _DECISIVE
        if name in before and before[name] != now[name]
    ]
    if changes:
        warnings.warn(
            f"settings that decide the numbers differ from the checkpoint's: {'; '.join(changes)}. The run "
            "goes on, but not as the one that was stopped would have.",
            stacklevel=3,
        )
