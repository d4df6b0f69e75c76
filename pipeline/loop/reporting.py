"""The report of a run that has ended: gathered from its clocks, written to its folder, shown."""

from __future__ import annotations

import datetime
import platform
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch.utils.data import DataLoader

from pipeline.concurrency import available_cores
from pipeline.data import IterableSource, ShardedSource, Source
from pipeline.device import StepLimiter
from pipeline.errors import listed, warn_harmlessly
from pipeline.loop.findings import finding_of, outside_notes, outside_s
from pipeline.loop.run import Run
from pipeline.loop.schedule import Belts
from pipeline.protocols import RunInfo
from pipeline.ranks import is_rank_zero
from pipeline.report.ceilings import WHERE, Ceiling, StepCost, Where, ceilings, predict_all
from pipeline.report.costs import WAIT, RunClocks, stage_lines, step_cost
from pipeline.report.lanes import lanes_of_trace, make_lanes, make_series, write_trace
from pipeline.report.outbound_report import OutboundReport
from pipeline.report.page.render import to_html
from pipeline.report.placement_report import PlacementReport
from pipeline.report.possible import ONE_CORE, DataKind, Possible, places_of
from pipeline.report.record import Gain, Lane, RunReport, to_dict, to_json
from pipeline.report.verdict import TRIALS, advise, binding_of, describe, describe_ceiling, lift
from pipeline.settings import Placement

NOT_TRAINING = ("setup", "validate", "checkpoint", "between")
HOW_TO_LEARN_MORE = (
    "who holds the GIL, and who waits for it, was not measured: Trainer(gil='account') does, and lays it "
    "over the lanes"
)


def make_report(run: Run, belts: Belts, outbound: OutboundReport, train_data: Any) -> RunReport:
    """Return the report of a run.

    Args:
        run: It has ended.
        belts: Of the run.
        outbound: What taking the numbers away cost.
        train_data: What the user passed; a DataLoader with workers makes its batches elsewhere.
    """
    settings, journal, num_steps = run.settings, run.journal, run.clock.num_steps
    device = [] if run.limiter is None else _device_stretches(run, run.limiter)
    placement, num_cores = belts.placement, available_cores()
    where = next(each for each in WHERE if each == placement.name)
    clocks = RunClocks(
        times=[each for each in [*run.clock.times(), *belts.times.times] if each.stage not in NOT_TRAINING],
        loop_thread=threading.current_thread().name,
        num_steps=num_steps,
        reads_ahead=where in ("inline", "thread"),
        runs_ahead=belts.backend.streams is not None,
        device_ms=_mean_ms(device),
        is_remote=where == "process" or bool(_own_workers(train_data)),
        gil=run.gil.report,
    )
    cost, gain = step_cost(clocks), None if belts.meter is None else belts.meter.gain()
    cost = _undisturbed(_as_measured(cost, placement, settings.accumulate_grad_batches), belts)
    is_settled = placement.is_settled or gain is not None
    is_auto = settings.placement == "auto" and settings.schedule == "auto"
    settable = set() if is_auto else {"textbook", *get_args(Placement)}
    possible = replace(
        _possible(belts, train_data, clocks, run.callbacks.times()),
        has_free_cores=num_cores > max(placement.num_workers, _own_workers(train_data), 1),
        has_tried=is_auto and is_settled,
        restarts_workers=not getattr(train_data, "persistent_workers", True),
    )
    cores = {
        "num_cores": num_cores,
        "num_workers": min(filter(None, (settings.num_workers or num_cores, possible.max_workers))),
        "threads_per_worker": settings.threads_per_worker,
    }
    chosen = {"num_workers": placement.num_workers, "threads_per_worker": placement.threads_per_worker}
    # What a batch costs is not known here while worker processes make them.
    is_known = is_settled and where != "process" and len(placement.tried_ms) < 2  # times are better
    everywhere = () if cost is None or not is_known else predict_all(cost, **cores)
    predictions = tuple(each for each in everywhere if each.where in possible.places | {where})
    bounds = () if cost is None or not is_settled else ceilings(cost, where, **cores | chosen)
    step_ms = run.clock.train_s / num_steps * 1e3 if num_steps else 0.0
    wait_ms = clocks.step_ms(WAIT) if num_steps else 0.0
    names = {clocks.loop_thread: "loop"}
    if gain is not None and belts.meter is not None:
        step_ms, wait_ms = gain.overlap_ms, belts.meter.overlap_wait_ms()  # the textbook windows left out
    found = finding_of(run, placement) if gain is None else None
    trials = TRIALS if gain is None and len(placement.tried_ms) > 1 else ""
    described = describe(step_ms, wait_ms, cost, where, gain, possible) + trials
    advised = advise(step_ms, cost, where, predictions, settable, gain, possible, bounds)
    return RunReport(
        facts=_facts(run, belts, where, num_cores),
        settings=_settings(journal.loggers.info),
        metrics=dict(journal.last_values) | {k: v for row in run.history for k, v in row.values.items()},
        step_ms=step_ms,
        data_wait_ms=wait_ms,
        samples_per_s=run.num_samples / run.clock.train_s if run.clock.train_s else 0.0,
        stages=stage_lines(clocks, names),
        cost=cost,
        ceilings=bounds,
        ceiling=_ceiling(step_ms, bounds, where, possible),
        predictions=predictions,
        gain=gain,
        verdict=described if found is None else found.verdict,
        advice=_advice(placement.obstacle, advised) if found is None else found.advice,
        placement=placement,
        series=make_series(journal.step_s, journal.wait_s, run.state.step - num_steps),
        lanes=_lanes(run, belts, device, names),
        notes=(
            *_belt_notes(belts, gain),
            *outside_notes(run),
            *str(outbound).splitlines(),
            *_gil_notes(run),
        ),
    )


