"""Signals as programs send them: twice in a row, while a run is resumed, to forks; and what is said then."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest
import torch
import torch.nn.functional as F

from pipeline import Callback, Trainer
from pipeline.loop import signals
from tests.faults.cells import At, Samples, fit

# A process that has threads is forked, which Python 3.12 and newer warn of.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def at(number, *names):
    """Return a loss function at whose so-manieth call signals come."""

    def loss_fn(outputs, target):
        for name in names:
            os.kill(os.getpid(), getattr(signal, name))
        return F.cross_entropy(outputs, target)

    return At(F.cross_entropy, number, loss_fn)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_an_echo_is_the_same_signal(tmp_path, name, monkeypatch):
    """`timeout` and torchrun send theirs to a process that has it already: all is saved."""
    monkeypatch.setattr(signals, "_ECHO_S", 100.0)  # however busy the machine is
    result = fit("textbook", tmp_path, loss_fn=at(4, name, name))
    assert (result.stop_reason, result.num_steps) == (name, 4)
    assert result.saves[-1].step == 4


def test_after_max_time_a_second_signal_stops_at_once(tmp_path, monkeypatch):
    """What hangs in the last step is not left to itself because its time is up."""
    monkeypatch.setattr(signals, "_ECHO_S", 0.0)

    class Interrupts(Callback):
        def on_fit_finished(self, event):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    model = torch.nn.Linear(4, 2)
    trainer = Trainer(run_dir=tmp_path, enable_progress_bar=False, device="cpu", max_time=1e-6)
    with pytest.raises(KeyboardInterrupt, match="SIGINT after SIGINT"):
        trainer.fit(
            model, torch.optim.SGD(model.parameters(), 0.1), Samples(), loss_fn=F.cross_entropy,
            batch_size=2, callbacks=[Interrupts()],
        )  # fmt: skip


class Stops(Callback):
    """Is stopped while the run is on its way to its first step."""

    def __init__(self, moment):
        self.moment = moment

    def on_fit_started(self, event):
        self.stop_at("started")

    def load_state_dict(self, state):
        self.stop_at("resumed")

    def stop_at(self, moment):
        if moment == self.moment:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("moment", ["started", "resumed"])
@pytest.mark.parametrize("first", [{"max_epochs": 1}, {"max_steps": 3}])
def test_a_signal_while_a_run_is_resumed(tmp_path, moment, first):
    """It makes no further step; the next one goes on as if nothing had been."""

    def train(run_dir, moment=None, **settings):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 2)
        trainer = Trainer(run_dir=run_dir, enable_progress_bar=False, device="cpu", **settings)
        return trainer.fit(
            model, torch.optim.SGD(model.parameters(), 0.1), Samples(), loss_fn=F.cross_entropy,
            batch_size=2, callbacks=[Stops(moment)],
        )  # fmt: skip

    whole = train(tmp_path / "whole", max_epochs=3)
    before = train(tmp_path / "part", **first)
    stopped = train(tmp_path / "part", moment, max_epochs=3, resume="auto")
    assert (stopped.stop_reason, stopped.num_steps) == ("SIGTERM", before.num_steps)
    assert train(tmp_path / "part", max_epochs=3, resume="auto").losses == whole.losses


def wait_for_a_signal(ready):
    ready.send(None)  # one that comes before Python has begun in a fork is lost to any handler
    signal.pause()


def test_a_fork_can_be_ended_with_sigterm(tmp_path):
    """A pool that a callback or a dataset forks ends its workers so, and waits for them."""
    found = []

    def loss_fn(outputs, target):
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        with ours, theirs:
            fork = context.Process(target=wait_for_a_signal, args=(theirs,))
            fork.start()
            ours.recv()
            fork.terminate()
            fork.join(20)
        found.append(fork.exitcode)
        fork.kill()
        fork.join()
        return F.cross_entropy(outputs, target)

    fit("textbook", tmp_path, loss_fn=At(F.cross_entropy, 4, loss_fn))
    assert found == [-signal.SIGTERM]


@pytest.mark.parametrize("is_saved", [True, False])
def test_it_is_said_how_to_go_on(tmp_path, capfd, is_saved):
    """With the folder, and only where there is something to go on from."""
    fit("textbook", tmp_path if is_saved else None, loss_fn=at(4, "SIGINT"))
    said = capfd.readouterr().err
    going_on = f"To go on from there, set run_dir={str(tmp_path)!r} and resume='auto' (on the command line"
    assert (going_on in said, "nothing is saved" in said) == (is_saved, not is_saved)
