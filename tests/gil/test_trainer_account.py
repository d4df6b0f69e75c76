"""The account and the convoy warning of a run."""

from __future__ import annotations

import json
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pipeline import Callback, ConfigError, GilAccountError, StepFinished, Trainer, gil_account
from pipeline.gil import cheap_signals as signals
from pipeline.gil.account import StageShare
from pipeline.gil.cheap_signals import Handoffs
from pipeline.gil.report import make_signals_report
from pipeline.testing import InMemoryLogger
from pipeline.watch import convoy
from pipeline.watch.clock import FORWARD, SETUP, StepClock
from pipeline.watch.convoy import ConvoyWatch, describe_convoy, lost_ratio


def fit(**settings):
    """Train a small model on random data and return what came of it, with its weights."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 3)
    data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randint(0, 3, (64,)))
    arguments = {"callbacks": settings.pop("callbacks", ()), "loggers": settings.pop("loggers", ())}
    trainer = Trainer(**{"max_epochs": 2, "run_dir": None, "enable_progress_bar": False} | settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = trainer.fit(model, optimizer, data, loss_fn=F.cross_entropy, batch_size=8, **arguments)
    return result, model.weight.detach().clone()


@pytest.mark.parametrize("schedule", ["textbook", "overlap"])
@pytest.mark.parametrize("mode", ["account", "off"])
def test_the_account_does_not_touch_the_numbers(schedule, mode):
    """Losses and weights are the same bit for bit with it, and without any watch."""
    plain, weight = fit(schedule=schedule)
    watched, watched_weight = fit(schedule=schedule, gil=mode)
    assert watched.losses == plain.losses
    assert torch.equal(watched_weight, weight)


STEP_STAGES = {"forward", "backward", "optimizer"}


class Until(Callback):
    """Ends the run once something holds: how long a sampler on a busy core takes nobody knows."""

    def __init__(self, holds):
        self.holds = holds

    def on_step_finished(self, event: StepFinished) -> None:
        if self.holds():
            event.stop("it holds")


def fit_until_logged(monkeypatch, **settings):
    """Train with an account until the loggers had the shares of a step; return the result and such rows."""
    monkeypatch.setattr("pipeline.watch.gil_watch.LOG_NS", 0)
    logger, names = InMemoryLogger(), {f"gil/waiting_ratio/{stage}" for stage in STEP_STAGES}
    until = Until(lambda: any(names & set(row.values) for row in logger.rows[-20:]))
    result, _ = fit(gil="account", loggers=[logger], callbacks=[until], max_epochs=10**6, **settings)
    return result, [row.values for row in logger.rows if "gil/held_ratio" in row.values]


def test_an_account_is_in_the_result_and_in_the_run_folder(monkeypatch):
    """With a report, its JSON, and a trace."""
    result, _ = fit_until_logged(monkeypatch, schedule="overlap", run_dir="run")
    assert result.gil.num_samples > 0
    assert {share.stage for share in result.gil.stages} & STEP_STAGES
    assert json.loads(Path("run/gil.json").read_text())["backend"] == result.gil.backend
    assert json.loads(Path("run/gil_trace.json").read_text())["traceEvents"]


def test_stage_times_and_handoffs_are_always_there():
    """At the price of a clock; `off` leaves out the hand-offs."""
    result, _ = fit()
    stages = {each.stage: each for each in result.stage_times}
    assert {"setup", "data_wait", "forward", "backward", "optimizer", "log"} <= set(stages)
    assert sum(each.wall_s for each in result.stage_times) >= result.train_s
    assert result.handoffs_per_step is not None
    assert result.gil is None
    assert fit(gil="off")[0].handoffs_per_step is None


def test_the_loggers_get_the_shares_of_the_loop(monkeypatch):
    """Every ten seconds; here at every step."""
    _, rows = fit_until_logged(monkeypatch)
    kinds = ("held", "waiting", "native", "blocked")
    assert sum(rows[-1][f"gil/{kind}_ratio"] for kind in kinds) == pytest.approx(1)


class KillSampler(Callback):
    """Kills the run's sampler at its third step."""

    def on_step_finished(self, event: StepFinished) -> None:
        if event.state.step == 3:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            for pid in children:  # the fork server of all tests is one too
                if b"gil.sampler" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(int(pid), signal.SIGKILL)


