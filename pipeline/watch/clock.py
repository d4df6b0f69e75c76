"""Where the loop thread's time goes, stage by stage, and step by step."""

from __future__ import annotations

from pipeline.gil.cheap_signals import StageClock

SETUP, DATA_WAIT, FORWARD, BACKWARD, OPTIMIZER, LOG, VALIDATE, CHECKPOINT, CALLBACKS, BETWEEN = range(10)
COMPUTE_STAGES = (FORWARD, BACKWARD, OPTIMIZER)
# Reading it is a system call, which in the middle of a step costs 6 µs where 0.8 are its own: a step of
# every 20 ms is enough to scale from.
CPU_TIME_EVERY_NS = 20_000_000
STAGES = (
    "setup",
    "data_wait",
    "forward",
    "backward",
    "optimizer",
    "log",
    "validate",
    "checkpoint",
    "callbacks",
    "between",
)


class StepClock(StageClock):
    """Times the loop's stages, and steps from one end to the next.

    Attributes:
        num_steps: Steps ended so far.
        began_s: When the step under way began, by `time.perf_counter`.
        num_pauses: How often the loop did something else between two steps.
        train_s: All time so far that was training: without validations and checkpoints.
        is_paused: Whether what the loop does now is no training; until `restart`.

    Runs on:
        Loop thread; a change of stage takes some 0.2 µs.
    """

    def __init__(self) -> None:
        super().__init__(STAGES)
        self._train_ns = 0
        self._began_ns, self._waited_ns = self.since_ns, 0
        self.began_s = self.since_ns / 1e9
        self.num_steps = self.num_pauses = 0
        self._cpu_due_ns, self.is_paused = 0, False

    @property
    def train_s(self) -> float:
        return self._train_ns / 1e9

    def restart(self) -> None:
        """Begin a step now, and wait for its first batch: what came before was no training."""
        self.enter(DATA_WAIT)
        opening_ns = self._wall_ns[DATA_WAIT] - self._waited_ns  # an epoch: it waits for data, in no step
        self._wall_ns[DATA_WAIT] -= opening_ns
        self._wall_ns[BETWEEN] += opening_ns
        self._began_ns, self._waited_ns = self.since_ns, self._wall_ns[DATA_WAIT]
        self.began_s = self.since_ns / 1e9
        self.num_pauses += 1
        self.is_paused = False

    def pause(self) -> None:
        """Count the time so far as training, and none from here on until `restart`.

        Without it the stages would add up to more than the steps that they are parts of.
        """
        if not self.is_paused:
            self.training_paused(BETWEEN)
            self.is_paused = True

    def step_ended(self) -> tuple[int, int]:
        """End a step and begin the next with its log; return its time and its data wait, in nanoseconds."""
        times = self.training_paused()
        self.num_steps += 1
        is_due = self.since_ns >= self._cpu_due_ns
        if is_due:
            self._cpu_due_ns = self.since_ns + CPU_TIME_EVERY_NS
        if is_due is not self.has_cpu_time:
            self.read_cpu_time(is_due)  # for one step
        return times

    def training_paused(self, stage: int = LOG) -> tuple[int, int]:
        """Count the time so far as training, and begin anew; return it and its data wait, in nanoseconds."""
        self.enter(stage)
        began_ns, waited_ns, since_ns = self._began_ns, self._waited_ns, self.since_ns
        self._began_ns, self._waited_ns = since_ns, self._wall_ns[DATA_WAIT]
        self.began_s = since_ns / 1e9
        self._train_ns += since_ns - began_ns
        return since_ns - began_ns, self._waited_ns - waited_ns
