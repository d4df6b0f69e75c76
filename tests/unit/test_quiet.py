"""The quiet interpreter: when garbage is collected, when callbacks run and where, what a profiler sees."""

from __future__ import annotations

import gc
import json
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from pipeline import Callback, ConfigError, Every, ProfilerWindow, SimulatedBackend, Trainer
from pipeline.watch.garbage_collector import Collector
from tests.textbook import build_model


@pytest.fixture(params=["textbook", "overlap"])
def settings(request):
    """Settings of a quiet trainer on the simulated accelerator, for each schedule."""
    return {"schedule": request.param, "device": SimulatedBackend(), "run_dir": None,
            "enable_progress_bar": False}  # fmt: skip


class UserError(Exception):
    """What only the user's own code raises."""


def fit(settings, *, callbacks=(), num_steps=60, loss_fn=F.cross_entropy, **own):
    torch.manual_seed(0)
    model = build_model("linear")
    data = TensorDataset(torch.randn(num_steps * 2, 6), torch.arange(num_steps * 2) % 3)
    trainer = Trainer(**{**settings, **own})
    return trainer.fit(model, torch.optim.SGD(model.parameters(), 0.01), data, loss_fn=loss_fn, batch_size=2,
                       callbacks=list(callbacks))  # fmt: skip


class Watching(Callback):
    """Notes what the collector is like at each step."""

    def __init__(self):
        self.is_enabled, self.num_frozen = [], []

    def on_step_finished(self, event):
        self.is_enabled.append(gc.isenabled())
        self.num_frozen.append(gc.get_freeze_count())


@pytest.fixture
def collector_state():
    """Give the collector back as it was, whatever a test does."""
    was_enabled = gc.isenabled()
    yield
    gc.enable() if was_enabled else gc.disable()
    gc.unfreeze()


def test_by_default_the_collector_is_left_alone(settings):
    """Nothing is frozen, nothing switched, nothing measured."""
    watching, callbacks = Watching(), list(gc.callbacks)
    result = fit(settings, callbacks=[watching])
    assert all(watching.is_enabled)
    assert not any(watching.num_frozen)
    assert result.outbound.gc is None
    assert gc.callbacks == callbacks


def test_freeze_takes_what_lives_out_of_the_walk(settings):
    """After the warm-up everything is frozen, the collector stays on; behind the run nothing is frozen."""
    watching = Watching()
    report = fit(settings, gc="freeze", callbacks=[watching]).outbound.gc
    assert all(watching.is_enabled)
    assert not any(watching.num_frozen[:31])
    assert all(count > 1000 for count in watching.num_frozen[32:])
    assert gc.get_freeze_count() == 0
    assert (report.before.num_steps, report.after.num_steps) == (32, 28)
    assert report.after.num_collections >= 1  # at the epoch's end, where the loop waits anyway


def test_every_n_steps_collects_then_and_at_the_end_of_an_epoch(settings):
    """The collector is off between its moments, and back on behind the run."""
    watching = Watching()
    result = fit(settings, gc="every_n_steps", gc_every_n_steps=5, callbacks=[watching])
    assert all(watching.is_enabled[:31])
    assert not any(watching.is_enabled[32:])
    assert gc.isenabled()
    report = result.outbound.gc
    assert report.after.num_collections == 7  # at 35, 40, … 60, and at the epoch's end
    assert report.after.longest_s > 0
    assert "gc=every_n_steps: 7 pauses in 28 steps" in str(result.outbound)
    assert not report.has_fallen_back


@pytest.mark.parametrize("policy", ["freeze", "every_n_steps"])
def test_the_collector_is_as_it_was_after_a_failure(settings, policy, collector_state):
    """An exception, a collector that was off, objects that were frozen: all is as the caller had it."""
    calls = []

    def loss_fn(outputs, target):
        calls.append(1)
        if len(calls) == 50:
            raise UserError("mine")
        return F.cross_entropy(outputs, target)

    gc.disable()
    with pytest.raises(UserError):
        fit(settings, gc=policy, loss_fn=loss_fn)
    assert not gc.isenabled()
    assert gc.get_freeze_count() == 0
    gc.freeze()
    fit(settings, gc=policy)
    assert gc.get_freeze_count() > 1000
    assert not gc.isenabled()


def make_garbage(count):
    for _ in range(count):
        cycle = []
        cycle.append(cycle)


def test_much_garbage_makes_the_collector_fall_back(collector_state):
    """What only a full collection finds is found when it has grown; if there is much, Python takes over."""
    collector = Collector("every_n_steps", 1, max_growth=1000)
    with collector.installed():
        for step in range(1, 33):
            collector.step_done(step)
        assert not gc.isenabled()
        kept = []
        for step in range(33, 43):  # cycles that outlive a young collection, and then are dropped
            kept.append([each := [], each])
            for _ in range(400):
                cycle = []
                cycle.append(cycle)
                kept[-1].append(cycle)
            if step == 38:
                kept.clear()
                del cycle, each
            collector.step_done(step)
            if gc.isenabled():
                break
        assert gc.isenabled()
        collector.idle()
    assert collector.report().has_fallen_back
    assert "left to itself again" in str(collector.report())


