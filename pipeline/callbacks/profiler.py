"""A trace of some steps, for chrome://tracing or Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.callbacks.events import Callback, FitFailed, FitFinished, FitStarted, StepFinished
from pipeline.errors import ConfigError


class ProfilerWindow(Callback):
    """Profile the optimizer steps from one to another, and write ``traces/steps_<a>_<b>.json``.

        trainer.fit(..., callbacks=[ProfilerWindow(20, 25)])

    Args:
        first_step: The first step to profile; rows count them from 1.
        last_step: The last one.
        folder: Where the trace goes; ``traces`` in the run folder unless told.
        profile: Further arguments of `torch.profiler.profile`, such as ``profile_memory``.

    Raises:
        ConfigError: For a window that is none.

    Runs on:
        Loop thread. Profiling slows the steps of the window and writing holds up the one after it.

    Source:
        `torch.profiler`.
    """

    def __init__(
        self, first_step: int, last_step: int, folder: str | Path | None = None, **profile: Any
    ) -> None:
        if not 1 <= first_step <= last_step:
            raise ConfigError(
                f"ProfilerWindow needs 1 <= first_step <= last_step, got {first_step} and {last_step}."
            )
        self._first, self._last, self._profile = first_step, last_step, profile
        self._folder = None if folder is None else Path(folder)
        self._profiler: Any = None

    def on_fit_started(self, event: FitStarted) -> None:
        self._path = self._folder or (event.run_dir or Path()) / "traces"
        if self._first == event.state.step + 1:
            self._start()

    def on_step_finished(self, event: StepFinished) -> None:
        step = event.state.step
        if self._profiler is not None:
            self._profiler.step()  # ends the step in the trace
            if step == self._last:
                self._stop(step)
        elif step == self._first - 1:
            self._start()

    def on_fit_finished(self, event: FitFinished) -> None:
        self._stop(event.state.step)

    def on_fit_failed(self, event: FitFailed) -> None:
        self._stop(event.state.step)

    def _start(self) -> None:
        self._profiler = torch.profiler.profile(**self._profile)
        self._profiler.start()

    def _stop(self, step: int) -> None:
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self._path.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._path / f"steps_{self._first}_{step}.json"))
