"""From counts to shares, to text, JSON and a trace; marks and clocks."""

from __future__ import annotations

import json
import math
import pickle
import threading

import pytest

from pipeline.gil import cheap_signals as signals
from pipeline.gil import marks, stage, stage_cell, stage_id, to_json, to_text
from pipeline.gil.account import doubts_about, stage_shares, wilson_interval
from pipeline.gil.cheap_signals import StageClock
from pipeline.gil.report import make_report, make_signals_report
from pipeline.gil.sampler.states import StateReader
from pipeline.gil.trace import chrome_trace


def answer(**changes):
    """An answer of the sampler: thread 7 in stage 1 held 60 %, waited 20 %, ran 10 %, was blocked 10 %."""
    return {
        "num_samples": 1000,
        "num_locked": 800,
        "num_unknown_holder": 0,
        "handoffs": 100,
        "wall_s": 2.0,
        "cpu_s": 0.1,
        "late_p50_s": 0.00002,
        "late_p99_s": 0.0001,
        "is_realtime": True,
        "period_s": 0.001,
        "counts": [
            [7, 1, "H", 0, 0, 500],
            [7, 1, "h", 0, 0, 100],
            [7, 1, "W", 8, 2, 150],
            [7, 1, "w", 0, 0, 50],
            [7, 1, "N", 0, 0, 100],
            [7, 1, "B", 0, 0, 100],
        ],
        "holders": [[8, 4096, 1, 150], [8, 4096, 0, 50]],
        "functions": {"4096": ["tokenize", "/x/tok.py", 3]},
        "threads": [[7, "python", 0.0, 0.0], [8, "pt_autograd_0", 0.0, 0.0]],
        **changes,
    }


NAMES, STAGES = {7: "main", 8: "rival"}, {1: "forward", 2: "fetch"}


def test_counts_become_shares():
    """Awake or asleep, held is held and waiting is waiting; who held meanwhile is blamed."""
    (share,) = stage_shares(answer(), NAMES, STAGES)
    ratios = (share.held_ratio, share.waiting_ratio, share.native_ratio, share.blocked_ratio)
    assert ratios == pytest.approx((0.6, 0.2, 0.1, 0.1))
    assert share.name == "main/forward"
    assert share.time_s == pytest.approx(2.0)
    assert share.blame == pytest.approx({"rival/fetch": 0.75, "nobody": 0.25})
    assert share.held_low < 0.6 < share.held_high


def test_an_unknown_state_counts_for_nothing():
    """A thread that ended in the middle of a sample takes no part in the shares."""
    counts = [[7, 1, "H", 0, 0, 50], [7, 1, "U", 0, 0, 50]]
    (share,) = stage_shares(answer(counts=counts), NAMES, STAGES)
    assert share.held_ratio == 1


def test_shares_agree_with_the_time_on_a_core():
    """A sampler that comes late sees too much sleep; the kernel knows how long the thread was runnable."""
    counts = [[7, 1, "N", 0, 0, 300], [7, 1, "W", 8, 0, 700]]
    threads = [[7, "python", 2.0, 1.8], [8, "python", 2.0, 1.0]]
    (share,) = stage_shares(answer(counts=counts, threads=threads), NAMES, STAGES)
    assert share.native_ratio == pytest.approx(0.9)
    assert share.waiting_ratio == pytest.approx(0.1)


def test_the_interval_is_wilsons():
    """Checked against a table: 8 of 10, and the limits."""
    assert wilson_interval(0.8, 10) == pytest.approx((0.490, 0.943), abs=0.001)
    assert wilson_interval(0.0, 100)[0] == 0
    assert wilson_interval(1.0, 100)[1] == pytest.approx(1)
    assert wilson_interval(0.5, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("changes", "backend", "doubt"),
    [
        ({"num_samples": 20}, "waiters", "only 20 samples"),
        ({"num_samples": 500}, "waiters", "only 250 a second"),
        ({"late_p99_s": 0.003}, "waiters", "3.0 ms late"),
        ({"num_unknown_holder": 80}, "waiters", "10% of the time"),
        ({}, "held", "waiting counts as blocked"),
        ({}, "counts", "another blocked thread"),
        ({}, "no-gil", "the GIL is off"),
    ],
)
def test_doubts_are_said(changes, backend, doubt):
    """What makes a figure unsure stands in the report."""
    assert doubt in doubts_about(answer(**changes), backend)[0]


