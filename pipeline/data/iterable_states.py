"""The states that an iterable gave of itself, from which an epoch is resumed in its middle.

Such a state may be large (a shuffle buffer, the workers' places), so it is asked for where it is needed.
Where the loop thread reads the iterable in its turn, that is when a checkpoint is made: the iterable stands
where the run does. Where a thread reads ahead it is too late then, so states are kept on the way: at the
positions of checkpoints that can be foreseen, at each of the first batches, then at ever longer distances and
once a second. All of it takes one percent of the run's time at most, and what it begins with. A checkpoint at
any other position has the newest state before it; the batches in between are read again when it is resumed.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable
from typing import Any

_FIRST = 8
_EVERY_S = 1.0
_SHARE = 0.01
_CREDIT_S = 0.05


class KeptStates:
    """Decides when an iterable is asked for its state, and keeps what it said.

    Args:
        foresees: Says whether a checkpoint will be made at a position.
        check: Called with the first state, to see that a checkpoint can hold it.
        num_ahead: The loop is at most so many batches behind the iterable; older states are let go.
        clock: Returns seconds.

    Attributes:
        is_checked: Whether that has been seen.

    Runs on:
        Whichever thread reads the iterable, but for `newest`, which the loop thread asks for.
    """

    def __init__(
        self,
        foresees: Callable[[int], bool],
        check: Callable[[Any], None],
        num_ahead: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._foresees, self._check, self._clock = foresees, check, clock
        self._num_ahead = num_ahead
        self._states: deque[tuple[int, Any]] = deque()
        self._began_s = self._last_s = clock()
        self._spent_s = 0.0
        self.is_checked = False

    def begin(self) -> None:
        """Forget the states of the epoch before."""
        self._states = deque()

    def made(self, position: int, ask: Callable[[], Any], is_ahead: bool, is_first: bool) -> None:
        """Keep the state at a position, if it is time.

        Args:
            position: Behind the batch that was made last.
            ask: Returns the iterable's state, as it is now.
            is_ahead: Whether the loop may be at an earlier batch.
            is_first: Whether it is the first batch that was read of its epoch.
        """
        if is_ahead and (is_first or self._is_time(position) or self._foresees(position)):
            self._keep(position, ask)
        elif not self.is_checked:
            self._check_once(ask())

    def newest(self, position: int) -> tuple[int, Any] | None:
        """Return the newest state that was kept up to a position, and where that was."""
        return next((each for each in reversed(list(self._states)) if each[0] <= position), None)

    def _keep(self, position: int, ask: Callable[[], Any]) -> None:
        began_s = self._clock()
        state = copy.deepcopy(ask())  # the iterable goes on with its own
        self._last_s = self._clock()
        self._spent_s += self._last_s - began_s
        self._check_once(state)
        states = self._states
        states.append((position, state))
        while len(states) > 1 and states[1][0] <= position - self._num_ahead:
            states.popleft()

    def _check_once(self, state: Any) -> None:
        if not self.is_checked:
            self.is_checked = True
            self._check(state)

    def _is_time(self, position: int) -> bool:
        """Say whether a position is worth a state: among the first, half as far again, or a second later."""
        last = self._states[-1][0] if self._states else 0
        now_s = self._clock()
        is_far = position <= _FIRST or position >= last + last // 2
        if not is_far and now_s - self._last_s < _EVERY_S:
            return False
        return self._spent_s <= _CREDIT_S + _SHARE * (now_s - self._began_s)
