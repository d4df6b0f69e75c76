"""What is said of a worker process that has died."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from pipeline.concurrency import NurseryDiedError
from pipeline.errors import WorkerDiedError

_KILLED = (
    "It was killed, by the system as a rule, because memory ran out: look for 'oom' in the system's log "
    "(dmesg). Lower num_workers, or make the dataset smaller."
)


def death_warning(batches: Sequence[str], exit_code: int | None) -> str:
    """Return what to tell the user of a process that was replaced.

    Args:
        batches: Those that a worker may have died of; none if it had nothing to make.
        exit_code: Of a worker, negative for a signal; None for the nursery, whose nobody knows.
    """
    if exit_code is None:
        return (
            "the process that has the dataset, and starts the workers, is gone, and they with it. Another "
            f"one takes its place; batches under way are made again, with the same numbers. {_KILLED}"
        )
    ended = f"a worker process ended with {_describe_exit(exit_code)} while it"
    if not batches:
        return f"{ended} had nothing to make. Another one takes its place."
    again = "Another one makes it again" if len(batches) == 1 else "Another one makes each by itself"
    return f"{ended} made {' or '.join(batches)}. {again}, with the same numbers."


def death_error(batch: str, exit_code: int) -> WorkerDiedError:
    """Return what ends a run after a batch has killed its workers."""
    cause = " It may be out of memory." if exit_code == -signal.SIGKILL else ""
    return WorkerDiedError(
        f"worker processes ended with {_describe_exit(exit_code)}, twice, while they made "
        f"{batch}.{cause} Make that batch with placement=inline to see why.",
        stage="fetch",
    )


def nursery_error(error: NurseryDiedError) -> WorkerDiedError:
    """Return what ends a run after the process that has the dataset has died again."""
    what = (
        "the process that has the dataset, and starts the workers, is gone"
        if error.is_born
        else "the fork server, or the process for the dataset that it was to start, ended before there were "
        "workers"
    )
    return WorkerDiedError(f"{what}, twice. {_KILLED} Or set placement=thread.", stage="fetch")


def _describe_exit(exit_code: int) -> str:
    return f"exit code {exit_code}" if exit_code >= 0 else f"signal {signal.Signals(-exit_code).name}"
