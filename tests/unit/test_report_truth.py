"""Jobs with a known truth: the report names the true cause, and advises nothing that cannot be done."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline import Callback, StageError, Trainer
from pipeline.errors import listed
from pipeline.report.ceilings import Ceiling, StepCost, ceilings, predict_all
from pipeline.report.lanes import MAX_SEGMENTS, make_lanes
from pipeline.report.possible import PLACES, Possible, places_of
from pipeline.report.verdict import advise, binding_of, describe, describe_ceiling, lift
from pipeline.watch.clock import BETWEEN, FORWARD, StepClock

LOADS = StepCost(loop_ms=4, fetch_ms=16, fetch_core_ms=16, fetch_held_ms=16, loop_held_ms=1)
MEETS = {place: f"placement='{place}'" for place in ("thread", "process")}


def possible(kind="map", **found):
    places, obstacles = places_of(kind, found.pop("unhookable", ""), found.pop("obstacle", ""))
    return Possible(kind, places, obstacles, **found)


def words(cost, where, known, step_ms=None, wait_ms=None):
    """Return all that is said of a job."""
    step_ms = cost.loop_ms + cost.fetch_ms if step_ms is None else step_ms
    bounds = ceilings(cost, where, num_cores=2)
    predictions = tuple(each for each in predict_all(cost, num_cores=2) if each.where in known.places)
    found = (
        describe(step_ms, cost.fetch_ms if wait_ms is None else wait_ms, cost, where, None, known),
        describe_ceiling(step_ms, bounds, lift(binding_of(bounds).name, where, known)),
        advise(step_ms, cost, where, predictions, PLACES, None, known),
    )
    return "\n".join(found)


def test_a_dataset_that_holds_the_gil_is_sent_to_a_process():
    """It can be shared out, so that is what is advised."""
    found = words(LOADS, "textbook", possible())
    assert "makes its own batches" in found
    assert MEETS["process"] in found


@pytest.mark.parametrize("where", ["textbook", "inline"])
def test_no_more_workers_are_advised_for_what_one_thread_reads(where):
    """A generator has one reader: neither threads nor processes, nor a number of workers."""
    latency = replace(LOADS, fetch_core_ms=0.1, fetch_held_ms=0.1)
    found = words(latency, where, possible("iterable"))
    assert MEETS["thread"] not in found
    assert MEETS["process"] not in found
    assert "workers" not in found
    assert "one thread" in found


def test_waiting_for_the_workers_of_a_dataloader_is_called_that():
    """And what would help is theirs to set."""
    found = words(replace(LOADS, is_remote=True), "textbook", possible("workers"))
    assert "waits for the DataLoader's workers" in found
    assert "makes its own" not in found
    assert "prefetch_factor" in lift("belt", "inline", possible("workers"))


def test_what_does_not_go_to_a_process_is_not_advised_to():
    """The obstacle is named instead."""
    known = possible(obstacle="the dataset cannot be pickled: it holds a lock")
    assert MEETS["process"] not in words(LOADS, "textbook", known)
    assert "cannot be pickled" in lift("gil", "inline", known)


def test_draws_that_threads_share_leave_no_thread_to_advise():
    """Only a process makes the same numbers."""
    known = possible(unhookable="numpy.random")
    decode = replace(LOADS, fetch_held_ms=0.5)
    found = words(decode, "textbook", known)
    assert MEETS["process"] in found
    assert MEETS["thread"] not in found
    assert "inline" not in found


def test_shards_bound_the_workers():
    """No more can share in them than there are."""
    assert "more workers" not in lift("belt", "process", possible("shards", max_workers=2))
    assert "2" in lift("belt", "process", possible("shards", max_workers=2))


@pytest.mark.parametrize(
    ("parts", "named", "not_named"),
    [
        ({"callbacks": 9.0, "log": 0.1}, "every=", "log_every_n_steps"),
        ({"callbacks": 0.1, "log": 9.0}, "log_every_n_steps", "every="),
    ],
)
def test_the_advice_is_about_the_part_that_takes_the_time(parts, named, not_named):
    """A slow callback is no log, and a slow log no callback."""
    cost = StepCost(loop_ms=10, fetch_ms=0.1, fetch_core_ms=0.1, fetch_held_ms=0.1, loop_held_ms=4)
    found = words(cost, "textbook", possible(parts_ms=parts, slowest_callback="Drawing"))
    assert named in found
    assert not_named not in found


def test_a_step_that_is_all_training_gets_no_advice_about_loading():
    """Nor about its log."""
    cost = StepCost(loop_ms=10, fetch_ms=0.1, fetch_core_ms=0.1, fetch_held_ms=0.1, loop_held_ms=4)
    found = words(cost, "textbook", possible(parts_ms={"log": 0.05, "callbacks": 0.0}))
    assert "nothing to gain from loading" in found
    assert "a shorter step" in found
    assert "placement" not in found


def test_a_ceiling_above_the_step_is_an_estimate():
    """It is no share of the step, least of all all of it."""
    found = describe_ceiling(37.76, (Ceiling("serial", 39.81),))
    assert "of 37.76" not in found
    assert "%" not in found
    assert "estimated" in found
    assert describe_ceiling(0.0, (Ceiling("serial", 1.0),)) == ""


def test_what_is_no_training_is_in_no_stage_of_it(monkeypatch):
    """The stages of training add up to its time, whatever callbacks do at the end of an epoch."""
    now = [0]
    monkeypatch.setattr("pipeline.gil.cheap_signals.perf_counter_ns", lambda: now[0])
    clock = StepClock()
    for _ in range(2):
        clock.restart()
        now[0] += 7
        clock.enter(FORWARD)
        now[0] += 50
        clock.step_ended()
        now[0] += 3
        clock.pause()
        now[0] += 1000
        clock.pause()  # a validation at the end of an epoch
        clock.enter(BETWEEN)
        now[0] += 1000
    clock.restart()
    assert clock.train_s == pytest.approx(120e-9)
    stages = {each.stage: each.wall_s for each in clock.times()}
    assert stages.pop("between") == pytest.approx(4000e-9)
    assert sum(stages.values()) == pytest.approx(clock.train_s)


def test_lanes_hold_a_step_whatever_came_after():
    """A writer that was busy for long after the last one does not push it out."""
    after = [("log", n * 1000 + 10_000_000, n * 1000 + 10_000_900) for n in range(2 * MAX_SEGMENTS)]
    found = make_lanes({"loop": [("step", 0, 4_000_000)], "writer": after})
    assert found[0].segments[0][0] == "step"


def test_names_are_listed_once():
    """In their order, and not all of a long list."""
    assert listed(["b", "a", "b", "a"]) == "b, a"
    assert listed(range(23)) == "0, 1, 2, 3, 4, 5, 6, 7 and 15 more"


# ---- of real runs


class Noting(Callback):
    """Hears of each step and each epoch."""

    def on_step_finished(self, event):
        self.step = event.state.step

    def on_epoch_finished(self, event):
        self.epoch = event.state.epoch


def fit(step, callbacks=(), **more):
    model = torch.nn.Linear(8, 3)
    data = torch.utils.data.TensorDataset(torch.randn(24, 8), torch.randint(0, 3, (24,)))
    trainer = Trainer(max_epochs=2, run_dir=None, enable_progress_bar=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return trainer.fit(model, optimizer, data, step=step, batch_size=8, callbacks=list(callbacks), **more)


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def returning(value):
    return lambda model, batch: {"loss": loss_of(model, batch), "more": value}


def test_callbacks_have_a_row_of_their_own():
    """Only where there are any, and the log's is not theirs."""
    stages = {line.stage for line in fit(loss_of, [Noting()]).report.stages}
    assert {"callbacks", "log"} <= stages
    assert "between" not in stages
    assert "callbacks" not in {line.stage for line in fit(loss_of).report.stages}


