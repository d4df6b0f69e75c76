"""The cheap signals: wall and thread time per stage, and how often the GIL changed hands.

They say what share of a stage was on a core, and so at most how long it waited; not who held the
GIL. They are what is left where the sampler cannot run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter_ns, thread_time_ns

from pipeline.gil import marks


@dataclass(frozen=True)
class StageTime:
    """How long a thread was in a stage.

    Args:
        thread: The thread's name.
        stage: The stage's name.
        wall_s: Seconds there.
        cpu_s: Seconds of them on a core, holding the GIL or not.
        num_entered: How often it was entered.
    """

    thread: str
    stage: str
    wall_s: float
    cpu_s: float
    num_entered: int


class StageClock:
    """Times the stages of one thread, and marks them for the sampler.

    Args:
        stages: Their names, in the order of the numbers by which they are entered; the first is
            entered at once.

    Runs on:
        The thread that made it. A change of stage takes some 0.5 µs, most of it `thread_time_ns`.
    """

    def __init__(self, stages: tuple[str, ...]) -> None:
        self._stages = stages
        self._ids = [marks.stage_id(name) for name in stages]
        self._wall_ns = [0] * len(stages)
        self._cpu_ns = [0] * len(stages)
        self._num_entered = [1] + [0] * (len(stages) - 1)
        self._cell = marks.stage_cell()
        self._outer = self._cell[0]
        self._now = 0
        self._cell[0] = self._ids[0]
        self.since_ns, self._cpu_since_ns = perf_counter_ns(), thread_time_ns()

    def enter(self, stage: int) -> None:
        """End the present stage and begin another."""
        wall_ns, cpu_ns = perf_counter_ns(), thread_time_ns()
        now = self._now
        self._wall_ns[now] += wall_ns - self.since_ns
        self._cpu_ns[now] += cpu_ns - self._cpu_since_ns
        self._num_entered[stage] += 1
        self._now, self.since_ns, self._cpu_since_ns = stage, wall_ns, cpu_ns
        self._cell[0] = self._ids[stage]

    def wall_ns(self, stage: int) -> int:
        """Return how long a stage has lasted so far, all its ended turns together."""
        return self._wall_ns[stage]

    def off_core_s(self, stages: Iterable[int]) -> float:
        """Return how long the thread was on no core in these stages, in seconds."""
        return sum(self._wall_ns[stage] - self._cpu_ns[stage] for stage in stages) / 1e9

    def leave(self) -> None:
        """Give the thread back the stage that it had before."""
        self.enter(self._now)
        self._cell[0] = self._outer

    def times(self) -> list[StageTime]:
        """Return what was measured so far, the stages that were never entered left out."""
        thread = threading.current_thread().name
        return [
            StageTime(thread, name, wall_ns / 1e9, cpu_ns / 1e9, num_entered)
            for name, wall_ns, cpu_ns, num_entered in zip(
                self._stages, self._wall_ns, self._cpu_ns, self._num_entered, strict=True
            )
            if num_entered
        ]


class SharedTimes:
    """Times the blocks of `stage` on all threads, in place of the sampler."""

    def __init__(self) -> None:
        self._totals: dict[tuple[int, int], list[int]] = {}  # each key is one thread's alone
        self._since = threading.local()

    def change(self, before: int) -> None:
        """Book the time since the calling thread's last change to the stage that it leaves."""
        wall_ns, cpu_ns = perf_counter_ns(), thread_time_ns()
        since = getattr(self._since, "times", None)
        if since is not None:
            key = (threading.get_native_id(), before)
            totals = self._totals.setdefault(key, [0, 0, 0])
            totals[0] += wall_ns - since[0]
            totals[1] += cpu_ns - since[1]
            totals[2] += 1
        self._since.times = (wall_ns, cpu_ns)

    def times(self) -> list[StageTime]:
        """Return what was measured so far, the longest first."""
        found = [
            StageTime(
                marks.thread_names.get(tid) or f"thread {tid}",
                marks.stage_names.get(stage, ""),
                wall_ns / 1e9,
                cpu_ns / 1e9,
                count,
            )
            for (tid, stage), (wall_ns, cpu_ns, count) in [*self._totals.items()]
        ]
        return sorted(found, key=lambda each: -each.wall_s)


class Handoffs:
    """Counts how often the GIL went to another thread.

    Args:
        read: From `pipeline.gil.interpreter.handoff_counter`.
    """

    def __init__(self, read: Callable[[], int]) -> None:
        self._read = read
        self._first = self._before = read()

    def since_last(self) -> int:
        """Return the hand-offs since the last call of this."""
        before, self._before = self._before, self._read()
        return self._before - before

    def since_first(self) -> int:
        """Return the hand-offs since this was made."""
        return self._read() - self._first
