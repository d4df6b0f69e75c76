"""What is compared: the baselines, the peers each tuned on the job first, and this project's placements."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from benchmarks.compare import loops, ours, peers
from benchmarks.compare.job import Job
from benchmarks.compare.workloads import Workload

Run = Callable[[Job], None]


class Measured(NamedTuple):
    """One run of a variant.

    Args:
        step_ms: Milliseconds a step, steady.
        first_ms: Milliseconds to the first step.
    """

    step_ms: float
    first_ms: float


def candidates() -> dict[str, dict[str, Run]]:
    """Return what is tuned before it is compared: each family's settings."""
    return {
        "sensible": {f"{n} workers": partial(loops.sensible, num_workers=n) for n in (0, 1, 2, 4)},
        "SPDL": {f"{n} threads": partial(peers.spdl_threads, num_threads=n) for n in (1, 2)},
        "SPDL process": {f"{n} threads": partial(peers.spdl_process, num_threads=n) for n in (1, 2)},
        "nodes": {f"{n} threads": partial(peers.nodes, num_threads=n) for n in (1, 2)},
        "Lightning": {f"{n} workers": partial(peers.lightning, num_workers=n) for n in (0, 2)},
        "Accelerate": {f"{n} workers": partial(peers.accelerate, num_workers=n) for n in (0, 2)},
    }


def fixed(places: Iterable[str] = ours.VARIANTS) -> dict[str, Run]:
    """Return what has nothing to tune: the baseline, the bound, and this project's variants."""
    own = {f"ours {place}": partial(ours.ours, place=place) for place in places}
    return {"textbook": loops.textbook, "headspace": loops.headspace, **own}


def measure(run: Run, workload: Workload, *, is_simulated: bool) -> Measured:
    """Run a variant once, on a model of its own."""
    job = Job(workload, is_simulated=is_simulated)
    run(job)
    found = Measured(job.step_ms, job.first_ms)
    del job
    gc.collect()  # what a loader left behind is not the next one's
    return found


def tune(
    workload: Workload, families: Iterable[str], *, is_simulated: bool
) -> tuple[dict[str, Run], dict[str, str]]:
    """Try each family's settings once on the job; return the best of each, and what it is."""
    chosen: dict[str, Run] = {}
    settings: dict[str, str] = {}
    for family, tried in candidates().items():
        if family not in families:
            continue
        times = {name: measure(run, workload, is_simulated=is_simulated) for name, run in tried.items()}
        settings[family] = min(times, key=lambda name: times[name].step_ms)
        chosen[family] = tried[settings[family]]
    return chosen, settings