def test_an_iterable_of_a_run_is_predicted_where_it_can_be_read():
    """By the loop thread, or by one beside it."""
    model = torch.nn.Linear(8, 3)
    batches = [(torch.randn(8, 8), torch.randint(0, 3, (8,))) for _ in range(3)]
    trainer = Trainer(max_epochs=1, schedule="textbook", run_dir=None, enable_progress_bar=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = trainer.fit(model, optimizer, batches, step=loss_of).report
    assert {each.where for each in report.predictions} == {"textbook", "inline"}


@pytest.mark.parametrize(
    ("value", "logged"),
    [
        (True, 1.0), (3, 3.0), (np.bool_(True), 1.0), (np.float32(0.5), 0.5), (np.array([2]), 2.0),
        (torch.tensor(3), 3.0), (torch.tensor([0.5]), 0.5), (torch.tensor(True), 1.0),
    ],
)  # fmt: skip
def test_a_number_of_any_kind_is_logged(value, logged):
    """Whatever holds it, and whatever its type."""
    assert fit(returning(value)).metrics["train/more"] == logged


@pytest.mark.parametrize(
    "value", [torch.zeros(2), np.zeros(2), "a text", [1.0], None, torch.tensor(1j), 1j, torch.zeros(0), {}]
)
def test_what_is_no_number_is_refused_by_name(value):
    """At the first step, and nothing is dropped in silence."""
    with pytest.raises(StageError, match=r"'more'.*must be a number"):
        fit(returning(value))


def test_metrics_take_whatever_the_step_returns():
    """Then a dict may hold more than numbers."""
    outputs = {"size": lambda returned: returned["more"].sum()}
    assert fit(returning(torch.ones(2)), train_metrics=outputs).metrics["train/size"] == 2.0
