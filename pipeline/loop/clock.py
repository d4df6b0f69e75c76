"""Where the loop thread's time goes, stage by stage, and step by step."""

from __future__ import annotations

from pipeline.gil.signals import StageClock

SETUP, DATA_WAIT, FORWARD, BACKWARD, OPTIMIZER, LOG, VALIDATE, CHECKPOINT = range(8)
COMPUTE_STAGES = (FORWARD, BACKWARD, OPTIMIZER)
CPU_TIME_EVERY_N_STEPS = 8  # reading it costs as much as the rest of the loop's own work
STAGES = ("setup", "data_wait", "forward", "backward", "optimizer", "log", "validate", "checkpoint")


class StepClock(StageClock):
    """Times the loop's stages, and steps from one end to the next.

    Attributes:
        num_steps: Steps ended so far.
        began_s: When the step under way began, by `time.perf_counter`.
        train_s: All time so far that was training: without validations and checkpoints.

    Runs on:
        Loop thread; a change of stage takes some 0.2 µs.
    """

    def __init__(self) -> None:
        super().__init__(STAGES)
        self.train_s = 0.0
        self._began_ns, self._waited_ns = self.since_ns, 0
        self.began_s = self.since_ns / 1e9
        self.num_steps = 0

    def restart(self) -> None:
        """Begin a step now, and wait for its first batch: what came before was no training."""
        self.enter(DATA_WAIT)
        self._began_ns, self._waited_ns = self.since_ns, self.wall_ns(DATA_WAIT)
        self.began_s = self.since_ns / 1e9

    def step_ended(self) -> tuple[float, float]:
        """End a step and begin the next with its log; return its time and its data wait, in seconds."""
        times = self.training_paused()
        self.num_steps += 1
        if (turn := self.num_steps % CPU_TIME_EVERY_N_STEPS) < 2:
            self.read_cpu_time(turn == 0)  # for one step
        return times

    def training_paused(self) -> tuple[float, float]:
        """Count the time so far as training, and begin anew; return it and its data wait, in seconds."""
        self.enter(LOG)
        step_s = (self.since_ns - self._began_ns) / 1e9
        waited_ns = self.wall_ns(DATA_WAIT)
        data_wait_s = (waited_ns - self._waited_ns) / 1e9
        self._began_ns, self._waited_ns = self.since_ns, waited_ns
        self.began_s = self.since_ns / 1e9
        self.train_s += step_s
        return step_s, data_wait_s
