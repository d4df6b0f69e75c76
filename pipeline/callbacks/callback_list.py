"""Tells callbacks of events: of live ones on the loop thread, of read ones where the loggers run."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

from pipeline.callbacks.events import (
    Callback,
    EpochFinished,
    Event,
    FitFailed,
    FitFinished,
    FitStarted,
    StepFinished,
    StepRead,
    Validated,
)
from pipeline.errors import CheckpointError, add_stage_note
from pipeline.every import Every

_METHOD: dict[type[Event | StepRead], str] = {
    FitStarted: "on_fit_started",
    StepFinished: "on_step_finished",
    StepRead: "on_step_read",
    EpochFinished: "on_epoch_finished",
    Validated: "on_validated",
    FitFinished: "on_fit_finished",
    FitFailed: "on_fit_failed",
}


class _Listener:
    """A callback, for one kind of event, and the time that it took."""

    def __init__(self, callback: Callback, kind: type[Event | StepRead]) -> None:
        self.name, self.spent_s = type(callback).__name__, 0.0
        self._method = getattr(callback, _METHOD[kind])
        self.is_needed = getattr(type(callback), _METHOD[kind]) is not getattr(Callback, _METHOD[kind])
        is_of_steps = kind in (StepFinished, StepRead)
        self.every: Every | None = copy.copy(callback.every) if is_of_steps else None
        if self.every is not None:
            self.every.reset()

    def hear(self, event: Any, step: int) -> None:
        """Call it, if it is time."""
        if self.every is not None and not self.every.is_due(step):
            return
        began_s = perf_counter()
        try:
            self._method(event)
        except Exception as error:
            add_stage_note(error, f"callback ({self.name})", step=step)
            raise
        finally:
            self.spent_s += perf_counter() - began_s


class CallbackList:
    """Tells callbacks of events, in the order in which they were given.

    Attributes:
        has_step_listeners: Whether any callback wants to hear of each step; most runs have none,
            and their steps pay nothing.
        has_read_listeners: The same of each step's numbers.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._names = [type(callback).__name__ for callback in callbacks]
        self._callbacks = tuple(callbacks)
        self._listeners = {
            kind: [each for callback in callbacks if (each := _Listener(callback, kind)).is_needed]
            for kind in _METHOD
        }
        self.has_step_listeners = bool(self._listeners[StepFinished])
        self.has_read_listeners = bool(self._listeners[StepRead])

    def tell(self, event: Event) -> None:
        """Call each callback's method for this event; loop thread."""
        for listener in self._listeners[type(event)]:
            listener.hear(event, event.state.step)

    def tell_read(self, event: StepRead) -> None:
        """Call each callback that wants a step's numbers; the thread of the loggers."""
        for listener in self._listeners[StepRead]:
            listener.hear(event, event.step)

    def state_dict(self) -> dict[str, Any]:
        """Return the callbacks' states, and when each was last told of a step."""
        states = [
            {"name": name, "state": each.state_dict()}
            for name, each in zip(self._names, self._callbacks, strict=True)
        ]
        return {"callbacks": states, "every": [each.state_dict() for each in self._timers()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give each callback its state back.

        Raises:
            CheckpointError: If the callbacks are others, or in another order.
        """
        found = [each["name"] for each in state["callbacks"]]
        if found != self._names:
            raise CheckpointError(
                f"it was written with the callbacks {found or 'none'}, not {self._names or 'none'}. Pass the "
                "same ones, in the same order."
            )
        for callback, each in zip(self._callbacks, state["callbacks"], strict=True):
            callback.load_state_dict(each["state"])
        for timer, each in zip(self._timers(), state["every"], strict=False):
            timer.load_state_dict(each)

    def _timers(self) -> list[Every]:
        each_kind = (self._listeners[StepFinished], self._listeners[StepRead])
        return [each.every for listeners in each_kind for each in listeners if each.every is not None]

    def times(self) -> Mapping[str, float]:
        """Return the seconds that the loop thread spent in each callback, by its class."""
        spent_s = dict.fromkeys(self._names, 0.0)
        for kind, listeners in self._listeners.items():
            for listener in listeners if kind is not StepRead else ():
                spent_s[listener.name] += listener.spent_s
        return spent_s
