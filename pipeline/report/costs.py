"""From a run's clocks, and its GIL account if there is one, to what a step costs, stage by stage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.gil import GilReport, StageShare, StageTime
from pipeline.report.ceilings import StepCost
from pipeline.report.record import StageLine

LOOP_STAGES = ("forward", "backward", "optimizer", "log", "callbacks")
MAKING_STAGES = ("fetch", "collate", "transfer")
WAIT = "data_wait"


@dataclass(frozen=True)
class RunClocks:
    """What was timed in a run.

    Args:
        times: Wall and thread time by thread and stage; of the loop's stages, those of training.
        loop_thread: The loop thread's name.
        num_steps: Optimizer steps.
        reads_ahead: Whether batches were made ahead of the loop.
        runs_ahead: Whether the device runs ahead of the host.
        device_ms: Its time a step, where its events told it.
        is_remote: Whether batches come from processes.
        gil: The account of the run.
    """

    times: Sequence[StageTime]
    loop_thread: str
    num_steps: int
    reads_ahead: bool
    runs_ahead: bool = False
    device_ms: float | None = None
    is_remote: bool = False
    gil: GilReport | None = None

    def step_ms(self, stage: str, *, of_loop: bool = True, on_core: bool = False) -> float:
        """Return the milliseconds a step that a stage took, on the loop thread or on all others."""
        found = (
            each.cpu_s if on_core else each.wall_s
            for each in self.times
            if each.stage == stage and (each.thread == self.loop_thread) == of_loop
        )
        return sum(found) / self.num_steps * 1e3

    def ratio(self, kind: str, stages: Iterable[str], *, of_loop: bool) -> float | None:
        """Return the account's share of a kind in these stages; None without an account of them."""
        shares = self._shares(tuple(stages), of_loop)
        if not (total_s := sum(share.time_s for share in shares)):
            return None
        return sum(float(getattr(share, f"{kind}_ratio")) * share.time_s for share in shares) / total_s

    def _shares(self, stages: tuple[str, ...], of_loop: bool) -> list[StageShare]:
        found = [] if self.gil is None else self.gil.stages
        return [
            share
            for share in found
            if share.stage in stages and (share.thread == self.loop_thread) == of_loop
        ]


def step_cost(clocks: RunClocks) -> StepCost | None:
    """Return what a step costs; None if there was none."""
    if not clocks.num_steps:
        return None
    fetch_ms, fetch_core_ms = _fetch_ms(clocks)
    making, of_loop = ((*MAKING_STAGES, WAIT), True) if not clocks.reads_ahead else (MAKING_STAGES, False)
    held, waiting = (clocks.ratio(kind, making, of_loop=of_loop) for kind in ("held", "waiting"))
    loop_ms, loop_held_ms = _loop_ms(clocks)
    return StepCost(
        loop_ms=loop_ms,
        fetch_ms=fetch_ms * (1 - (waiting or 0.0)),
        fetch_core_ms=min(fetch_core_ms, fetch_ms),
        fetch_held_ms=None if held is None else held * fetch_ms,
        loop_held_ms=loop_held_ms,
        device_ms=_device_ms(clocks),
        other_held_ms=_writer_held_ms(clocks),
        is_remote=clocks.is_remote,
    )


def _fetch_ms(clocks: RunClocks) -> tuple[float, float]:
    """Return the time of making a step's batches, and how much of it was on a core."""
    if not clocks.reads_ahead:
        return clocks.step_ms(WAIT), clocks.step_ms(WAIT, on_core=True)
    return (
        sum(clocks.step_ms(stage, of_loop=False) for stage in MAKING_STAGES),
        sum(clocks.step_ms(stage, of_loop=False, on_core=True) for stage in MAKING_STAGES),
    )


def _loop_ms(clocks: RunClocks) -> tuple[float, float | None]:
    """Return the loop's own time, and how much of it holds the GIL."""
    # On a device that runs ahead, the log's time off its core is the wait for the device.
    each = {stage: clocks.step_ms(stage) for stage in LOOP_STAGES}
    if clocks.runs_ahead:
        each["log"] = clocks.step_ms("log", on_core=True)
    loop_ms = sum(each.values())
    waiting = clocks.ratio("waiting", LOOP_STAGES, of_loop=True) or 0.0
    held = clocks.ratio("held", LOOP_STAGES, of_loop=True)
    whole_ms = sum(clocks.step_ms(stage) for stage in LOOP_STAGES)
    return max(loop_ms - waiting * whole_ms, 0.0), None if held is None else held * whole_ms


def _device_ms(clocks: RunClocks) -> float:
    if not clocks.runs_ahead:
        return 0.0
    if clocks.device_ms is not None:
        return clocks.device_ms
    # The textbook loop reads the loss at each step: from the first launch until then the device was busy.
    return sum(clocks.step_ms(stage) for stage in LOOP_STAGES)


def _writer_held_ms(clocks: RunClocks) -> float:
    held = clocks.ratio("held", ("log",), of_loop=False)
    writing_ms = clocks.step_ms("log", of_loop=False)
    return writing_ms * held if held is not None else clocks.step_ms("log", of_loop=False, on_core=True)


def stage_lines(clocks: RunClocks, shown_names: dict[str, str]) -> tuple[StageLine, ...]:
    """Return a line for each stage of training, the loop's first.

    Args:
        clocks: Of the run.
        shown_names: What threads are called in the report, where that is not their own name.
    """
    if not clocks.num_steps:
        return ()
    return tuple(
        StageLine(
            thread=shown_names.get(each.thread, each.thread),
            stage=each.stage,
            step_ms=each.wall_s / clocks.num_steps * 1e3,
            core_ratio=min(each.cpu_s / each.wall_s, 1.0) if each.wall_s else 0.0,
            held_ratio=_of(clocks, each, "held"),
            waiting_ratio=_of(clocks, each, "waiting"),
            hidden_ratio=_hidden_ratio(clocks, each),
        )
        for each in sorted(clocks.times, key=lambda each: each.thread != clocks.loop_thread)
    )


def _of(clocks: RunClocks, time: StageTime, kind: str) -> float | None:
    stages = [time.stage]
    if time.stage == "fetch" or (time.stage == WAIT and not clocks.reads_ahead):
        stages += MAKING_STAGES  # the account has what is nested in it by itself, the clock does not
    return clocks.ratio(kind, dict.fromkeys(stages), of_loop=time.thread == clocks.loop_thread)


def _hidden_ratio(clocks: RunClocks, time: StageTime) -> float | None:
    """Return the share of a stage that cost the loop no wait."""
    if time.thread == clocks.loop_thread or time.stage == "put":
        return None
    if time.stage not in MAKING_STAGES:
        return 1.0
    if not clocks.reads_ahead:
        return None  # of a place that was tried and left, nobody knows
    fetch_ms = _fetch_ms(clocks)[0]
    return max(0.0, 1 - clocks.step_ms(WAIT) / fetch_ms) if fetch_ms else None