def test_a_sampler_that_dies_does_not_end_the_training():
    """The run is finished without the account, with one warning."""
    plain, weight = fit()
    with pytest.warns(UserWarning, match=r"training goes on without the GIL account.*-9"):
        result, killed_weight = fit(gil="account", callbacks=[KillSampler()])
    assert result.gil is None
    assert result.losses == plain.losses
    assert torch.equal(weight, killed_weight)


def stages_of(account):
    return {share.stage for share in account.report().stages}


def test_an_account_of_ones_own_around_a_run_has_its_stages():
    """The Trainer marks its stages for whoever samples; its own account then stands back."""
    with gil_account(period_s=0.0003) as account:
        fit(max_epochs=10**6, callbacks=[Until(lambda: stages_of(account) & STEP_STAGES)])
        with pytest.warns(UserWarning, match="running already"):
            fit(gil="account")
    assert stages_of(account) & STEP_STAGES


def test_an_unknown_mode_is_refused():
    """With the three that there are."""
    with pytest.raises(ConfigError, match="gil must be account, signals, off"):
        Trainer(gil="sometimes")


@pytest.mark.parametrize(
    ("handoffs", "off_core_s", "expected"),
    [(400, 1.0, 0.5), (40, 1.0, 0.05), (4000, 0.3, 0.15), (0, 1.0, 0.0)],
)
def test_what_was_lost_is_bounded_by_both_signs(handoffs, off_core_s, expected):
    """Hand-offs alone may be willing; off the core alone may be a lock."""
    assert lost_ratio(handoffs, 0.005, off_core_s, 2.0) == pytest.approx(expected)


def share(stage, waiting, blame, thread="loop"):
    return StageShare(thread, stage, 1.0, 1000, 1 - waiting, waiting, 0.0, 0.0, 0.0, 1.0, blame)


def report(*shares, wall_s=2.0):
    found = make_signals_report("", wall_s, 0.0, [])
    return type(found)(**{**vars(found), "stages": list(shares), "backend": "waiters", "num_samples": 1000})


@pytest.mark.parametrize(
    ("holder", "advice"),
    [
        ("prefetch/fetch", "placement='process'"),
        ("writer/log", "log_every_n_steps"),
        ("tokenizer", "setswitchinterval"),
    ],
)
def test_the_warning_names_stage_holder_cost_and_remedy(holder, advice):
    """As a user needs it."""
    found = report(share("forward", 0.6, {holder: 1.0}), share("optimizer", 0.2, {"nobody": 1.0}))
    message = str(describe_convoy(found, "loop", 100))
    assert "40% of the time" in message
    assert "8.0 ms a step" in message
    assert "'forward'" in message
    assert repr(holder) in message
    assert advice in message


def test_the_warning_advises_no_process_where_there_can_be_none():
    """It says why instead."""
    found = report(share("forward", 0.6, {"prefetch/1/fetch": 1.0}))
    message = str(describe_convoy(found, "loop", 100, "dataset.file can only be read in turn"))
    assert "placement=" not in message
    assert "dataset.file can only be read in turn" in message


def test_a_loop_that_hardly_waits_is_not_warned():
    """Nor is one for the waiting of another thread, or outside of its stages."""
    other = share("fetch", 1.0, {"loop/forward": 1.0}, thread="prefetch")
    assert describe_convoy(report(share("forward", 0.1, {"x": 1.0}), other), "loop", 100) is None
    assert describe_convoy(report(share("my own", 1.0, {"x": 1.0})), "loop", 100) is None


