"""When something that is done now and then is due, apart from what is done."""

from __future__ import annotations

import time
from collections.abc import Callable

from pipeline.errors import ConfigError


class Every:
    """Says when it is time: every so many steps, every so many seconds, or whichever comes first.

        every = Every(steps=1000, seconds=30)
        if every.is_due(step):
            ...

    Args:
        steps: Due at each multiple of it, or at the first step asked about after one.
        seconds: Due when this time has passed since it last was, or since it was made or reset.
        clock: Returns seconds.

    Raises:
        ConfigError: If neither is given, or one is not positive.
    """

    def __init__(
        self,
        *,
        steps: int | None = None,
        seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if steps is None and seconds is None:
            raise ConfigError("Every needs steps= or seconds=, or both.")
        if (steps is not None and steps < 1) or (seconds is not None and not seconds > 0):
            raise ConfigError(
                f"Every needs steps of 1 or more and seconds above 0, got {steps} and {seconds}."
            )
        self._steps, self._seconds, self._clock = steps, seconds, clock
        self.reset()

    def __repr__(self) -> str:
        given = {"steps": self._steps, "seconds": self._seconds}
        return f"Every({', '.join(f'{name}={value}' for name, value in given.items() if value is not None)})"

    def reset(self) -> None:
        """Begin anew, as for another run."""
        self._last_step, self._last_s = 0, self._clock()

    def state_dict(self) -> dict[str, float]:
        """Return when it was last due."""
        return {"last_step": self._last_step, "since_s": self._clock() - self._last_s}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from there, the time in between left out."""
        self._last_step, self._last_s = int(state["last_step"]), self._clock() - state["since_s"]

    def is_due(self, step: int) -> bool:
        """Say whether it is time, and count from here if it is."""
        passed_steps = self._steps is not None and step // self._steps > self._last_step // self._steps
        if not passed_steps:
            if self._seconds is None:
                return False
            now_s = self._clock()
            if now_s - self._last_s < self._seconds:
                return False
            self._last_s = now_s
        elif self._seconds is not None:
            self._last_s = self._clock()
        self._last_step = step
        return True
