"""From the sampler's answer to a report, and a report as text and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import sys
import threading
from collections import Counter
from typing import Any

from pipeline.gil import marks
from pipeline.gil.account import GilReport, HoldingFunction, StageShare, doubts_about, stage_shares
from pipeline.gil.cheap_signals import StageTime
from pipeline.gil.sampler.thread_list import ENDED

NUM_FUNCTIONS = 10
MIN_SHOWN_RATIO = 0.005  # of the window: shorter stages are left out of the text
MIN_BLAMED_RATIO = 0.01
IDLE_RATIO = 0.995  # blocked for more than this: named in one line


def make_report(answer: dict[str, Any], backend: str) -> GilReport:
    """Return the report of a window.

    Args:
        answer: Of the sampler's process to ``report``.
        backend: How it was measured.
    """
    wall_s, num_samples = answer["wall_s"], max(answer["num_samples"], 1)
    names = thread_names(answer)
    return GilReport(
        backend=backend,
        python=platform.python_version(),
        wall_s=wall_s,
        num_samples=answer["num_samples"],
        locked_ratio=answer["num_locked"] / num_samples,
        handoffs_per_s=answer["handoffs"] / wall_s,
        switch_interval_s=sys.getswitchinterval(),
        sampler_cpu_ratio=answer["cpu_s"] / wall_s,
        late_p50_us=1e6 * answer["late_p50_s"],
        late_p99_us=1e6 * answer["late_p99_s"],
        is_realtime=answer["is_realtime"],
        stages=stage_shares(answer, names, marks.stage_names),
        functions=_functions(answer, names, wall_s / num_samples),
        times=[],
        doubts=doubts_about(answer, backend),
    )


def make_signals_report(
    why: str, wall_s: float, handoffs_per_s: float | None, times: list[StageTime]
) -> GilReport:
    """Return the report of a window without a sampler.

    Args:
        why: Why there is none.
        wall_s: Length of the window.
        handoffs_per_s: None where they cannot be counted.
        times: Of the stages.
    """
    missing = "held, waiting and blame" + ("" if handoffs_per_s is not None else ", and the hand-offs")
    nan = math.nan
    return GilReport(
        backend="signals",
        python=platform.python_version(),
        wall_s=wall_s,
        num_samples=0,
        locked_ratio=nan,
        handoffs_per_s=nan if handoffs_per_s is None else handoffs_per_s,
        switch_interval_s=sys.getswitchinterval(),
        sampler_cpu_ratio=0.0,
        late_p50_us=nan,
        late_p99_us=nan,
        is_realtime=False,
        stages=[],
        functions=[],
        times=times,
        doubts=[f"{why}: {missing} are missing"],
    )


def thread_names(answer: dict[str, Any]) -> dict[int, str]:
    """Return the names of the threads in an answer of the sampler, by native id."""
    names = {tid: comm or f"thread {tid}" for tid, comm, _, _ in answer["threads"]}
    names[ENDED] = "ended threads"
    names |= {tid: name for tid, name in [*marks.thread_names.items()] if name and tid in names}
    alive = {thread.native_id: thread.name for thread in threading.enumerate() if thread.native_id}
    alive[os.getpid()] = threading.main_thread().name  # after a fork `threading` has its old id
    return names | {tid: name for tid, name in alive.items() if tid in names}


def _functions(answer: dict[str, Any], names: dict[int, str], period_s: float) -> list[HoldingFunction]:
    held: dict[tuple[int, int], list[float]] = {}
    for tid, code, main_waits, count in answer["holders"]:
        times = held.setdefault((tid, code), [0.0, 0.0])
        times[0] += count * period_s
        times[1] += count * period_s * main_waits
    found = [
        HoldingFunction(names.get(tid, f"thread {tid}"), *answer["functions"][str(code)], *times)
        for (tid, code), times in held.items()
    ]
    return sorted(found, key=lambda each: (-each.main_waits_s, -each.held_s))


def to_json(report: GilReport) -> str:
    """Return a report as JSON text, its fields by their names; what is not known is null."""
    fields = {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in dataclasses.asdict(report).items()
    }
    return json.dumps(fields, indent=1, allow_nan=False)


def to_text(report: GilReport) -> str:
    """Return a report as a table for people."""
    lines = [
        f"GIL account of {report.wall_s:.1f} s, Python {report.python}, back end '{report.backend}'",
        *(_sampled_lines(report) if report.num_samples else []),
        *_verdict_lines(report),
        *(f"doubt: {doubt}" for doubt in report.doubts),
    ]
    tables = [_stage_lines(report), _time_lines(report), _function_lines(report)]
    return "\n".join([*lines, *("\n" + "\n".join(table) for table in tables if table)])


def _sampled_lines(report: GilReport) -> list[str]:
    return [
        f"the GIL was held {report.locked_ratio:.0%} of the time and changed hands "
        f"{report.handoffs_per_s:.0f} times a second (switch interval {1e3 * report.switch_interval_s:g} ms)",
        f"{report.num_samples} samples, {report.late_p50_us:.0f} us late, 1 in 100 over "
        f"{report.late_p99_us:.0f} us; the sampler used {report.sampler_cpu_ratio:.1%} of a core"
        + (", with real-time priority" if report.is_realtime else ""),
    ]


def _verdict_lines(report: GilReport) -> list[str]:
    """Say what waiting for the GIL cost the main thread, and who held it."""
    stages = [share for share in report.stages if share.thread == threading.main_thread().name]
    waited = {share.name: share.waiting_ratio * share.time_s for share in stages}
    waited_s = sum(waited.values())
    if waited_s < MIN_BLAMED_RATIO * report.wall_s:
        return ["the main thread did not wait for the GIL"] if stages else []
    blamed: Counter[str] = Counter()
    for share in stages:
        for name, part in share.blame.items():
            blamed[name] += part * waited[share.name]  # type: ignore[assignment]
    top = ", ".join(f"{name} {seconds / waited_s:.0%}" for name, seconds in blamed.most_common(3))
    return [
        f"the main thread waited {waited_s:.2f} s for the GIL, {waited_s / report.wall_s:.0%} of the time; "
        f"it was held by {top}"
    ]


def _stage_lines(report: GilReport) -> list[str]:
    long_enough = [share for share in report.stages if share.time_s >= MIN_SHOWN_RATIO * report.wall_s]
    idle = [share.name for share in long_enough if share.blocked_ratio > IDLE_RATIO]
    shown = [share for share in long_enough if share.blocked_ratio <= IDLE_RATIO]
    if not shown:
        return []
    idle_line = [f"blocked all the time: {', '.join(idle)}"] if idle else []
    width = min(max(len(share.name) for share in shown), 44)
    head = f"{'thread/stage':{width}} {'time s':>8} {'held':>6} {'waits':>6} {'native':>6} {'blocked':>7}"
    return [f"{head}  waits for", *(_stage_line(share, width) for share in shown), *idle_line]


def _stage_line(share: StageShare, width: int) -> str:
    line = (
        f"{share.name[:width]:{width}} {share.time_s:8.2f} {share.held_ratio:6.1%} "
        f"{share.waiting_ratio:6.1%} {share.native_ratio:6.1%} {share.blocked_ratio:7.1%}"
    )
    if share.waiting_ratio < MIN_BLAMED_RATIO:
        return line
    top = [f"{name} {part:.0%}" for name, part in share.blame.items() if part >= 0.05][:3]
    return f"{line}  {', '.join(top)}"


def _time_lines(report: GilReport) -> list[str]:
    if not report.times:
        return []
    lines = [f"{'thread/stage':40} {'wall s':>8} {'on a core':>9}"]
    for each in report.times:
        ratio = each.cpu_s / each.wall_s if each.wall_s else 0.0
        lines.append(f"{each.thread + '/' + each.stage:40} {each.wall_s:8.2f} {ratio:9.1%}")
    return lines


def _function_lines(report: GilReport) -> list[str]:
    if not report.functions:
        return []
    lines = [f"{'holds the GIL: function':62} {'thread':18} {'held s':>7} {'main waits s':>12}"]
    for each in report.functions[:NUM_FUNCTIONS]:
        file = "/".join(each.file.split("/")[-2:])
        where = f"{each.function[-30:]} ({file[-24:]}:{each.line})"
        lines.append(f"{where[:62]:62} {each.thread[:18]:18} {each.held_s:7.2f} {each.main_waits_s:12.2f}")
    return lines
