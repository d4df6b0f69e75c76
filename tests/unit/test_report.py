"""What a run says of itself: ceilings and predictions from fed measurements, the verdict, lanes, JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pipeline import ConfigError, SimulatedBackend, Trainer
from pipeline.gil.account import StageShare
from pipeline.gil.cheap_signals import StageTime
from pipeline.gil.report import make_signals_report
from pipeline.report.__main__ import main
from pipeline.report.ceilings import StepCost, ceilings, headspace_ms, predict, predict_all
from pipeline.report.compare import differing_settings, find_runs, to_table
from pipeline.report.costs import RunClocks, stage_lines, step_cost
from pipeline.report.lanes import MAX_SEGMENTS, NUM_POINTS, lanes_of_trace, make_lanes, make_series
from pipeline.report.plots import HAS_MATPLOTLIB
from pipeline.report.record import Gain, RunReport, load, to_json
from pipeline.report.verdict import advise, describe

PYTHON = StepCost(loop_ms=16, fetch_ms=16, fetch_core_ms=16, fetch_held_ms=16, loop_held_ms=4)
DECODE = StepCost(loop_ms=16, fetch_ms=12, fetch_core_ms=12, fetch_held_ms=1, loop_held_ms=4)
LATENCY = StepCost(loop_ms=16, fetch_ms=64, fetch_core_ms=1, fetch_held_ms=1, loop_held_ms=4)
READY = StepCost(loop_ms=16, fetch_ms=0.1, fetch_core_ms=0.1, fetch_held_ms=0.1, loop_held_ms=4)
ALL = ("textbook", "inline", "thread", "process")


def step_ms(cost, where, **keywords):
    return predict(cost, where, **{"num_cores": 2} | keywords).step_ms


def fit(hparams=None, **settings):
    """Train a small model and return what came of it."""
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randint(0, 3, (64,)))
    model = torch.nn.Linear(8, 3)
    trainer = Trainer(**{"max_epochs": 2, "run_dir": "run", "enable_progress_bar": False} | settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return trainer.fit(model, optimizer, data, loss_fn=F.cross_entropy, batch_size=8, hparams=hparams)


@pytest.mark.parametrize(
    ("cost", "where", "binds"),
    [
        (replace(PYTHON, device_ms=40), "inline", "device"),
        (DECODE, "inline", "loop"),
        (DECODE, "textbook", "serial"),
        (replace(PYTHON, loop_held_ms=15), "inline", "gil"),
        (replace(PYTHON, fetch_core_ms=60, fetch_ms=60, fetch_held_ms=0), "process", "belt"),
        (LATENCY, "inline", "belt"),
    ],
)
def test_the_binding_ceiling_comes_first(cost, where, binds):
    """Device, loop, serial, GIL or belt, by the figures fed."""
    found = ceilings(cost, where, num_cores=2)
    assert found[0].name == binds
    assert [each.step_ms for each in found] == sorted((each.step_ms for each in found), reverse=True)


def test_all_cores_together_are_a_ceiling():
    """Work of the host over the cores, whatever does it."""
    busy = replace(DECODE, fetch_core_ms=60, fetch_ms=60)
    assert ceilings(busy, "process", num_cores=2, num_workers=8)[0].name == "host"
    assert ceilings(busy, "process", num_cores=8, num_workers=8)[0].name == "loop"


def test_what_holds_the_gil_is_won_in_a_process_alone():
    """A balanced pure-Python loader: a thread wins nothing, a process nearly twice."""
    textbook = step_ms(PYTHON, "textbook")
    assert textbook == pytest.approx(32)
    assert step_ms(PYTHON, "inline") == pytest.approx(32, rel=0.01)
    assert step_ms(PYTHON, "thread", num_workers=4) == pytest.approx(32, rel=0.01)
    assert step_ms(PYTHON, "process") == pytest.approx(16, rel=0.02)


def test_what_releases_the_gil_is_hidden_by_a_thread():
    """A thread hides a decode; the more of it holds the GIL, the more is added to the step."""
    assert step_ms(DECODE, "inline") == pytest.approx(16.1, rel=0.01)
    assert step_ms(replace(DECODE, fetch_held_ms=6), "inline") == pytest.approx(19, rel=0.01)


def test_latency_is_divided_by_the_workers():
    """One thread waits 64 ms for its batch, two 32, four no longer than the step."""
    assert step_ms(LATENCY, "inline") == pytest.approx(64)
    assert step_ms(LATENCY, "thread", num_workers=4) == pytest.approx(16, rel=0.01)
    assert step_ms(LATENCY, "process", num_workers=2) == pytest.approx(32)
    assert step_ms(LATENCY, "process", num_workers=2, threads_per_worker=2) == pytest.approx(16, rel=0.01)


def test_threads_of_a_worker_hold_its_gil_in_turn():
    """However many there are, a batch takes as long as it holds the GIL of its process; two halve that."""
    waiting = replace(LATENCY, fetch_core_ms=40, fetch_held_ms=40)
    assert step_ms(waiting, "process", num_cores=8, threads_per_worker=8) == pytest.approx(40)
    assert step_ms(waiting, "process", num_cores=8, num_workers=2, threads_per_worker=8) == pytest.approx(20)
    unknown = replace(waiting, fetch_held_ms=None)
    found = predict(unknown, "process", num_cores=8, threads_per_worker=8)
    assert (found.low_ms, found.high_ms) == (pytest.approx(16, rel=0.01), pytest.approx(40))


def test_a_device_that_is_slower_than_the_host_hides_the_host():
    """The loop's wait for the GIL eats its slack first."""
    slow = replace(PYTHON, loop_ms=2, device_ms=40)
    assert step_ms(slow, "inline") == pytest.approx(40)
    assert step_ms(slow, "textbook") == pytest.approx(56)
    assert headspace_ms(slow) == 40


