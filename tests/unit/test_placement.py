"""placement=auto: measurements in, decisions out; and the same on a simulated clock, batch by batch."""

from __future__ import annotations

import itertools
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.checks import Limits
from pipeline.errors import ConfigError
from pipeline.inbound.auto import Auto
from pipeline.inbound.decide_placement import INLINE, SWITCHING, TEXTBOOK, Job, Place, best_place, next_trial
from pipeline.inbound.fixed import Pinned

MS = 1e-3
PROCESSES = Place("process", 3), Place("process", 4)
SLOW = {SWITCHING: 30, Place("thread", 2): 30}


class Machine:
    """A job whose time per batch in each place is known, on a clock of its own."""

    def __init__(self, *, fetch_ms, step_ms, core_ms=None, place_ms=None, starts_after=0, fails=False):
        self.fetch_ms, self.step_ms = fetch_ms, step_ms
        self.core_ms = fetch_ms if core_ms is None else core_ms
        self.place_ms = place_ms or {}
        self.now_s, self.starts_after, self.fails = 0.0, starts_after, fails
        self.wanted, self.stopped, self.visited = [], 0, []
        self.is_random_access = self.is_threadable = True
        self.max_processes, self.catch_up_ms = None, 0
        self.pauses, self.validates_every = 0, None
        self.reading = None
        self.late_ms = lambda: 0
        self.limited = Limits()

    def start_processes(self, num_workers, num_threads):
        """Be ready after so many questions."""
        if self.fails:
            raise ConfigError("it does not pickle")
        self.wanted.append(num_workers)
        self.starts_after -= 1
        return self.starts_after < 0

    def limits(self):
        """Have nothing that keeps batches in the loop."""
        return self.limited

    def stop_processes(self):
        """Count; while they make the loop's batches they must not be stopped."""
        assert self.reading is None or self.reading.name != "process"
        self.stopped += 1

    def num_pauses(self):
        """Return how often something else was done."""
        return self.pauses

    def clock(self):
        """Return the time."""
        return self.now_s

    def batches(self, place):
        """Take as long for each batch as this place does."""
        for number in itertools.count():
            if place.name == "process" and number < (self.max_processes or 0):
                self.now_s += self.catch_up_ms * MS
            period_ms = self.place_ms.get(place, self.fetch_ms + self.step_ms)
            self.now_s += max(period_ms - self.step_ms, 0) * MS
            self.now_s += self.late_ms() * MS
            yield "batch"

    def run(self, auto, num_batches):
        """Train on so many batches; return the place of each."""
        places = []
        while len(places) < num_batches:
            self.reading = None
            self.reading = place = auto.choose(self)
            self.visited.append(place)
            for _ in auto.watch(self.batches(place)):
                places.append(place)
                self.now_s += self.step_ms * MS
                if self.validates_every and len(places) % self.validates_every == 0:
                    self.now_s += 1.0
                    self.pauses += 1
                if not auto.goes_on() or len(places) >= num_batches:
                    break
        return places


def make_auto(machine, monkeypatch, *, num_cores=4):
    """Return a chooser on the machine's clock."""
    monkeypatch.setattr("pipeline.inbound.auto.available_cores", lambda: num_cores)
    monkeypatch.setattr(
        "pipeline.inbound.auto.time.thread_time", lambda: machine.now_s * machine.core_ms / machine.fetch_ms
    )
    return Auto(machine, "train_data", machine.clock)


