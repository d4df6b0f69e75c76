"""Where the loop thread's time goes: waiting for batches, and all of it together."""

from __future__ import annotations

from time import perf_counter


class StepClock:
    """Times steps from one end to the next, and within them the waits for batches.

    Attributes:
        began_s: When the step under way began, by `time.perf_counter`.
        train_s: All time so far that was training: without validations and checkpoints.

    Runs on:
        Loop thread; some 0.1 µs a call.
    """

    def __init__(self) -> None:
        self.train_s = 0.0
        self.restart()

    def restart(self) -> None:
        """Begin a step now: what came before was no training."""
        self.began_s = self._asked_s = perf_counter()
        self._waited_s = 0.0

    def ask_for_batch(self) -> None:
        """Begin to wait for a batch."""
        self._asked_s = perf_counter()

    def batch_arrived(self) -> None:
        """End the wait for a batch."""
        self._waited_s += perf_counter() - self._asked_s

    def step_ended(self) -> tuple[float, float]:
        """End a step and begin the next; return its time and its data wait, in seconds."""
        now_s = perf_counter()
        step_s, waited_s = now_s - self.began_s, self._waited_s
        self.began_s, self._waited_s = now_s, 0.0
        self.train_s += step_s
        return step_s, waited_s