def test_without_an_account_the_prediction_is_a_range():
    """Between a fetch that never holds the GIL and one that always does."""
    found = predict(replace(PYTHON, fetch_held_ms=None, loop_held_ms=None), "inline", num_cores=2)
    assert found.low_ms == pytest.approx(16, rel=0.01)
    assert found.high_ms == pytest.approx(32, rel=0.01)
    assert "gil" not in {each.name for each in found.ceilings}


def test_batches_from_elsewhere_have_two_places():
    """A DataLoader with workers has processes of its own."""
    places = predict_all(replace(PYTHON, is_remote=True), num_cores=2)
    assert [each.where for each in places] == ["textbook", "inline"]
    assert places[1].step_ms == pytest.approx(16, rel=0.01)


# ---- from clocks to costs


def share(thread, stage, time_s, held, waiting):
    rest = 1 - held - waiting
    return StageShare(thread, stage, time_s, 1000, held, waiting, rest, 0.0, 0.0, 1.0, {})


def account(*shares):
    report = make_signals_report("", 10.0, 0.0, [])
    return replace(report, stages=list(shares), num_samples=1000, backend="waiters")


TIMES = [
    StageTime("MainThread", "data_wait", 0.1, 0.0),
    StageTime("MainThread", "forward", 1.0, 1.0),
    StageTime("MainThread", "log", 0.5, 0.1),
    StageTime("prefetch", "fetch", 2.0, 1.5),
    StageTime("prefetch", "put", 1.0, 0.0),
    StageTime("writer", "log", 0.2, 0.1),
]


def clocks(**values):
    return RunClocks(
        **{"times": TIMES, "loop_thread": "MainThread", "num_steps": 100, "reads_ahead": True} | values
    )


def test_costs_come_from_the_clocks():
    """Per step, the loop's wait left out, the belt's fetch apart."""
    cost = step_cost(clocks())
    assert cost.loop_ms == pytest.approx(15)
    assert cost.fetch_ms == pytest.approx(20)
    assert cost.fetch_core_ms == pytest.approx(15)
    assert cost.fetch_held_ms is None
    assert cost.device_ms == 0


def test_in_textbook_the_data_wait_is_the_fetch():
    """The loop makes its batches itself."""
    times = [StageTime("MainThread", "data_wait", 1.0, 0.9), StageTime("MainThread", "forward", 2.0, 2.0)]
    cost = step_cost(clocks(times=times, reads_ahead=False))
    assert cost.fetch_ms == pytest.approx(10)
    assert cost.loop_ms == pytest.approx(20)