def test_a_sound_window_has_no_doubts():
    """Nothing is said where there is nothing to say."""
    assert doubts_about(answer(), "waiters") == []


def test_functions_have_the_time_that_main_waited():
    """Samples become seconds."""
    (function,) = make_report(answer(), "waiters").functions
    assert (function.function, function.thread) == ("tokenize", "pt_autograd_0")
    assert (function.held_s, function.main_waits_s) == pytest.approx((0.4, 0.3))


def test_threads_of_one_name_are_taken_together():
    """A prefetch thread of each epoch is one line."""
    counts = [[7, 1, "H", 0, 0, 30], [8, 1, "B", 0, 0, 10]]
    (share,) = stage_shares(answer(counts=counts), {7: "prefetch", 8: "prefetch"}, STAGES)
    assert (share.thread, share.num_samples, share.held_ratio) == ("prefetch", 40, 0.75)


def test_text_and_json_have_what_was_found():
    """A table for people, the same for programs."""
    report = make_report(answer(), "waiters")
    text = to_text(report)
    assert "held 80% of the time" in text
    assert "tokenize (x/tok.py:3)" in text
    read = json.loads(to_json(report))
    assert read["stages"][0]["held_ratio"] == pytest.approx(0.6)
    assert read["backend"] == "waiters"


def test_what_is_not_known_is_null():
    """NaN is no JSON."""
    report = make_signals_report("no /proc", 1.0, None, [])
    assert math.isnan(report.locked_ratio)
    assert json.loads(to_json(report))["locked_ratio"] is None
    assert "no /proc" in to_text(report)


def test_a_missing_stage_is_named():
    """As a KeyError that says what was asked for."""
    with pytest.raises(KeyError, match="no stage 'backward'"):
        make_report(answer(), "waiters").stage("main", "backward")


def test_a_trace_has_lanes_for_threads_stages_and_the_gil():
    """Changes become slices; awake or asleep is one state; the last ones end with the window."""
    events = [
        [0, 7, "B", 1],
        [100, 7, "H", 1],
        [150, 7, "h", 1],
        [300, 7, "W", 2],
        [300, 8, "H", 0],
        [500, 8, "U", 0],
    ]
    trace = chrome_trace({"events": events, "end_us": 1000}, NAMES, STAGES)["traceEvents"]
    lanes = {each["tid"]: each["args"]["name"] for each in trace if each["ph"] == "M"}
    slices = [(lanes[e["tid"]], e["name"], e["ts"], e["dur"]) for e in trace if e["ph"] == "X"]
    assert ("main", "held", 100, 200) in slices
    assert ("main", "waiting", 300, 700) in slices
    assert ("GIL held by", "main", 100, 200) in slices
    assert ("GIL held by", "rival", 300, 200) in slices
    assert ("main: stage", "forward", 0, 300) in slices
    assert ("main: stage", "fetch", 300, 700) in slices
    assert len(slices) == 8


def test_stages_nest_and_come_back():
    """Leaving a block, by an exception too, brings back the stage around it."""
    cell, outer, inner = stage_cell(), stage("outer"), stage("inner")
    before = cell[0]
    with outer:
        with pytest.raises(ValueError, match="x"), inner:
            assert cell[0] == stage_id("inner")
            raise ValueError("x")
        assert cell[0] == stage_id("outer")
    assert cell[0] == before


def test_a_stage_goes_to_another_process_by_name():
    """Where its number is another."""
    copied = pickle.loads(pickle.dumps(stage("travels")))
    assert (copied.name, copied._id) == ("travels", stage_id("travels"))


def test_a_stage_decorates_a_function():
    """As `with` around its body."""

    @stage("decorated")
    def work():
        return stage_cell()[0]

    assert work() == stage_id("decorated")


def test_each_thread_has_a_stage_of_its_own():
    """One stage object serves several threads at once."""
    shared, seen = stage("shared"), []
    with shared:
        thread = threading.Thread(target=lambda: seen.append(stage_cell()[0]))
        thread.start()
        thread.join()
    assert seen == [0]


def test_rows_of_ended_threads_are_used_again():
    """More threads than rows, one after the other, all get one."""
    cells = []

    def work():
        with stage("row"):
            cells.append(marks._marks.row[0])

    for _ in range(marks.MAX_MARKED_THREADS + 20):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert max(cells) < marks.VERSION_AT


