"""Data that is cut off by the very signal that is to stop the run.

A scheduler's SIGTERM and a terminal's Ctrl-C reach all processes of a job, the user's own too: a
DataLoader's workers, a pool of processes, a program at the other end of a pipe. They die of it, and with
them the batches that the step under way still needs. The run then stops at the batch before: that is a place
between two batches like any other, and is saved as it is. A validation is begun again, with new workers.

torch tells of a worker's death by an exception wherever the main thread is, in the middle of an update too.
It is kept until the loop waits for data, where the DataLoader finds it out by itself.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager, suppress
from typing import Any

from torch.utils.data._utils import signal_handling

from pipeline.errors import warn_harmlessly
from pipeline.loop.run import STOPPING_SIGNALS, Run
from pipeline.randomness.seeds import generator_states, restore_generators
from pipeline.watch.clock import DATA_WAIT, VALIDATE

# Whoever sends a signal to each process by itself may come to this one last.
SIGNAL_WAIT_S, _LOOK_S = 1.0, 0.01
_MAX_LOADERS = 16  # with workers that died in the run
_TORCHS_CHECK = "_error_if_any_worker_fails"


@contextmanager
def stopping_where_data_ends(run: Run) -> Iterator[None]:
    """End the run in the block, at the last batch that was used, if its data is cut off by a signal.

    Runs on:
        Loop thread, once an epoch.
    """
    run.clock.enter(DATA_WAIT)
    try:
        yield
    except Exception as error:
        if run.worker_death and "DataLoader worker" in str(error):
            error.add_note(run.worker_death)
        if run.clock.stage != DATA_WAIT or not _was_signalled(run, error):
            raise
        run.interrupted_by, run.is_ending = run.asked_by, True  # other ranks have lost theirs
        _say(run, error, "The run stops between two batches, and goes on from there when it is resumed")


def validated(run: Run, validate: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Validate; once more, with the same numbers, if the data is cut off by a signal."""
    generators = generator_states(run.generators)
    try:
        return validate()
    except Exception as error:
        if not _may_be_of_data(error) or not _was_signalled(run, error):
            raise
        _say(run, error, "The validation is begun again")
    restore_generators(generators, run.generators)
    return validate()


@contextmanager
def keeping_deaths(run: Run) -> Iterator[None]:
    """Have torch raise no error in the middle of a step because a DataLoader's worker has died."""
    check: Callable[[], None] | None = getattr(signal_handling, _TORCHS_CHECK, None)
    if check is None:
        yield
        return

    def check_while_waiting() -> None:
        try:
            check()
        except RuntimeError as error:
            # After a signal the dead may be those of another loader than the one that is waited for.
            if run.clock.stage in (DATA_WAIT, VALIDATE) and not run.asked_by:
                raise
            run.worker_death = str(error)

    names: dict[str, Any] = vars(signal_handling)
    names[_TORCHS_CHECK] = check_while_waiting
    try:
        yield
    finally:
        names[_TORCHS_CHECK] = check
        for _ in range(_MAX_LOADERS):  # each raises once: nobody is to hear of them later, wherever he is
            with suppress(RuntimeError):
                check()
                break


def _was_signalled(run: Run, error: Exception) -> bool:
    """Say whether the run was asked to stop by a signal; wait a moment for one if the error looks like it."""
    ends_s = time.monotonic() + (SIGNAL_WAIT_S if _tells_of_death(error) else 0.0)
    while not run.asked_by and time.monotonic() < ends_s:
        time.sleep(_LOOK_S)  # the handler runs on this thread, between two of these
    return run.asked_by in STOPPING_SIGNALS


def _tells_of_death(error: Exception) -> bool:
    """Say whether an error may come of a process that has died."""
    if isinstance(error, subprocess.CalledProcessError):
        return error.returncode < 0
    return isinstance(error, (OSError, EOFError, BrokenExecutor)) or "worker" in str(error).lower()


def _may_be_of_data(error: Exception) -> bool:
    notes = getattr(error, "__notes__", [])
    return _tells_of_death(error) or any(note.startswith("stage 'fetch'") for note in notes)


def _say(run: Run, error: Exception, what: str) -> None:
    found = f"{type(error).__name__}: {error}"
    warn_harmlessly(f"{run.asked_by} has reached what makes the data, too: {found}. {what}.")
