"""This project, in each of its placements."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from typing import Any, get_args

from benchmarks.compare.job import Job
from benchmarks.compare.workloads import Workload
from pipeline import Callback, Every, FitResult, StepFinished, Trainer
from pipeline.report.ceilings import StepCost, predict_all
from pipeline.settings import Placement

PLACES = tuple(each for each in ("inline", "thread", "process") if each in get_args(Placement))
VARIANTS = ("textbook", *PLACES, "auto")

SETTLING_TIMES = 5  # as many times as long as what is measured, so that a slow start is a small part
SETTLING_S = 10.0  # `auto` tries places, and processes start; steady state comes after


class Settled(Callback):
    """Has a job measured once it has run for some seconds, and ends it then."""

    every = Every(steps=8)

    def __init__(self, job: Job) -> None:
        self.job, self.is_measuring = job, False

    def on_step_finished(self, event: StepFinished) -> None:
        if self.job.is_over:
            event.stop("measured")
        elif not self.is_measuring and time.perf_counter() - self.job.made_s > SETTLING_S:
            self.is_measuring = True
            self.job.measure_now()


def settings(place: str) -> dict[str, Any]:
    """Return what to type for a place."""
    if place == "textbook":
        return {"schedule": "textbook"}
    if place == "auto":
        return {}
    return {"schedule": "overlap", "placement": place}


def ours(job: Job, place: str, settling_times: int = 1, **further: Any) -> FitResult:
    """Train with every step's loss logged, as it always is; measure the last part of so many."""
    callbacks = []
    if place in ("auto", "process") and not job.workload.counts_start:
        workload = job.settle_until_told()
        callbacks.append(Settled(job))
    else:
        workload = job.settle_first(settling_times)

    def step(model: Any, batch: Any) -> Any:
        loss = job.forward(model, batch)
        return {"loss": loss, **job.further(loss)} if workload.num_logged else loss

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=workload.num_epochs, device=job.device or "cpu", run_dir=folder,
            enable_progress_bar=False, enable_checkpointing=False, **settings(place), **further,
        )  # fmt: skip
        job.restart()
        return trainer.fit(
            job.model, job.optimizer, workload.dataset(), step=step, batch_size=workload.batch_size,
            collate_fn=workload.collate_fn, callbacks=callbacks,
        )  # fmt: skip


def predict(workload: Workload, *, is_simulated: bool) -> dict[str, float]:
    """Return what each placement is predicted to take, from two textbook runs: one timed, one sampled.

    The sampler of the account slows down what maps and unmaps much memory, such as `numpy`; what share of the
    time holds the GIL is not changed by that.
    """
    # Long, since their first steps are slow, and are in the means.
    timed, sampled = (
        ours(Job(workload, is_simulated=is_simulated), "textbook", SETTLING_TIMES, gil=mode).report
        for mode in ("signals", "account")
    )
    if timed.cost is None or sampled.cost is None:
        return {}
    num_cores = timed.facts["num_cores"]
    cost = _with_held(timed.cost, sampled.cost)
    found = predict_all(cost, num_cores=num_cores, num_workers=num_cores)
    return {each.where: each.step_ms for each in found}


def _with_held(timed: StepCost, sampled: StepCost) -> StepCost:
    """Return the cost as timed, the GIL held for the shares of it that the account has seen."""

    def share(held_ms: float | None, sampled_ms: float, timed_ms: float) -> float | None:
        return None if held_ms is None or not sampled_ms else held_ms / sampled_ms * timed_ms

    return replace(
        timed,
        fetch_held_ms=share(sampled.fetch_held_ms, sampled.fetch_ms, timed.fetch_ms),
        loop_held_ms=share(sampled.loop_held_ms, sampled.loop_ms, timed.loop_ms),
        other_held_ms=sampled.other_held_ms,
    )
