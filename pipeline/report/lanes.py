"""Who did what when: the lanes of the page, and the same as a trace for Perfetto and Chrome."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.report.record import Lane, Series

MAX_SEGMENTS = 6000  # of all lanes together: some 200 kB of page
MIN_WINDOW_MS = 1.0
NUM_POINTS = 300
GIL_LANE, STAGE_MARK = "GIL held by", ": stage"


def make_lanes(segments: Mapping[str, Sequence[tuple[str, int, int]]]) -> tuple[Lane, ...]:
    """Return lanes of the time that the first of them covers, or of the end of it if that is too much.

    Args:
        segments: By lane; each ``(what, begin, end)`` in nanoseconds of one clock, in order.
    """
    filled = {name: list(each) for name, each in segments.items() if each}
    if not filled:
        return ()
    end_ns = max(each[-1][2] for each in filled.values())
    first = next(iter(filled.values()))
    begin_ns = min(
        max(first[0][1], _begin_for(filled)), first[-1][1]
    )  # with a step in it, whatever came after
    begin_ns = min(begin_ns, end_ns - int(MIN_WINDOW_MS * 1e6))
    lanes = (Lane(name, "stages", _cut(each, begin_ns)) for name, each in filled.items())
    return tuple(lane for lane in lanes if lane.segments)


def _begin_for(filled: Mapping[str, Sequence[tuple[str, int, int]]]) -> int:
    """Return from when on there are at most `MAX_SEGMENTS`."""
    begins = sorted((begin for each in filled.values() for _, begin, _ in each), reverse=True)
    return begins[min(len(begins), MAX_SEGMENTS) - 1]


def _cut(segments: Sequence[tuple[str, int, int]], begin_ns: int) -> tuple[tuple[str, float, float], ...]:
    return tuple(
        (what, max(begin - begin_ns, 0) / 1e6, (end - begin_ns) / 1e6)
        for what, begin, end in segments
        if end > begin_ns and end > begin
    )


def lanes_of_trace(trace: Mapping[str, Any], shown_names: Mapping[str, str]) -> tuple[Lane, ...]:
    """Return the lanes of a sampler's trace, its last moments: for each thread its states and its stages.

    Args:
        trace: In Chrome's JSON format, as `pipeline.gil.trace` makes it.
        shown_names: What threads are called in the report, where that is not their own name.
    """
    names: dict[int, str] = {}
    found: dict[int, list[tuple[str, float, float]]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "M":
            names[event["tid"]] = event["args"]["name"]
        elif event["ph"] == "X":
            found[event["tid"]].append((event["name"], event["ts"], event["ts"] + event["dur"]))
    begin_us = _last_moments(found)
    lanes: dict[tuple[str, str], list[tuple[str, float, float]]] = defaultdict(list)
    for number, name in names.items():
        thread, mark, _ = name.partition(STAGE_MARK)
        # Threads of one name follow one another, as those of the epochs do.
        lanes[shown_names.get(thread, thread), "stages" if mark or name == GIL_LANE else "states"] += (
            (shown_names.get(what, what), max(begin - begin_us, 0) / 1e3, (end - begin_us) / 1e3)
            for what, begin, end in found[number]
            if end > begin_us
        )
    return tuple(
        Lane(name, kind, tuple(sorted(each, key=lambda segment: segment[1])))
        for (name, kind), each in lanes.items()
        if {what for what, _, _ in each} - {"blocked"}
    )


def _last_moments(found: Mapping[int, Sequence[tuple[str, float, float]]]) -> float:
    begins = sorted((begin for each in found.values() for _, begin, _ in each), reverse=True)
    return begins[min(len(begins), MAX_SEGMENTS) - 1] if begins else 0.0


def make_series(step_s: Sequence[float], wait_s: Sequence[float], first_step: int) -> Series:
    """Return the run over time, in at most some hundred points.

    Args:
        step_s: Each step's seconds.
        wait_s: Each step's seconds of waiting for batches.
        first_step: The steps that were made before the first of these.
    """
    count = len(step_s)
    each = max(1, -(-count // NUM_POINTS))
    at_s, steps, step_ms, data_wait_ms, now_s = [], [], [], [], 0.0
    for begin in range(0, count, each):
        spent, waited = step_s[begin : begin + each], wait_s[begin : begin + each]
        now_s += sum(spent)
        at_s.append(now_s)
        steps.append(first_step + begin + len(spent))
        step_ms.append(sum(spent) / len(spent) * 1e3)
        data_wait_ms.append(sum(waited) / len(waited) * 1e3)
    return Series(tuple(at_s), tuple(steps), tuple(step_ms), tuple(data_wait_ms))


def write_trace(path: Path, lanes: Sequence[Lane]) -> None:
    """Write the lanes as a trace; open it at ui.perfetto.dev or in chrome://tracing.

    Source:
        "Trace Event Format", the Chrome project's description of its JSON.
    """
    events: list[dict[str, Any]] = []
    for number, lane in enumerate(lanes):
        name = {"name": "thread_name", "args": {"name": lane.name}}
        events.append({"ph": "M", "pid": 1, "tid": number} | name)
        events += [
            {"ph": "X", "pid": 1, "tid": number, "name": what, "ts": 1e3 * begin, "dur": 1e3 * (end - begin)}
            for what, begin, end in lane.segments
        ]
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
