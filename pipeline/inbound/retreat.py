"""What follows from the checks: which placement is used, and the way back to the loop."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from pipeline.checks import OURS_REMEDY, Checks, DifferenceError, DoubtError, Limits
from pipeline.data import READS_OURS, Reader
from pipeline.errors import PipelineError, StageError, listed, warn_harmlessly
from pipeline.inbound.decide_placement import TEXTBOOK, Place, may_be

MAX_CHANGES = 3  # by a step, in a run; then batches stay in the loop


class Retreat:
    """Takes a place back, or some of it, because of what the checks have found.

    Args:
        checks: Of the source.
        name: What the source is called.
        is_pinned: Whether the user named the place.

    Attributes:
        has_left: Whether a place that the user named is not used.

    Runs on:
        Loop thread.
    """

    def __init__(self, checks: Checks, name: str, *, is_pinned: bool) -> None:
        self._checks, self._name, self._is_pinned = checks, name, is_pinned
        self.has_left = False
        self._num_changes, self._has_said_draws = 0, False

    def allowed(self, place: Place, reader: Reader) -> Place:
        """Return a place, or the loop if batches may not be made there; a user who named it is told."""
        limits = self._checks.limits
        # A thread makes these in order, too; but what it has made may have to be made again, for its draws.
        if may_be(place, limits, is_threadable=True, is_random_access=reader.is_random_access):
            return place
        if self._is_pinned and not self.has_left:
            self.has_left, same = True, "" if self._num_changes else ", with the same numbers"
            if not limits.remedy:  # a Loader of ours does by itself what was asked for
                warn_harmlessly(
                    f"batches are made in the loop, and not in {place}{same}: {limits.reason}. Keep "
                    "that out of the dataset, or set check_data=False if it decides nothing (docs/checks.md)."
                )
        return TEXTBOOK

    def after(self, doubt: DoubtError, place: Place, until: int) -> None:
        """Go back to the loop: for good, or to look again, where only a step has changed something.

        Raises:
            StageError: If the user named the place, and it makes other batches; none of them was used.
        """
        if not isinstance(doubt, DifferenceError):
            self._num_changes += 1
            self._checks.look_again(until)
            if self._num_changes > MAX_CHANGES:
                self._checks.withdraw(f"{doubt}, for the {self._num_changes}th time")
            warn_harmlessly(
                f"{self._name}: {doubt}. The batches made ahead were dropped, and are made again."
            )
            return
        if self._is_pinned:
            raise StageError(
                f"{place} makes other batches of {self._name} than the loop does: {doubt}. None of them was "
                "used. The dataset may depend on a global, on what its module does when it is imported, or "
                "on its thread. Leave placement and schedule at auto, which goes back to the loop by "
                "itself, or see docs/placement.md.",
                stage="fetch",
            ) from doubt
        self._checks.withdraw(str(doubt))
        warn_harmlessly(f"{self._name}: {doubt}. None was used; batches are made in the loop from here on.")

    def without_processes(self, error: PipelineError) -> None:
        """Use no processes from here on, since they cannot be started again."""
        self._checks.limits = self._checks.limits.restricted(Limits(None, False, str(error)))

    def leave_to_ours(self) -> None:
        """Have the loop read what reads a loader of ours, which reads ahead itself."""
        reason = f"{self._name} reads a pipeline.Loader, which reads ahead itself"
        self._checks.withdraw(reason, OURS_REMEDY)
        self.has_left = self._is_pinned

    def warn_of_draws(self, names: Sequence[str], reader: Reader) -> None:
        """Say that a thread cannot make batches that draw from these; once."""
        if READS_OURS[0] in names:
            self.leave_to_ours()
            return
        if self._has_said_draws:
            return
        self._has_said_draws = True
        can_share = reader.max_processes != 0 and self._checks.limits.has_processes
        or_process = ", or set placement=process" if can_share else ""
        warnings.warn(
            f"random numbers were drawn from {listed(names)} while a batch was made. Threads share that "
            "generator, so the loop thread makes the batches from here on, with the same numbers and without "
            f"overlap. Draw from torch's functions that take a generator{or_process}.",
            stacklevel=2,
        )