def _own_workers(train_data: Any) -> int:
    return train_data.num_workers if isinstance(train_data, DataLoader) else 0


def _kind(source: Source, train_data: Any) -> DataKind:
    if _own_workers(train_data):
        return "workers"
    if isinstance(source, ShardedSource):
        return "shards"
    return "iterable" if isinstance(source, IterableSource) else "map"


def _possible(belts: Belts, train_data: Any, clocks: RunClocks, callbacks_s: Mapping[str, float]) -> Possible:
    """Return where this run's batches could be made, and what of a step is no training."""
    kind = _kind(source := belts.training_source, train_data)
    draws, limits = listed(source.unhookable), belts.training_limits
    obstacle = belts.placement.obstacle or (ONE_CORE if available_cores() == 1 else "")
    places, obstacles = places_of(kind, draws, obstacle, limits)
    # On a device that runs ahead, a log that reads waits for the device: that is no time of the log's.
    parts = ("callbacks",) if clocks.runs_ahead else ("log", "callbacks")
    found = kind, places, obstacles
    return Possible(
        *found,
        len(source.shards) if isinstance(source, ShardedSource) else None,
        {part: clocks.step_ms(part) for part in parts} if clocks.num_steps else {},
        max(callbacks_s, key=callbacks_s.__getitem__, default=""),
        limits.remedy,
    )


def _ceiling(step_ms: float, bounds: tuple[Ceiling, ...], where: Where, possible: Possible) -> str:
    if not bounds:
        return ""
    bound = binding_of(bounds)
    return describe_ceiling(step_ms, bounds, lift(bound.name, where, possible, bound.step_ms))


def _advice(obstacle: str, found: str) -> str:
    """Return the advice, or why what promised most could not be tried, where there is no better."""
    obstacle = obstacle.replace(", or set placement=thread", "")  # auto has tried threads, if they promised
    return found if found.startswith("no placement") else obstacle or found


def publish(report: RunReport, settings: Any, run_dir: Path | None) -> None:
    """Write a run's report to its folder, and show it where a bar is shown; never ends a run badly."""
    if not report.facts["num_steps"]:
        return  # a run that had ended before: its report stays
    try:
        if run_dir is not None:
            (run_dir / "report.json").write_text(to_json(report))
            (run_dir / "report.html").write_text(to_html([(run_dir.name, to_dict(report))]))
            write_trace(run_dir / "trace.json", report.lanes)
    except OSError as error:
        warn_harmlessly(f"the report could not be written: {error}")
    if settings.enable_progress_bar and not settings.fast_dev_run and is_rank_zero() and report.stages:
        where = "" if run_dir is None else f"\nreport   {run_dir / 'report.html'}"
        print(f"\n{report}{where}", file=sys.stderr)


def _settings(info: RunInfo) -> dict[str, Any]:
    """Return the Trainer's settings by name, behind what else describes the run, such as ``optim.lr``."""
    others = {name: value for name, value in info.hparams.items() if name != "trainer"}
    return {**replace(info, hparams=others).flat_hparams(), **info.hparams["trainer"]}


def _facts(run: Run, belts: Belts, where: Where, num_cores: int) -> dict[str, Any]:
    return {f"{stage}_s": spent_s for stage, spent_s in outside_s(run).items()} | {
        "ended": datetime.datetime.now().isoformat(sep=" ", timespec="seconds"),
        "schedule": belts.schedule,
        "placement": where,
        "seed": str(run.settings.seed),  # of 64 bits, which a browser's numbers do not have
        "is_seed_given": run.is_seed_given,
        "device": "simulated" if "Simulated" in type(belts.backend).__name__ else str(belts.device),
        "num_steps": run.clock.num_steps,
        "num_epochs": run.state.epoch,
        "train_s": run.clock.train_s,
        "stop_reason": run.interrupted_by or run.stop_reason,
        "handoffs_per_step": run.gil.handoffs_per_step(run.clock.num_steps),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "num_cores": num_cores,
        "num_intra_op_threads": torch.get_num_threads(),
        "switch_interval_ms": sys.getswitchinterval() * 1e3,
    }