def test_the_account_takes_waiting_out_and_says_what_is_held():
    """A stage's time by itself is what is left without its waiting for the GIL."""
    gil = account(share("prefetch", "fetch", 2.0, 0.5, 0.25), share("MainThread", "forward", 1.0, 0.25, 0.5))
    cost = step_cost(clocks(gil=gil))
    assert cost.fetch_ms == pytest.approx(15)
    assert cost.fetch_held_ms == pytest.approx(10)
    assert cost.loop_ms == pytest.approx(7.5)
    assert cost.loop_held_ms == pytest.approx(3.75)


def test_on_a_device_that_runs_ahead_its_wait_is_not_the_loops_work():
    """The log's time off its core is the wait for the device."""
    cost = step_cost(clocks(runs_ahead=True, device_ms=30.0))
    assert cost.loop_ms == pytest.approx(11)
    assert cost.device_ms == 30


def test_a_line_for_each_stage_says_what_was_hidden():
    """The loop's first; 1 of 20 ms of fetch made the loop wait."""
    lines = stage_lines(clocks(), {"MainThread": "loop"})
    assert lines[0].thread == "loop"
    fetch = next(line for line in lines if line.stage == "fetch")
    assert fetch.hidden_ratio == pytest.approx(0.95)
    assert next(line for line in lines if line.stage == "put").hidden_ratio is None


def test_a_run_without_a_step_has_no_cost():
    """And no line."""
    assert step_cost(clocks(num_steps=0)) is None
    assert stage_lines(clocks(num_steps=0), {}) == ()


# ---- in words


def gain(ratio, low, high):
    return Gain(ratio, low, high, 32.0, 32.0 / ratio, 16.0, 20, 8)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (gain(1.9, 1.85, 1.95), "a gain: 1.90 times"),
        (gain(1.01, 0.97, 1.04), "no gain to be told from chance"),
        (gain(0.8, 0.75, 0.85), "a loss"),
    ],
)
def test_the_verdict_on_a_measured_gain_is_honest(found, words):
    """A gain, a loss, or nothing that can be told from chance."""
    assert words in describe(16.0, 0.1, PYTHON, "inline", found)


def test_nothing_to_gain_is_a_verdict():
    """Where batches are there when they are wanted."""
    words = describe(16.1, 0.1, READY, "textbook", None)
    assert words.startswith("nothing to gain from loading")
    assert advise(16.1, READY, "textbook", predict_all(READY, num_cores=2), ALL, None) == ""


def test_the_share_of_the_possible_gain():
    """From the textbook step to the step with its batch there; none where there is nothing to win."""
    assert gain(2.0, 1.9, 2.1).won_ratio == pytest.approx(1.0)
    assert gain(32 / 24, 1.2, 1.4).won_ratio == pytest.approx(0.5)
    assert replace(gain(1.0, 0.99, 1.01), headspace_ms=31.9).won_ratio is None


@pytest.mark.parametrize(
    ("cost", "where", "settable", "words"),
    [
        (PYTHON, "textbook", ALL, "placement='process'"),
        (DECODE, "textbook", ("textbook", "inline"), "placement='inline'"),
        (PYTHON, "textbook", ("textbook", "inline"), "no setting: overlap lifts it"),
        (replace(DECODE, fetch_held_ms=None), "textbook", ("textbook", "inline"), "gil='account'"),
        (READY, "inline", ALL, ""),
    ],
)
def test_the_advice_is_one_setting_that_can_be_typed(cost, where, settable, words):
    """The one with the best prediction among those that there are, or none."""
    predictions = predict_all(cost, num_cores=2)
    measured = step_ms(cost, where) if cost.fetch_held_ms is not None else cost.loop_ms + cost.fetch_ms
    found = advise(measured, cost, where, predictions, settable, None)
    assert words in found
    assert bool(words) == bool(found)


def test_a_measured_loss_is_advised_against():
    """Whatever was predicted."""
    found = advise(20, DECODE, "inline", predict_all(DECODE, num_cores=2), ALL, gain(0.8, 0.75, 0.85))
    assert "schedule='textbook'" in found


# ---- over time


def test_lanes_begin_where_the_first_of_them_begins():
    """In milliseconds from there; what lies before is cut off, and a lane of nothing left out."""
    loop = [("step", 2_000_000, 4_000_000), ("step", 4_000_000, 8_000_000)]
    found = make_lanes({"loop": loop, "writer": [("log", 1_000_000, 3_000_000)], "device": []})
    assert [lane.name for lane in found] == ["loop", "writer"]
    assert found[0].segments == (("step", 0.0, 2.0), ("step", 2.0, 6.0))
    assert found[1].segments == (("log", 0.0, 1.0),)


