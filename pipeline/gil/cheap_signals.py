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
    """

    thread: str
    stage: str
    wall_s: float
    cpu_s: float


class StageClock:
    """Times the stages of one thread, and marks them for the sampler.

    Args:
        stages: Their names, in the order of the numbers by which they are entered; the first is
            entered at once.

    Attributes:
        since_ns: When the present stage began.
        has_cpu_time: Whether thread time is read as well, which costs more than all the rest. It may
            be switched on and off; a stage's thread time is that of the turns measured, scaled up.

    Runs on:
        The thread that made it. A change of stage takes some 0.2 µs, with thread time 0.6 µs.
    """

    def __init__(self, stages: tuple[str, ...]) -> None:
        self._stages = stages
        self._ids = [marks.stage_id(name) for name in stages]
        self._wall_ns = [0] * len(stages)
        self._measured_ns = [0] * len(stages)  # wall time of the turns whose thread time was read
        self._cpu_ns = [0] * len(stages)
        self._cell = marks.stage_cell()
        self._outer, self._now = self._cell[0], 0
        self._cell[0] = self._ids[0]
        self.has_cpu_time = True
        self.since_ns, self._cpu_since_ns = perf_counter_ns(), thread_time_ns()

    @property
    def stage(self) -> int:
        """The present stage."""
        return self._now

    def enter(self, stage: int) -> None:
        """End the present stage and begin another."""
        wall_ns = perf_counter_ns()
        now, taken_ns = self._now, wall_ns - self.since_ns
        self._wall_ns[now] += taken_ns
        if self.has_cpu_time:
            cpu_ns = thread_time_ns()
            self._cpu_ns[now] += cpu_ns - self._cpu_since_ns
            self._measured_ns[now] += taken_ns
            self._cpu_since_ns = cpu_ns
        self._now, self.since_ns = stage, wall_ns
        self._cell[0] = self._ids[stage]

    def read_cpu_time(self, is_read: bool) -> None:
        """Read thread time as well from now on, or no longer; call it right after `enter`."""
        if is_read and not self.has_cpu_time:
            self._cpu_since_ns = thread_time_ns()
        self.has_cpu_time = is_read

    def off_core_s(self, stages: Iterable[int]) -> float:
        """Return how long the thread was on no core in these stages, in seconds."""
        return sum(self._wall_ns[stage] - self._scaled_cpu_ns(stage) for stage in stages) / 1e9

    def leave(self) -> None:
        """Give the thread back the stage that it had before."""
        self.enter(self._now)
        self._cell[0] = self._outer

    def times(self) -> list[StageTime]:
        """Return what was measured so far, the stages that were never entered left out."""
        thread = threading.current_thread().name
        return [
            StageTime(thread, name, self._wall_ns[stage] / 1e9, self._scaled_cpu_ns(stage) / 1e9)
            for stage, name in enumerate(self._stages)
            if self._wall_ns[stage]
        ]

    def _scaled_cpu_ns(self, stage: int) -> float:
        measured_ns = self._measured_ns[stage]
        return self._wall_ns[stage] * self._cpu_ns[stage] / measured_ns if measured_ns else 0.0


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
            totals = self._totals.setdefault(key, [0, 0])
            totals[0] += wall_ns - since[0]
            totals[1] += cpu_ns - since[1]
        self._since.times = (wall_ns, cpu_ns)

    def times(self) -> list[StageTime]:
        """Return what was measured so far, the longest first."""
        found = [
            StageTime(
                marks.thread_names.get(tid) or f"thread {tid}",
                marks.stage_names.get(stage, ""),
                wall_ns / 1e9,
                cpu_ns / 1e9,
            )
            for (tid, stage), (wall_ns, cpu_ns) in [*self._totals.items()]
        ]
        return sorted(found, key=lambda each: -each.wall_s)


class Handoffs:
    """Counts how often the GIL went to another thread.

    Args:
        read: From `pipeline.gil.measuring.interpreter.handoff_counter`.
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