def _as_measured(cost: StepCost | None, placement: PlacementReport, num_batches: int) -> StepCost | None:
    """Return the cost with what `auto` has measured of a batch by itself: the run was in several places."""
    if cost is None or placement.fetch_ms is None or placement.fetch_core_ms is None:
        return cost
    fetch_ms, fetch_core_ms = placement.fetch_ms * num_batches, placement.fetch_core_ms * num_batches
    return replace(cost, fetch_ms=fetch_ms, fetch_core_ms=fetch_core_ms, is_remote=False)


def _lanes(
    run: Run, belts: Belts, device: Sequence[tuple[str, int, int]], names: Mapping[str, str]
) -> tuple[Lane, ...]:
    if run.gil.trace is not None:
        return lanes_of_trace(run.gil.trace, names)
    stretches: dict[str, Sequence[tuple[str, int, int]]] = {"loop": _loop_stretches(run)}
    return make_lanes(stretches | belts.times.stretches | {"device": device})


def _loop_stretches(run: Run) -> list[tuple[str, int, int]]:
    """Return each of the last steps as its wait for a batch and the rest."""
    found = []
    for done in run.journal.recent:
        end_ns = int(done.ended_s * 1e9)
        begin_ns = end_ns - done.step_ns
        there_ns = begin_ns + done.data_wait_ns
        found += [("data_wait", begin_ns, there_ns), ("step", there_ns, end_ns)]
    return found


def _device_stretches(run: Run, limiter: StepLimiter) -> list[tuple[str, int, int]]:
    """Return when the device was busy with each of the last steps, as its events say.

    A step begins on the device when the one before it is done, but not before the loop has its batch.
    Gaps between the kernels of one step count as busy.
    """
    now_ns, ages_s = limiter.ages()
    ends_ns = [now_ns - int(age_s * 1e9) for age_s in ages_s]
    recent = [*run.journal.recent]
    pairs = list(zip(reversed(ends_ns), reversed(recent), strict=False))[::-1]
    found: list[tuple[str, int, int]] = []
    before_ns = 0
    for end_ns, done in pairs:
        launched_ns = int(done.ended_s * 1e9) - done.step_ns + done.data_wait_ns
        if before_ns and end_ns > (begin_ns := max(before_ns, launched_ns)):
            found.append(("step", begin_ns, end_ns))
        before_ns = end_ns
    return found


def _mean_ms(stretches: Sequence[tuple[str, int, int]]) -> float | None:
    if not stretches:
        return None
    return sum(end - begin for _, begin, end in stretches) / len(stretches) / 1e6


def _undisturbed(cost: StepCost | None, belts: Belts) -> StepCost | None:
    """Take the time of a fetch from the textbook windows, if there were any: nothing ran beside it there."""
    alone_ms = None if belts.meter is None else belts.meter.textbook_fetch_ms()
    if cost is None or alone_ms is None or not cost.fetch_ms or cost.is_remote:
        return cost
    scale = alone_ms / cost.fetch_ms
    held_ms = None if cost.fetch_held_ms is None else cost.fetch_held_ms * scale
    return replace(cost, fetch_ms=alone_ms, fetch_core_ms=cost.fetch_core_ms * scale, fetch_held_ms=held_ms)


def _belt_notes(belts: Belts, gain: Gain | None) -> tuple[str, ...]:
    place = str(belts.placement)
    if belts.meter is None:
        return (place,)
    if gain is None:
        return (
            place,
            "measure_gain: the run or its epochs were too short to tell; it takes some hundred steps, and "
            "epochs of more than one window",
        )
    return (
        place,
        f"measure_gain: {gain.num_windows} windows of each schedule, {gain.steps_per_window} steps counted "
        f"in each of overlap; {belts.meter.textbook_ratio:.0%} of the steps meanwhile were textbook ones, "
        "and the stages above have both kinds in them",
    )


def _gil_notes(run: Run) -> tuple[str, ...]:
    report = run.gil.report
    if report is None:
        return (HOW_TO_LEARN_MORE,)
    doubts = tuple(f"doubt: {doubt}" for doubt in report.doubts)
    held = f"the GIL was held {report.locked_ratio:.0%} of the time"
    return (held, *doubts) if report.num_samples else doubts
