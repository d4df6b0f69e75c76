"""What is said of a worker process that has died."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from pipeline.errors import WorkerDiedError


def death_warning(batches: Sequence[str], exit_code: int) -> str:
    """Return what to tell the user of a worker that was replaced.

    Args:
        batches: Those that it may have died of; none if it had nothing to make.
        exit_code: Negative for a signal.
    """
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


def _describe_exit(exit_code: int) -> str:
    return f"exit code {exit_code}" if exit_code >= 0 else f"signal {signal.Signals(-exit_code).name}"
