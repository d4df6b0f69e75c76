"""The account: for each thread and stage, the share of its time held, waiting, native and blocked."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from pipeline.gil.cheap_signals import StageTime
from pipeline.gil.sampler.states import BLOCKED, HELD, HELD_ASLEEP, NATIVE, WAITING, WAITING_AWAKE

LATE_S = 0.001
FEW_SAMPLES = 100
MIN_STRATUM = 30
KIND_OF_STATE = {
    HELD: "held",
    HELD_ASLEEP: "held",
    WAITING: "waiting",
    WAITING_AWAKE: "waiting",
    NATIVE: "native",
    BLOCKED: "blocked",
}
_RUNNABLE = (HELD, WAITING_AWAKE, NATIVE)


@dataclass(frozen=True)
class StageShare:
    """What a thread did in one of its stages.

    Args:
        thread: The thread's name. Threads of one name are taken together.
        stage: The stage's name; empty outside of any.
        time_s: Seconds spent there, of all threads of that name.
        num_samples: Samples that say so.
        held_ratio: Share of them with the GIL.
        waiting_ratio: Share of them waiting for the GIL.
        native_ratio: Share of them running without the GIL, or ready to run.
        blocked_ratio: Share of them blocked elsewhere: a lock, a queue, a file, a device.
        held_low: Lower end of the 95 % interval of `held_ratio`.
        held_high: Upper end of it.
        blame: Who held the GIL while this one waited, as shares of its waiting, by ``thread`` or
            ``thread/stage``.
    """

    thread: str
    stage: str
    time_s: float
    num_samples: int
    held_ratio: float
    waiting_ratio: float
    native_ratio: float
    blocked_ratio: float
    held_low: float
    held_high: float
    blame: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Thread and stage, as they stand in `blame`."""
        return f"{self.thread}/{self.stage}" if self.stage else self.thread


@dataclass(frozen=True)
class HoldingFunction:
    """A Python function, innermost on the stack of the thread that holds the GIL.

    Args:
        thread: The thread that ran it.
        function: Its qualified name.
        file: Where it is defined.
        line: Where it begins.
        held_s: Seconds that it held the GIL.
        main_waits_s: Seconds of them in which the main thread waited for it.
    """

    thread: str
    function: str
    file: str
    line: int
    held_s: float
    main_waits_s: float


@dataclass(frozen=True)
class GilReport:
    """One window of the account.

    Args:
        backend: How it was measured, one of `pipeline.gil.measuring.sampler_client.BACKENDS`, or ``signals``.
        python: Version of the interpreter.
        wall_s: Length of the window.
        num_samples: Samples taken.
        locked_ratio: Share of the time in which some thread held the GIL.
        handoffs_per_s: How often the GIL went to another thread; NaN where that cannot be read.
        switch_interval_s: What `sys.getswitchinterval` said.
        sampler_cpu_ratio: Processor time of the sampler, as a share of one core.
        late_p50_us: By how much half of the samples came later than they were meant to.
        late_p99_us: By how much one in a hundred did.
        is_realtime: Whether the sampler has real-time priority, which it asks for when it comes late.
        stages: One for each thread and stage, the longest first.
        functions: Those that held the GIL longest.
        times: Wall and thread time of the blocks of `stage`, where there is no sampler.
        doubts: What to hold against the figures, in words; empty if nothing.
    """

    backend: str
    python: str
    wall_s: float
    num_samples: int
    locked_ratio: float
    handoffs_per_s: float
    switch_interval_s: float
    sampler_cpu_ratio: float
    late_p50_us: float
    late_p99_us: float
    is_realtime: bool
    stages: list[StageShare]
    functions: list[HoldingFunction]
    times: list[StageTime]
    doubts: list[str]

    def stage(self, thread: str, stage: str = "") -> StageShare:
        """Return the share of a thread's stage.

        Raises:
            KeyError: If it has none of that name.
        """
        for share in self.stages:
            if (share.thread, share.stage) == (thread, stage):
                return share
        raise KeyError(f"no stage {stage!r} of a thread {thread!r} was sampled")