def test_growth_that_is_no_garbage_is_let_be(collector_state):
    """Lists that the user keeps are found to be alive, and the policy goes on."""
    collector, kept = Collector("every_n_steps", 1, max_growth=1000), []
    with collector.installed():
        for step in range(1, 60):
            kept += [[] for _ in range(300)]
            collector.step_done(step)
        assert not gc.isenabled()
    assert not collector.report().has_fallen_back


class Late(Callback):
    """Wants the host's numbers."""

    def __init__(self, every=None):
        self.every, self.heard, self.threads = every, [], set()

    def on_step_read(self, event):
        self.heard.append((event.step, event.epoch, event.values["train/loss"]))
        self.threads.add(threading.current_thread().name)


def test_numbers_are_heard_late_in_order_where_the_loggers_run(settings):
    """Every step's once, with its own loss, off the loop thread in overlap, whatever is logged."""
    late = Late()
    result = fit(settings, callbacks=[late], log_every_n_steps=7, max_epochs=2)
    assert late.heard == [
        (step, (step - 1) // 60, loss) for step, loss in enumerate(result.losses.tolist(), 1)
    ]
    assert late.threads == {"MainThread" if settings["schedule"] == "textbook" else "writer"}


def test_what_runs_on_the_loop_is_timed(settings):
    """The report has the time of callbacks that the loop waited for; a late one costs it nothing."""
    result = fit(settings, callbacks=[Watching(), Late()])
    assert result.outbound.callbacks["Watching"] > 0
    assert result.outbound.callbacks["Late"] == 0.0


def test_callbacks_may_run_now_and_then(settings):
    """`every` is asked before either method of a step is called, and begins anew with each run."""

    class Both(Late):
        def on_step_finished(self, event):
            self.live.append(event.state.step)

    both = Both(Every(steps=25))
    for _ in range(2):
        both.heard, both.live = [], []
        fit(settings, callbacks=[both])
        assert ([step for step, *_ in both.heard], both.live) == ([25, 50], [25, 50])


def test_a_late_callback_may_stop_the_run(settings):
    """The run ends after the step that is under way by then, with the reason given."""

    class Stopping(Late):
        def on_step_read(self, event):
            super().on_step_read(event)
            if event.step == 3:
                event.stop("enough")

    stopping = Stopping()
    result = fit(settings, callbacks=[stopping], max_epochs=3, max_log_lag=1)
    assert result.stop_reason == "enough"
    assert 3 <= result.num_steps <= 6
    assert len(stopping.heard) == result.num_steps


def test_an_error_of_a_late_callback_reaches_the_user(settings):
    """It travels as itself, with the callback's name and the step of the numbers."""

    class Failing(Callback):
        def on_step_read(self, event):
            if event.step == 3:
                raise UserError("late")

    with pytest.raises(UserError, match="late") as caught:
        fit(settings, callbacks=[Failing()])
    assert caught.value.__notes__ == ["stage 'callback (Failing)', step 3"]


def names_in(path):
    return [event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]]


@pytest.mark.parametrize(("first", "last"), [(1, 2), (3, 5)])
def test_a_window_of_steps_is_profiled(settings, first, last):
    """The trace has the optimizer's steps of the window, and no others."""
    result = fit({**settings, "run_dir": "run"}, callbacks=[ProfilerWindow(first, last)], num_steps=8)
    names = names_in(Path("run") / "traces" / f"steps_{first}_{last}.json")
    assert len([name for name in names if name.startswith("Optimizer.step")]) == last - first + 1
    assert result.outbound.callbacks["ProfilerWindow"] > 0


def test_a_window_that_the_run_leaves_early_is_written(settings):
    """A run that ends or fails inside the window leaves the trace so far, and no profiler running."""
    fit(settings, callbacks=[ProfilerWindow(2, 99, folder="mine")], num_steps=4)
    assert names_in(Path("mine/steps_2_4.json"))

    class Failing(Callback):
        def on_step_finished(self, event):
            if event.state.step == 3:
                raise UserError("mine")

    with pytest.raises(UserError):
        fit(settings, callbacks=[ProfilerWindow(2, 99, folder="failed"), Failing()], num_steps=4)
    assert names_in(Path("failed/steps_2_3.json"))
    for wrong in ((0, 3), (5, 4)):
        with pytest.raises(ConfigError, match="1 <= first_step <= last_step"):
            ProfilerWindow(*wrong)