class FakeClock(StepClock):
    """A loop that is off its core as a test says."""

    def __init__(self):
        super().__init__()
        self.off_s = 0.0
        self.leave()

    def off_core_s(self, stages):
        return self.off_s


class Watched:
    """A watch with a clock, a counter and an account that a test sets."""

    def __init__(self, monkeypatch, found):
        self.count, self.windows, self.step = 0, 0, 0
        self.clock = FakeClock()
        watched = self

        class Account:
            def report(self):
                if isinstance(found, Exception):
                    raise found
                return found

        @contextmanager
        def fake_account():
            watched.windows += 1
            yield Account()

        monkeypatch.setattr(convoy, "gil_account", fake_account)
        self.watch = ConvoyWatch(self.clock, Handoffs(lambda: self.count))

    def pass_by(self, seconds, handoffs, off_core_s):
        self.clock.since_ns += int(seconds * 1e9)
        self.count += handoffs
        self.clock.off_s += off_core_s
        self.step += 100
        self.watch.look(self.step)


@pytest.fixture
def convoy_report():
    thread = __import__("threading").current_thread().name
    return report(share("forward", 0.9, {"tokenizer": 1.0}, thread=thread))


def test_a_suspicion_is_looked_into_and_warned_of_once(monkeypatch, convoy_report):
    """The window opens on suspicion only; after the warning there is no other."""
    watched = Watched(monkeypatch, convoy_report)
    watched.pass_by(2, 10, 1.5)
    assert watched.windows == 0
    watched.pass_by(2, 800, 1.5)
    assert watched.windows == 1
    with pytest.warns(UserWarning, match="'tokenizer' holds it"):
        watched.pass_by(1, 400, 0.8)
    watched.pass_by(2, 800, 1.5)
    assert watched.windows == 1


def test_a_false_alarm_is_looked_into_three_times_at_most(monkeypatch):
    """And nothing is said."""
    watched = Watched(monkeypatch, report(share("forward", 0.0, {})))
    for _ in range(20):
        watched.pass_by(2, 800, 1.5)
    assert watched.windows == convoy.MAX_WINDOWS


def test_a_short_run_is_not_looked_into(monkeypatch):
    """The first look comes after two seconds, however bad the signs are."""

    def never():
        raise AssertionError("a window was opened")

    monkeypatch.setattr(convoy, "lost_ratio", lambda *_: 1.0)
    monkeypatch.setattr(convoy, "gil_account", never)
    fit(max_epochs=1)


def test_a_look_that_fails_says_nothing(monkeypatch):
    """A sampler that dies is no reason to warn of a convoy."""
    watched = Watched(monkeypatch, GilAccountError("killed"))
    for _ in range(4):
        watched.pass_by(2, 800, 1.5)
    assert watched.windows >= 1


def test_thread_time_is_read_for_a_step_every_twenty_milliseconds(monkeypatch):
    """It is a system call at each stage; a step that takes longer is read each time."""
    now_ns, read = [0], []
    monkeypatch.setattr(signals, "perf_counter_ns", lambda: now_ns[0])
    clock = StepClock()
    clock.restart()
    for step_ns in [5_000_000] * 9 + [30_000_000] * 3:
        now_ns[0] += step_ns
        read.append(clock.has_cpu_time)
        clock.step_ended()
    clock.leave()
    assert read == [True, True, False, False, False, True, False, False, False, True, True, True]


def test_the_clock_of_a_step_restarts_after_a_validation():
    """What came between is no training time."""
    clock = StepClock()
    clock.restart()
    clock.enter(FORWARD)
    step_ns, data_wait_ns = clock.step_ended()
    assert step_ns >= data_wait_ns >= 0
    assert clock.num_steps == 1
    trained_s = clock.train_s
    clock.restart()
    assert clock.train_s == trained_s
    clock.enter(SETUP)
    clock.leave()