def test_lanes_are_bounded():
    """However many stretches there were."""
    found = make_lanes({"loop": [("step", n * 1000, n * 1000 + 900) for n in range(3 * MAX_SEGMENTS)]})
    assert len(found[0].segments) <= MAX_SEGMENTS


def test_a_trace_becomes_lanes_of_states_and_of_stages():
    """Threads of one name are one lane, and one that only sleeps is none."""

    def lane(tid, name):
        return {"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": name}}

    def stretch(tid, name, ts):
        return {"ph": "X", "pid": 1, "tid": tid, "ts": ts, "dur": 1000, "name": name}

    events = [lane(0, "GIL held by"), lane(1, "MainThread"), lane(2, "MainThread: stage"),
              lane(3, "prefetch"), lane(5, "prefetch"), lane(7, "idle"), stretch(0, "MainThread", 0),
              stretch(1, "held", 0),
              stretch(2, "forward", 0), stretch(5, "native", 2000), stretch(3, "held", 0),
              stretch(7, "blocked", 0)]  # fmt: skip
    found = lanes_of_trace({"traceEvents": events}, {"MainThread": "loop"})
    assert [(each.name, each.kind) for each in found] == [
        ("GIL held by", "stages"), ("loop", "states"), ("loop", "stages"),
        ("prefetch", "states")]  # fmt: skip
    assert [what for what, _, _ in found[3].segments] == ["held", "native"]
    assert found[0].segments[0][0] == "loop"


def test_a_long_run_is_a_few_hundred_points():
    """With the means of the steps in each."""
    found = make_series([0.01] * 10_000, [0.001] * 10_000, 500)
    assert len(found.at_s) <= NUM_POINTS
    assert found.at_s[-1] == pytest.approx(100)
    assert found.step[-1] == 10_500
    assert found.step_ms[7] == pytest.approx(10)
    assert found.data_wait_ms[7] == pytest.approx(1)


# ---- of real runs


@pytest.mark.parametrize("schedule", ["textbook", "overlap"])
def test_a_run_writes_its_report(schedule):
    """As JSON that is read back the same, as a page, and as a trace; in the result too."""
    result = fit(schedule=schedule)
    assert load("run") == load("run/report.json")
    assert to_json(load("run")) == Path("run/report.json").read_text()
    assert load("run").facts["num_steps"] == 16
    assert json.loads(Path("run/trace.json").read_text())["traceEvents"]
    assert result.report.verdict in str(result.report)
    threads = {line.thread for line in result.report.stages}
    assert threads == ({"loop"} if schedule == "textbook" else {"loop", "prefetch", "writer"})
    assert sum(result.report.series.data_wait_ms) > 0


def test_without_a_folder_nothing_is_written():
    """The report is in the result alone."""
    assert fit(run_dir=None).report.step_ms > 0
    assert not list(Path().iterdir())


def test_the_account_is_laid_over_the_lanes():
    """With states for each thread that did something."""
    report = fit(schedule="overlap", gil="account", max_epochs=40).report
    assert {lane.kind for lane in report.lanes} == {"stages", "states"}
    assert "loop" in {lane.name for lane in report.lanes}
    assert report.cost.loop_held_ms is not None


def test_a_validation_does_not_count_as_loading():
    """The prefetch thread makes its batches too; they are in no step."""
    data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randint(0, 3, (64,)))
    model = torch.nn.Linear(8, 3)
    trainer = Trainer(max_epochs=1, limit_train_batches=1, schedule="overlap", run_dir=None,
                      enable_progress_bar=False)  # fmt: skip
    result = trainer.fit(model, torch.optim.SGD(model.parameters(), lr=0.1), data, loss_fn=F.cross_entropy,
                         batch_size=8, val_data=data)  # fmt: skip
    stretches = [each for lane in result.report.lanes if lane.name == "prefetch" for each in lane.segments]
    assert "transfer" not in {what for what, _, _ in stretches}
    assert "transfer" not in {line.stage for line in result.report.stages}