def wilson_interval(share: float, count: float) -> tuple[float, float]:
    """Return the 95 % interval of a share of `count` independent samples.

    Source:
        E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if count <= 0:
        return 0.0, 1.0
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share))  # but for rounding


def stage_shares(
    answer: dict[str, Any], thread_names: dict[int, str], stage_names: dict[int, str]
) -> list[StageShare]:
    """Turn the sampler's counts into shares.

    Args:
        answer: Of the sampler's process to ``report``.
        thread_names: By native id.
        stage_names: By number.
    """
    weights = _weights(answer)
    cells: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    blame: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    raw: Counter[tuple[str, str]] = Counter()
    for tid, stage, state, holder, holder_stage, count in answer["counts"]:
        where, kind = (thread_names[tid], stage_names.get(stage, "")), KIND_OF_STATE.get(state, "unknown")
        raw[where] += count
        weighted = count * weights[tid][state in _RUNNABLE]
        cells[where][kind] += weighted
        if kind == "waiting":
            name = thread_names.get(holder, "another thread") if holder else "nobody"
            name += f"/{stage_names.get(holder_stage, holder_stage)}" if holder_stage else ""
            blame[where][name] += weighted
    period_s = answer["wall_s"] / max(answer["num_samples"], 1)
    shares = [_share(where, found, raw[where], period_s, blame[where]) for where, found in cells.items()]
    return sorted(shares, key=lambda share: -share.time_s)


def _share(
    name: tuple[str, str],
    found: dict[str, float],
    num_samples: int,
    period_s: float,
    blame: dict[str, float],
) -> StageShare:
    known = sum(count for kind, count in found.items() if kind != "unknown") or 1.0
    held_ratio = found.get("held", 0.0) / known
    low, high = wilson_interval(held_ratio, num_samples)
    waited = sum(blame.values())
    return StageShare(
        thread=name[0],
        stage=name[1],
        time_s=sum(found.values()) * period_s,
        num_samples=num_samples,
        held_ratio=held_ratio,
        waiting_ratio=found.get("waiting", 0.0) / known,
        native_ratio=found.get("native", 0.0) / known,
        blocked_ratio=found.get("blocked", 0.0) / known,
        held_low=low,
        held_high=high,
        blame={who: count / waited for who, count in sorted(blame.items(), key=lambda item: -item[1])},
    )


def _weights(answer: dict[str, Any]) -> dict[int, tuple[float, float]]:
    """Return for each thread the weights of its samples asleep and runnable.

    Where every core is busy, the sampler gets its turn when somebody goes to sleep, and so sees too
    much sleep. The kernel knows exactly how long each thread was on a core or waited for one: the
    samples are weighted so that they agree with it (post-stratification).
    """
    seen: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for tid, _, state, _, _, count in answer["counts"]:
        seen[tid][state in _RUNNABLE] += count
    weights: dict[int, tuple[float, float]] = defaultdict(lambda: (1.0, 1.0))
    for tid, _, observed_s, runnable_s in answer["threads"]:
        asleep, runnable = seen[tid]
        if min(asleep, runnable) < MIN_STRATUM or observed_s < 0.5:
            continue
        truth = min(max(runnable_s / observed_s, 0.0), 1.0)
        total = asleep + runnable
        weights[tid] = ((1 - truth) * total / asleep, truth * total / runnable)
    return weights


def doubts_about(answer: dict[str, Any], backend: str) -> list[str]:
    """Return what to hold against the figures of a window."""
    doubts = []
    if answer["num_samples"] < FEW_SAMPLES:
        doubts.append(f"only {answer['num_samples']} samples: let it run longer")
    elif answer["num_samples"] * answer["period_s"] < 0.5 * answer["wall_s"]:
        doubts.append(
            f"{len(answer['threads'])} threads: a sample took so long that there were only "
            f"{answer['num_samples'] / answer['wall_s']:.0f} a second"
        )
    if answer["late_p99_s"] > LATE_S:
        doubts.append(
            f"one sample in a hundred came {1e3 * answer['late_p99_s']:.1f} ms late, since no core was free: "
            "waiting may be wrong by more than 5 points"
        )
    unknown = answer["num_unknown_holder"] / max(answer["num_locked"], 1)
    if unknown > 0.02:
        doubts.append(f"{unknown:.0%} of the time the GIL was held by a thread that could not be named")
    if backend == "no-gil":
        doubts.append("the GIL is off: there is no held and no waiting, only running and blocked")
    if backend == "held":
        doubts.append("who waits for the GIL cannot be seen here: waiting counts as blocked")
    if backend == "counts":
        doubts.append("system calls cannot be seen here: waiting may be booked to another blocked thread")
    return doubts