class FakeTime:
    """Two clocks that a test sets."""

    def __init__(self, monkeypatch):
        self.wall_ns = self.cpu_ns = 0
        monkeypatch.setattr(signals, "perf_counter_ns", lambda: self.wall_ns)
        monkeypatch.setattr(signals, "thread_time_ns", lambda: self.cpu_ns)

    def pass_by(self, wall_s, cpu_s):
        self.wall_ns += int(wall_s * 1e9)
        self.cpu_ns += int(cpu_s * 1e9)


def test_a_clock_adds_up_its_stages(monkeypatch):
    """Wall time of all turns; thread time of those measured, scaled up to all."""
    now = FakeTime(monkeypatch)
    clock = StageClock(("wait", "work"))
    now.pass_by(1, 0)
    clock.enter(1)
    now.pass_by(2, 1)
    clock.enter(0)
    clock.read_cpu_time(False)
    now.pass_by(1, 0)
    clock.enter(1)
    now.pass_by(4, 4)
    clock.leave()
    wait, work = clock.times()
    assert (wait.stage, wait.wall_s, wait.cpu_s) == ("wait", 2, 0)
    assert (work.stage, work.wall_s, work.cpu_s) == ("work", 6, 3)
    assert clock.off_core_s([1]) == 3


def test_a_clock_marks_its_stage_and_gives_the_old_one_back():
    """The sampler sees the same stages."""
    cell = stage_cell()
    with stage("around"):
        clock = StageClock(("first", "second"))
        assert cell[0] == stage_id("first")
        clock.enter(1)
        assert cell[0] == stage_id("second")
        clock.leave()
        assert cell[0] == stage_id("around")


class FakeThread:
    """A thread whose kernel state a test sets."""

    def __init__(self, tstate, line):
        self.tstate, self.line = tstate, line

    def state_line(self, name):
        return self.line


class FakeMemory:
    """Memory in which the flags of some thread states are set."""

    def __init__(self, requesting=()):
        self.requesting = requesting

    def read(self, address, size):
        return (1 if address in self.requesting else 0).to_bytes(size, "little")


def read_states(threads, holder, *, waiters=0, requested=0, requesting=(), knows_calls=True):
    reader = StateReader(FakeMemory(requesting), 0, (1000, 1200), [(0, 2)], requested)
    reader.knows_calls, reader._file = knows_calls, "syscall" if knows_calls else "stat"
    reader._futex = b"202"
    snapshot = (2 + 8 * waiters).to_bytes(4, "little")
    return [*reader.read(threads, holder, snapshot).values()]


RUNS, ELSEWHERE, ON_GIL = b"running\n", b"202 0x9999 0x80 0x0\n", b"202 0x410 0x80 0x0\n"


@pytest.mark.parametrize(
    ("lines", "waiters", "states"),
    [
        ([RUNS, RUNS], 0, "HN"),
        ([ELSEWHERE, ELSEWHERE], 0, "hB"),
        ([RUNS, ON_GIL], 1, "HW"),
        ([RUNS, RUNS], 1, "Hw"),
        ([RUNS, b""], 0, "HU"),
        ([RUNS, b"7 0x1 0x2\n"], 0, "HB"),
    ],
)
def test_states_from_system_calls_and_the_count_of_waiters(lines, waiters, states):
    """A futex inside the GIL is waiting; a waiter just woken looks as if it ran, and the count tells."""
    threads = [FakeThread(number + 1, line) for number, line in enumerate(lines)]
    assert "".join(read_states(threads, 1, waiters=waiters)) == states


def test_states_without_system_calls():
    """With no right to trace, sleepers are waiters as far as the count goes."""
    threads = [FakeThread(1, b"1 (a b) R 0"), FakeThread(2, b"2 (c) S 0"), FakeThread(3, b"3 (d) S 0")]
    assert sorted(read_states(threads, 1, waiters=1, knows_calls=False)) == ["B", "H", "W"]


def test_states_from_the_published_flag():
    """CPython 3.15 says itself who waits for the GIL."""
    threads = [FakeThread(1, RUNS), FakeThread(2, ON_GIL), FakeThread(3, RUNS), FakeThread(4, ON_GIL)]
    states = read_states(threads, 1, requested=100, requesting=(102, 103))
    assert "".join(states) == "HWwB"