@pytest.mark.parametrize(
    ("job", "place_ms", "chosen"),
    [
        pytest.param({"fetch_ms": 0.05, "step_ms": 10}, {}, TEXTBOOK, id="nothing to gain"),
        pytest.param({"fetch_ms": 10, "step_ms": 10}, {INLINE: 10.4}, INLINE, id="decoding"),
        pytest.param(
            {"fetch_ms": 10, "step_ms": 10},
            {INLINE: 20.5, Place("process", 1): 10.6},
            Place("process", 1),
            id="plain Python",
        ),
        pytest.param(
            {"fetch_ms": 30, "step_ms": 10},
            {INLINE: 41, Place("process", 3): 11},
            Place("process", 3),
            id="much plain Python",
        ),
        pytest.param(
            {"fetch_ms": 80, "step_ms": 10, "core_ms": 2},
            {INLINE: 80, Place("thread", 8): 12, Place("process", 1, 8): 22},
            Place("thread", 8),
            id="latency",
        ),
        pytest.param(
            {"fetch_ms": 80, "step_ms": 10, "core_ms": 8},
            {INLINE: 85, Place("thread", 8): 30, Place("process", 1, 8): 10.6},
            Place("process", 1, 8),
            id="latency and plain Python",
        ),
        pytest.param(
            {"fetch_ms": 80, "step_ms": 10, "core_ms": 8},
            {
                INLINE: 90,
                Place("thread", 8): 60,
                Place("process", 1, 8): 40,
                Place("process", 2, 8): 20,
                Place("process", 4, 8): 11,
            },
            Place("process", 4, 8),
            id="latency that more workers hide",
        ),
        pytest.param(
            {"fetch_ms": 10, "step_ms": 10, "fails": True},
            {INLINE: 20.5, SWITCHING: 17},
            SWITCHING,
            id="plain Python, no processes",
        ),
        pytest.param(
            {"fetch_ms": 10, "step_ms": 10},
            {INLINE: 30, Place("process", 1): 31},
            TEXTBOOK,
            id="nothing helps",
        ),
        pytest.param(
            {"fetch_ms": 10, "step_ms": 10, "fails": True}, {INLINE: 21}, TEXTBOOK, id="no processes"
        ),
        pytest.param(
            {"fetch_ms": 30, "step_ms": 10},
            {INLINE: 33, Place("thread", 3): 14, Place("process", 3): 13.9},
            Place("thread", 3),
            id="as fast is not faster",
        ),
    ],
)
def test_the_best_place_is_found_and_kept(job, place_ms, chosen, monkeypatch):
    """The run ends in the place that is fastest, by more than the noise, and says so."""
    machine = Machine(place_ms=place_ms, **job)
    auto = make_auto(machine, monkeypatch)
    places = machine.run(auto, 3000)
    assert places[-1] == chosen
    assert auto.report.place == str(chosen)
    assert str(chosen) in str(auto.report)
    if chosen.name != "process":
        assert machine.stopped


@pytest.mark.parametrize(
    ("fetch_ms", "core_ms", "place"),
    [
        pytest.param(80, 2, Place("process", 1, 8), id="one process has a GIL to spare"),
        pytest.param(80, 25, Place("process", 3, 3), id="what is no waiting needs three"),
        pytest.param(800, 15, Place("process", 2, 16), id="32 at once are enough"),
        pytest.param(30, 30, Place("process", 3), id="nothing but work: a process each"),
    ],
)
def test_batches_that_wait_are_shared_out_to_few_processes(fetch_ms, core_ms, place):
    """As many are made at once as keep up with a step of 10 ms, where threads beside the loop did not."""
    job = Job(fetch_ms, core_ms, 10, num_cores=4)
    tried = {TEXTBOOK: fetch_ms + 10.0, INLINE: fetch_ms + 9.0}
    while (trial := next_trial(job, tried)) is not None and trial.name == "thread":
        tried[trial] = fetch_ms + 8.0
    assert trial == place


def test_workers_get_no_threads_where_draws_cannot_be_isolated_on_one():
    """They would have to take turns: there are processes alone, one for each core."""
    job = Job(80, 2, 10, num_cores=4, has_threads=False)
    assert next_trial(job, {TEXTBOOK: 90}) == Place("process", 4)


def test_a_place_says_how_many_make_batches():
    """Workers, and their threads if there are several."""
    places = [INLINE, Place("thread", 3), Place("process", 2), Place("process", 2, 4)]
    assert [str(each) for each in places] == [
        "inline",
        "thread × 3",
        "process × 2",
        "process × 2 (4 threads each)",
    ]
    assert [each.num_at_once for each in places] == [1, 3, 2, 8]


def test_nothing_waits_for_processes_to_start(monkeypatch):
    """Until they are there the best place so far makes the batches."""
    machine = Machine(
        fetch_ms=10, step_ms=10, place_ms={INLINE: 20.5, Place("process", 1): 10.6}, starts_after=200
    )
    places = machine.run(make_auto(machine, monkeypatch), 1000)
    first = places.index(Place("process", 1))
    assert set(places[:first]) == {TEXTBOOK, INLINE}
    assert first > 190
    assert places[-1] == Place("process", 1)


def test_a_place_on_trial_is_not_settled(monkeypatch):
    """Nor is the first one, nor one that is used until processes have started; the report says so."""
    machine = Machine(
        fetch_ms=10, step_ms=10, place_ms={INLINE: 20.5, Place("process", 1): 10.6}, starts_after=200
    )
    auto = make_auto(machine, monkeypatch)
    assert "not settled: the first batches" in str(auto.report)
    for num_batches in (40, 60):
        machine.run(auto, num_batches)
        assert not auto.report.is_settled
        assert auto.report.reason.startswith("not settled")
    machine.run(auto, 1000)
    assert auto.report.is_settled
    assert "not settled" not in str(auto.report)


