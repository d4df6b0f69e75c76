"""Is the Trainer slower than the textbook loop? The two take turns, so that a slow spell hits both.

Baseline: the textbook loop of `benchmarks.compare`, with the same model, data and log. Unit: its time for
a turn over the Trainer's for the next one; above 1, the Trainer is faster. On a machine whose speed changes
by a tenth from second to second, whole runs cannot tell a hundredth; neighbours of some 50 ms can.

    python -m benchmarks.duel [--only tiny,logging,nothing] [--rounds 5] [--turns 40] [--steps 40]

One of the two waits, without the GIL, while the other trains; the first steps of each turn are left out.
Where a model's memory happens to lie makes some per cent, so each round has new models, and the textbook
loop duels with itself beside it: what that is off from 1 is no fault of the Trainer. torch has one intra-op
thread. What overlap would win is not counted: this is for jobs where there is nothing to gain.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.compare import loops, ours
from benchmarks.compare.job import Job
from benchmarks.compare.variants import Run
from benchmarks.compare.workloads import WORKLOADS, Workload
from benchmarks.measure import OtherLoad, describe_machine, interleave, median_interval

WARM_STEPS = 8
SKIPPED_TURNS = 10  # the first ones: everything is done for the first time, and `auto` looks around


class Baton:
    """One of two threads runs, the other waits."""

    def __init__(self) -> None:
        self._turns = (threading.Semaphore(1), threading.Semaphore(0))
        self._is_over = False

    def wait(self, side: int) -> None:
        """Wait for one's turn."""
        if not self._is_over:
            self._turns[side].acquire()

    def pass_on(self, side: int) -> None:
        """Let the other go on, and wait until it passes back."""
        self._turns[1 - side].release()
        self.wait(side)

    def drop(self, side: int) -> None:
        """Leave; nobody waits any more."""
        self._is_over = True
        self._turns[1 - side].release()


class Dueller(Job):
    """A job that passes the baton on every so many steps, and times its turns."""

    def __init__(self, workload: Workload, baton: Baton, side: int, num_steps: int) -> None:
        super().__init__(workload, is_simulated=False)
        self._baton, self._side, self._turn_steps = baton, side, num_steps
        self._count, self._warm_s = 0, 0.0
        self.turns_ms: list[float] = []

    def forward(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """Return the loss; before it, look whose turn it is."""
        place, now_s = self._count % self._turn_steps, time.perf_counter()
        if place == 0 and self._count:
            self.turns_ms.append((now_s - self._warm_s) / (self._turn_steps - WARM_STEPS) * 1e3)
            self._baton.pass_on(self._side)
        elif place == WARM_STEPS:
            self._warm_s = now_s
        self._count += 1
        return super().forward(model, batch)


def duel(workload: Workload, run: Run, num_turns: int, num_steps: int) -> list[float]:
    """Return how many times as fast a loop was as the textbook loop, turn by turn."""
    num_batches = (num_turns + SKIPPED_TURNS) * num_steps + 1
    longer = replace(workload, num_batches=num_batches, num_epochs=1, counts_start=True)  # no more than those
    baton = Baton()
    textbook, other = (Dueller(longer, baton, side, num_steps) for side in (0, 1))

    def run_textbook() -> None:
        baton.wait(0)
        try:
            loops.textbook(textbook)
        finally:
            baton.drop(0)

    def run_other() -> None:
        baton.wait(1)
        try:
            run(other)
        finally:
            baton.drop(1)

    with ThreadPoolExecutor(2) as pool:  # neither is the main thread, which gets its memory elsewhere
        for done in [pool.submit(run_textbook), pool.submit(run_other)]:
            done.result()
    pairs = zip(textbook.turns_ms[SKIPPED_TURNS:], other.turns_ms[SKIPPED_TURNS:], strict=False)
    return [base / own for base, own in pairs]


def main() -> None:
    """Let them take turns, and print a line for each workload."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="tiny,logging,nothing", help="workloads")
    parser.add_argument("--rounds", type=int, default=5, help="with new models each")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--steps", type=int, default=40, help="of a turn")
    options = parser.parse_args()
    loops.one_thread()
    print(describe_machine())
    runs: dict[str, Run] = {
        "textbook loop": loops.textbook,
        "Trainer, textbook": partial(ours.ours, place="textbook"),
        "Trainer, auto": partial(ours.ours, place="auto"),
    }
    for workload in WORKLOADS:
        if workload.name not in options.only.split(","):
            continue
        others = OtherLoad()
        medians = {
            name: partial(_median_of_duel, workload, run, options.turns, options.steps)
            for name, run in runs.items()
        }
        found = interleave(medians, options.rounds)
        print(f"{workload.name}: {workload.about} (others took {others.ratio():.0%} of the cores)")
        for name, ratios in found.items():
            middle, low, high = median_interval(ratios)
            print(f"  {name:18} {middle:.3f} [{low:.3f}, {high:.3f}] times as fast", flush=True)


def _median_of_duel(*arguments: Any) -> float:
    return statistics.median(duel(*arguments))


if __name__ == "__main__":
    main()
