"""Would a shorter switch interval, or a gate, help where batches are made on a thread?

Baselines: the textbook loop, and the prefetch thread as it is (switch interval 5 ms, no gate); a worker
process beside them. Units: ms a step, and ratios to the textbook loop; above 1, the variant is faster.

    python -m benchmarks.knobs [--only python,balanced] [--rounds 7]

- **switch interval**: how long a thread that wants the GIL waits before it asks for it. It is a setting of
  the whole process, changed here for the length of a run.
- **gate**: keeps the prefetch thread from beginning a sample while the loop thread launches operations, and
  lets it go on during backward, which needs no GIL, and while the loop waits for a batch.

The model and the data are those of `benchmarks.compare`; torch has one intra-op thread.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from benchmarks.compare import loops
from benchmarks.compare.job import Job
from benchmarks.compare.workloads import WORKLOADS, Samples, Workload
from benchmarks.measure import OtherLoad, describe_machine, interleave, median_interval
from pipeline import Loader
from pipeline.settings import Placement

INTERVALS_MS = (5.0, 1.0, 0.1, 0.01)


class Gated(Samples):
    """The same samples, each begun only while the gate is open."""

    def __init__(self, data: Samples, gate: threading.Event) -> None:
        super().__init__(data.make, data.num_samples)
        self.gate = gate

    def __getitem__(self, index: int) -> Any:
        self.gate.wait()
        return self.make(index)


@contextmanager
def switch_interval(ms: float) -> Iterator[None]:
    """Have a thread ask for the GIL after so long."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(ms / 1e3)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def textbook(workload: Workload) -> float:
    """Make a batch, train on it, and read the loss."""
    job = Job(workload, is_simulated=False)
    loops.textbook(job)
    return job.step_ms


def belt(workload: Workload, placement: Placement, interval_ms: float, has_gate: bool = False) -> float:
    """Train on batches of a belt, the loss read at each step; return ms a step."""
    gate, times = threading.Event(), 3 if placement == "process" else 1
    gate.set()
    job = Job(workload, is_simulated=False)
    longer = job.settle_first(times)
    data = Gated(longer.dataset(), gate) if has_gate else longer.dataset()
    with (
        switch_interval(interval_ms),
        Loader(
            data, batch_size=workload.batch_size, collate_fn=workload.collate_fn, placement=placement,
            num_workers=1,
        ) as batches,
    ):  # fmt: skip
        log, step = loops.Log(), 0
        shut, open_ = (gate.clear, gate.set) if has_gate else (_nothing, _nothing)
        for _ in range(workload.num_epochs):
            for batch in batches:
                shut()
                loss = job.forward(job.model, batch)
                open_()
                loss.backward()
                shut()
                job.optimizer.step()
                job.optimizer.zero_grad()
                step += 1
                log.write(job, step, loss)
                open_()
        log.close()
    return job.step_ms


def _nothing() -> None:
    """Leave it as it is."""


def variants(workload: Workload) -> dict[str, Callable[[], float]]:
    """Return what is compared."""
    found: dict[str, Callable[[], float]] = {"textbook": partial(textbook, workload)}
    for interval_ms in INTERVALS_MS:
        found[f"thread, {interval_ms:g} ms"] = partial(belt, workload, "inline", interval_ms)
    for interval_ms in (5.0, 0.1):
        found[f"thread, {interval_ms:g} ms, gate"] = partial(belt, workload, "inline", interval_ms, True)
    return {**found, "process": partial(belt, workload, "process", 5.0)}


def main() -> None:
    """Measure and print a line for each workload and variant."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="python,balanced,numpy,jpeg,collate,nothing", help="workloads")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    loops.one_thread()
    print(describe_machine())
    for workload in WORKLOADS:
        if workload.name not in options.only.split(","):
            continue
        others = OtherLoad()
        times = interleave(variants(workload), options.rounds)
        print(f"{workload.name}: {workload.about} (others took {others.ratio():.0%} of the cores)")
        for name, values in times.items():
            middle, low, high = median_interval(values)
            ratio = median_interval([a / b for a, b in zip(times["textbook"], values, strict=True)])
            print(
                f"  {name:22} {middle:7.2f} ms a step [{low:.2f}, {high:.2f}]  "
                f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}] × textbook",
                flush=True,
            )


if __name__ == "__main__":
    main()