def test_a_slow_trial_ends_at_once(monkeypatch):
    """A place in which a step takes a second is left after two batches."""
    machine = Machine(fetch_ms=10, step_ms=10, place_ms={INLINE: 1000}, fails=True)
    places = machine.run(make_auto(machine, monkeypatch), 500)
    assert places.count(INLINE) <= 4
    assert places[-1] == TEXTBOOK


@pytest.mark.parametrize("inline_ms", [10.5, 12.5])
def test_slow_first_steps_win_no_place(inline_ms, monkeypatch):
    """What wins narrowly against the textbook loop has to win against a second window of it."""
    machine = Machine(fetch_ms=1, step_ms=10, place_ms={**SLOW, INLINE: inline_ms}, fails=True)
    machine.late_ms = lambda: 2 if machine.now_s < 0.15 else 0  # the first window reads 13 ms, not 11
    places = machine.run(make_auto(machine, monkeypatch), 400)
    assert machine.visited.count(TEXTBOOK) >= 2
    assert places[-1] == (INLINE if inline_ms < 11 else TEXTBOOK)


def test_a_lucky_second_of_a_place_wins_nothing(monkeypatch):
    """A place that wins narrowly is timed again, too."""
    machine = Machine(fetch_ms=1, step_ms=10, place_ms={**SLOW, INLINE: 12}, fails=True)
    machine.late_ms = lambda: -1.5 if len(machine.visited) == 2 else 0
    places = machine.run(make_auto(machine, monkeypatch), 400)
    assert machine.visited.count(INLINE) == 2
    assert places[-1] == TEXTBOOK


def test_one_late_batch_of_a_second_window_decides_nothing(monkeypatch):
    """A place whose time is known is not broken off: its last batch alone would stand for it."""
    machine = Machine(fetch_ms=1, step_ms=10, place_ms={**SLOW, INLINE: 12.5}, fails=True)
    late = iter([80])
    machine.late_ms = lambda: (
        (2 if machine.now_s < 0.15 else 0) + (next(late, 0) if machine.visited.count(TEXTBOOK) == 2 else 0)
    )
    auto = make_auto(machine, monkeypatch)
    assert machine.run(auto, 400)[-1] == TEXTBOOK
    assert auto.report.tried_ms["textbook"] < 14
    assert auto.report.fetch_ms < 4  # of the same window


def test_nothing_is_timed_again_while_processes_start(monkeypatch):
    """They import torch on a core that the loop then lacks."""
    machine = Machine(fetch_ms=5, step_ms=10, place_ms={INLINE: 13.2, **dict.fromkeys(PROCESSES, 30)})
    machine.place_ms[Place("process", 1)] = 30
    machine.starts_after = 150
    machine.late_ms = lambda: 6 if machine.starts_after >= 0 and machine.wanted else 0
    auto = make_auto(machine, monkeypatch)
    machine.run(auto, 600)
    assert auto.report.tried_ms["textbook"] == pytest.approx(15, abs=0.5)


def test_a_job_that_changes_is_measured_again(monkeypatch):
    """A disk that becomes slow: what was best is tried again, and not all the time."""
    machine = Machine(fetch_ms=0.1, step_ms=10)
    auto = make_auto(machine, monkeypatch)
    assert machine.run(auto, 2000)[-1] == TEXTBOOK
    machine.fetch_ms, machine.core_ms = 40, 1
    machine.place_ms = {INLINE: 40, Place("thread", 4): 11}
    assert machine.run(auto, 3000)[-1] == Place("thread", 4)
    assert len(machine.visited) < 12


def test_a_choice_made_on_a_busy_machine_is_made_again(monkeypatch):
    """While another program has the cores nothing helps; later the same place is tried again, and kept."""
    machine = Machine(fetch_ms=10, step_ms=10, place_ms={INLINE: 20.5, Place("process", 1): 30})
    auto = make_auto(machine, monkeypatch)
    assert machine.run(auto, 300)[-1] == TEXTBOOK
    machine.place_ms[Place("process", 1)] = 10.6
    assert machine.run(auto, 2000)[-1] == Place("process", 1)


def test_data_in_shards_is_tried_in_as_many_processes(monkeypatch):
    """Reading again first does not make them look slow; once they are chosen, nothing is tried again."""
    machine = Machine(fetch_ms=30, step_ms=10, place_ms={INLINE: 41, **dict.fromkeys(PROCESSES, 16)})
    machine.is_random_access, machine.max_processes, machine.catch_up_ms = False, 4, 5000
    auto = make_auto(machine, monkeypatch)
    assert machine.run(auto, 500)[-1] == PROCESSES[0]
    assert not any(place.name == "thread" or place.num_workers > 4 for place in machine.visited)
    machine.place_ms[PROCESSES[0]] = 100
    assert set(machine.run(auto, 1000)) == {PROCESSES[0]}


