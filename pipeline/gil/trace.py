"""The account over time, as a trace that Perfetto and Chrome show: lanes for threads and for the GIL."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.gil.account import KIND_OF_STATE

GIL_LANE = 0
COLORS = {
    "held": "thread_state_running",
    "waiting": "terrible",
    "native": "good",
    "blocked": "thread_state_sleeping",
}


@dataclass(frozen=True)
class Segment:
    """A stretch of time in which a thread did one thing.

    Args:
        thread: Its native id.
        what: ``held``, ``waiting``, ``native`` or ``blocked``; or a stage's name.
        begin_us: From the beginning of the window.
        end_us: From the beginning of the window.
    """

    thread: int
    what: str
    begin_us: int
    end_us: int


def state_segments(events: list[Any], end_us: int) -> list[Segment]:
    """Return the stretches of each thread's states, from the changes that the sampler noted."""
    changes = ((at_us, tid, KIND_OF_STATE.get(state, "")) for at_us, tid, state, _ in events)
    return list(_segments(changes, end_us))


def stage_segments(events: list[Any], end_us: int, stage_names: dict[int, str]) -> list[Segment]:
    """Return the stretches of each thread's stages."""
    changes = ((at_us, tid, stage_names.get(stage, "")) for at_us, tid, _, stage in events)
    return list(_segments(changes, end_us))


def _segments(changes: Iterable[tuple[int, int, str]], end_us: int) -> Iterator[Segment]:
    open_since: dict[int, tuple[int, str]] = {}
    for at_us, tid, what in changes:
        begin_us, before = open_since.get(tid, (at_us, ""))
        if what == before:
            continue
        if before:
            yield Segment(tid, before, begin_us, at_us)
        open_since[tid] = (at_us, what)
    for tid, (begin_us, what) in open_since.items():
        if what:
            yield Segment(tid, what, begin_us, end_us)


def chrome_trace(
    answer: dict[str, Any], thread_names: dict[int, str], stage_names: dict[int, str]
) -> dict[str, Any]:
    """Return a trace in Chrome's JSON format.

    Args:
        answer: Of the sampler's process to ``trace``.
        thread_names: By native id.
        stage_names: By number.

    Source:
        "Trace Event Format", the Chrome project's description of its JSON.
    """
    states = state_segments(answer["events"], answer["end_us"])
    stages = stage_segments(answer["events"], answer["end_us"], stage_names)
    order = {
        tid: number for number, tid in enumerate(dict.fromkeys(tid for _, tid, _, _ in answer["events"]))
    }
    found = [_lane("GIL held by", GIL_LANE)]
    for tid, number in order.items():
        name = thread_names.get(tid, f"thread {tid}")
        found += [_lane(name, _state_lane(number)), _lane(f"{name}: stage", _state_lane(number) + 1)]
    for each in states:
        found.append(_slice(each, each.what, _state_lane(order[each.thread])) | {"cname": COLORS[each.what]})
        if each.what == "held":
            found.append(_slice(each, thread_names.get(each.thread, f"thread {each.thread}"), GIL_LANE))
    found += [
        _slice(each, each.what, _state_lane(order[each.thread]) + 1)
        for each in stages
        if each.thread in order
    ]
    return {"traceEvents": found, "displayTimeUnit": "ms"}


def write_trace(path: Path, trace: dict[str, Any]) -> None:
    """Write a trace; open it at ui.perfetto.dev or in chrome://tracing."""
    path.write_text(json.dumps(trace))


def _state_lane(number: int) -> int:
    return 1 + 2 * number


def _lane(name: str, lane: int) -> dict[str, Any]:
    return {"ph": "M", "pid": 1, "tid": lane, "name": "thread_name", "args": {"name": name}}


def _slice(segment: Segment, name: str, lane: int) -> dict[str, Any]:
    duration_us = segment.end_us - segment.begin_us
    return {"ph": "X", "pid": 1, "tid": lane, "ts": segment.begin_us, "dur": duration_us, "name": name}