def test_the_device_has_a_lane_and_a_time():
    """On the simulated one, by its clock: 5 ms a step, whatever the host does meanwhile."""
    device = SimulatedBackend(is_virtual=False)
    model = torch.nn.Linear(8, 3)

    def loss_fn(outputs, target):
        device.launch(5e-3)
        return F.cross_entropy(outputs, target)

    data = torch.utils.data.TensorDataset(torch.randn(320, 8), torch.randint(0, 3, (320,)))
    trainer = Trainer(schedule="overlap", device=device, run_dir=None, enable_progress_bar=False)
    report = trainer.fit(
        model, torch.optim.SGD(model.parameters(), lr=0.1), data, loss_fn=loss_fn, batch_size=8
    ).report
    lane = next(lane for lane in report.lanes if lane.name == "device")
    assert len(lane.segments) > 10
    assert report.cost.device_ms >= 4.9  # no step of the device is shorter than what was launched


def test_the_report_is_shown_where_a_bar_is(capsys):
    """On standard error, and not for a dry run."""
    fit(enable_progress_bar=True)
    assert "verdict" in (shown := capsys.readouterr().err)
    assert "report.html" in shown
    fit(enable_progress_bar=True, max_epochs=None, fast_dev_run=True)
    assert "verdict" not in capsys.readouterr().err


# ---- several runs


def two_runs():
    fit(run_dir="runs/a", schedule="textbook")
    fit(run_dir="runs/b", schedule="overlap", seed=3)


def test_runs_are_compared_by_the_settings_in_which_they_differ():
    """A sweep's folder is enough."""
    for name, lr in (("a", 0.1), ("b", 0.2)):
        setting = {"schedule": "textbook"} if name == "a" else {"schedule": "overlap", "seed": 3}
        fit(run_dir=f"runs/{name}", hparams={"optim": {"lr": lr, "nesterov": False}, "seed": 0}, **setting)
    runs = find_runs(["runs"])
    assert [name for name, _ in runs] == ["a", "b"]
    assert differing_settings([report for _, report in runs]) == ["optim.lr", "seed", "schedule"]
    table = to_table(runs).splitlines()
    assert {"schedule", "seed", "optim.lr"} <= set(table[0].split())
    assert {"overlap", "3", "0.2"} <= set(table[2].split())
    assert len(table) == 3


def test_names_tell_runs_apart():
    """By as much of the path as it takes."""
    fit(run_dir="sweep/lr=1/run")
    fit(run_dir="sweep/lr=2/run")
    assert [name for name, _ in find_runs(["sweep"])] == ["lr=1/run", "lr=2/run"]


def test_the_command_shows_one_run_or_compares_several(capsys):
    """With a page where one is asked for."""
    two_runs()
    assert main(["runs/a"]) == 0
    assert "verdict" in capsys.readouterr().out
    assert main(["runs/a", "runs/b", "--html", "both.html"]) == 0
    assert "samples/s" in capsys.readouterr().out
    assert '"name": "b"' in Path("both.html").read_text()


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="needs matplotlib")
def test_the_command_draws_plots():
    """As PNG files."""
    two_runs()
    assert main(["runs", "--png", "plots"]) == 0
    plots = sorted(Path("plots").iterdir())
    assert [path.name for path in plots] == ["ceilings.png", "over_time.png", "steps.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in plots)


@pytest.mark.parametrize("what", ["nothing here", "no JSON", "another version"])
def test_a_folder_without_a_report_is_refused(what, capsys):
    """With what is wrong, and no traceback."""
    Path("run").mkdir()
    if what != "nothing here":
        Path("run/report.json").write_text("{" if what == "no JSON" else '{"version": 99}')
    assert main(["run"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(ConfigError):
        load("run")


def test_a_report_is_plain_values():
    """What is no number is null, and text that would end the script does not."""
    report = RunReport(
        {"x": float("nan")}, {}, {"train/loss": float("inf")}, 1.0, 0.0, 1.0, notes=("</script>",)
    )
    assert json.loads(to_json(report))["metrics"]["train/loss"] is None


def test_the_report_says_where_batches_were_made_and_why():
    """In its first note, and as a record that its JSON keeps."""
    report = fit(max_epochs=20).report
    assert report.notes[0] == str(report.placement)
    assert load("run").placement.place == report.placement.place