def test_an_iterable_of_batches_is_not_tried_in_processes(monkeypatch):
    """Nobody can make one of its batches without the others."""
    machine = Machine(fetch_ms=30, step_ms=10, place_ms={INLINE: 41})
    machine.is_random_access, machine.max_processes = False, 0
    assert machine.run(make_auto(machine, monkeypatch), 500)[-1] == TEXTBOOK
    assert machine.wanted == []


def test_a_dataset_that_threads_cannot_read_goes_to_processes(monkeypatch):
    """A draw that no thread can isolate is met in the middle of a run: batches are made elsewhere."""
    machine = Machine(fetch_ms=10, step_ms=10, place_ms={INLINE: 10.3, Place("process", 1): 10.6})
    auto = make_auto(machine, monkeypatch)
    assert machine.run(auto, 500)[-1] == INLINE
    machine.is_threadable = False
    assert machine.run(auto, 500)[-1] == Place("process", 1)


class PinnedBelt:
    """A belt that is in line for a while; then processes make its batches, and each takes so long."""

    def __init__(self, *, process_ms, in_line=400, is_training=True, later_ms=None):
        self.later_ms = process_ms if later_ms is None else later_ms
        self.process_ms, self.in_line, self.is_training = process_ms, in_line, is_training
        self.is_in_place, self.now_s, self.pauses = False, 0.0, 0

    def run(self, num_batches=2000):
        """Return what was warned of."""
        pinned = Pinned(PROCESSES[0], self, lambda: self.now_s)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for count in (self.in_line, num_batches):
                self.is_in_place = count == num_batches
                for number in pinned.watch(iter(range(count))):
                    process_ms = self.process_ms if number < 1000 else self.later_ms
                    self.now_s += (process_ms if self.is_in_place else 10) * MS
                    if number % 300 == 299:  # a validation
                        self.now_s += 5
                        self.pauses += 1
        return [str(each.message) for each in caught]

    def num_pauses(self):
        """Return how often something else was done."""
        return self.pauses


def test_a_pinned_process_that_hurts_gets_one_warning():
    """It is compared with the batches that the loop thread made while it started."""
    (message,) = PinnedBelt(process_ms=60).run()
    assert "takes 60 ms" in message
    assert "took 10 ms" in message
    assert "placement='auto'" in message


@pytest.mark.parametrize(
    "belt",
    [
        pytest.param(PinnedBelt(process_ms=11), id="as fast"),
        pytest.param(PinnedBelt(process_ms=9, later_ms=60), id="a job that becomes slower later"),
        pytest.param(PinnedBelt(process_ms=60, in_line=30), id="nothing to compare with"),
        pytest.param(PinnedBelt(process_ms=60, is_training=False), id="a loop of the user's own"),
    ],
)
def test_a_pinned_process_is_not_blamed_without_reason(belt):
    """A tenth is no reason, nor are some first batches, nor what a user does between two batches."""
    assert belt.run() == []


@given(
    fetch_ms=st.floats(0.01, 100),
    step_ms=st.floats(0.01, 100),
    core_ratio=st.floats(0, 1),
    num_cores=st.integers(1, 64),
    data=st.data(),
)
def test_trials_end_and_never_choose_what_is_slower(fetch_ms, step_ms, core_ratio, num_cores, data):
    """Whatever the trials give: there are few of them, and the textbook loop is kept if it is best."""
    job = Job(fetch_ms, core_ratio * fetch_ms, step_ms, num_cores)
    tried = {TEXTBOOK: fetch_ms + step_ms}
    while (trial := next_trial(job, tried)) is not None:
        assert trial not in tried
        assert trial.num_at_once <= max(num_cores, 32)
        assert trial.num_workers <= num_cores or trial.name == "thread"
        tried[trial] = data.draw(st.floats(0.01, 300))
        assert len(tried) < 16
    assert tried[best_place(tried)] <= min(tried.values()) * 1.031
    if min(tried.values()) == tried[TEXTBOOK]:
        assert best_place(tried) == TEXTBOOK


def test_a_validation_between_two_steps_is_no_step(monkeypatch):
    """A second every ten steps makes no place look slow, and no job look changed."""
    machine = Machine(fetch_ms=5, step_ms=5, place_ms={INLINE: 5.1})
    machine.validates_every = 10
    auto = make_auto(machine, monkeypatch)
    assert machine.run(auto, 4000)[-1] == INLINE
    assert machine.visited[0] == TEXTBOOK
    assert len(set(machine.visited)) == 2
    assert TEXTBOOK not in machine.visited[1:]
