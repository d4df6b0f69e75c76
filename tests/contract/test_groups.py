"""Groups of parameters, frozen ones and modes that callbacks change: a resumed run has them as they were."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from pipeline import Callback, CheckpointError, Trainer
from pipeline.checkpoint import load_checkpoint
from tests.textbook import assert_same_weights, weights

DATA = TensorDataset(
    torch.randn(24, 4, generator=torch.Generator().manual_seed(0)),
    torch.randn(24, 1, generator=torch.Generator().manual_seed(1)),
)
NUM_STEPS = 12


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
        self.backbone.requires_grad_(False)
        self.head = torch.nn.Sequential(torch.nn.Dropout(0.2), torch.nn.Linear(4, 1))

    def forward(self, inputs):
        return self.head(self.backbone(inputs).relu())


class Unfreezes(Callback):
    """Adds the backbone's group after the first epoch, and knows from its state that it has."""

    def __init__(self, model):
        self.model, self.is_done = model, False

    def state_dict(self):
        return {"is_done": self.is_done}

    def load_state_dict(self, state):
        self.is_done = state["is_done"]

    def add(self, optimizer):
        self.is_done = True
        self.model.backbone.requires_grad_(True)
        parameters = list(self.model.backbone.named_parameters(prefix="backbone"))
        if "param_names" not in optimizer.param_groups[0]:
            parameters = [each for _, each in parameters]
        optimizer.add_param_group({"params": parameters, "lr": 0.01})

    def on_epoch_finished(self, event):
        if event.state.epoch == 0 and not self.is_done:
            self.add(event.state.optimizer)


class AddsAgain(Unfreezes):
    """Adds its group again when it gets its state back."""

    def on_fit_started(self, event):
        self.optimizer = event.state.optimizer

    def load_state_dict(self, state):
        if state["is_done"]:
            self.add(self.optimizer)


class AddsAtOnce(Unfreezes):
    """Adds its group at the beginning of each fit."""

    def on_fit_started(self, event):
        self.add(event.state.optimizer)


class Forgets(Unfreezes):
    """Has no state: goes by the epoch alone."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Extends(Forgets):
    """Puts the parameters into the group that is there."""

    def add(self, optimizer):
        self.model.backbone.requires_grad_(True)
        optimizer.param_groups[0]["params"][:0] = self.model.backbone.parameters()


class Removes(Forgets):
    """Adds a group at once, and lets go of the first one after an epoch; what was in it is frozen."""

    def on_fit_started(self, event):
        Unfreezes.add(self, event.state.optimizer)

    def add(self, optimizer):
        if len(optimizer.param_groups) == 2:
            del optimizer.param_groups[0]
            self.model.head.requires_grad_(False)


class Quietens(Forgets):
    """Puts modules in evaluation mode."""

    def add(self, optimizer):
        self.model.backbone.eval()
        self.model.head[0].eval()


CALLBACKS = [Unfreezes, AddsAgain, AddsAtOnce, Forgets, Extends, Removes, Quietens]
OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.head.parameters(), 0.1, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.head.parameters(), 0.05),
    "named": lambda model: torch.optim.AdamW(model.head.named_parameters(prefix="head"), 0.05),
}


def stepwise(optim):
    return torch.optim.lr_scheduler.StepLR(optim, 1, 0.9)


def run(
    run_dir,
    kind,
    *,
    optimizer="adamw",
    stop_at=0,
    scheduler=None,
    make_scheduler=stepwise,
    wrap=lambda net: net,
    **settings,
):
    """Train two epochs of six steps, with a callback that changes what is trained after the first."""
    torch.manual_seed(7)
    net, left = Net(), [stop_at]
    model = wrap(net)

    def loss_fn(outputs, target):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return F.mse_loss(outputs, target)

    optim = OPTIMIZERS[optimizer](net)
    made = None if scheduler is None else make_scheduler(optim)
    trainer = Trainer(
        run_dir=run_dir, enable_progress_bar=False, device="cpu",
        **{"max_epochs": 2, "ema_decay": 0.9, **settings},
    )  # fmt: skip
    result = trainer.fit(
        model, optim, DATA, loss_fn=loss_fn, batch_size=4, shuffle=True, callbacks=[kind(net)],
        scheduler=made, scheduler_interval=scheduler or "epoch",
    )  # fmt: skip
    return result, net, optim


def assert_resumed(folder, kind, stop_at, **options):
    whole, whole_net, whole_optim = run(folder / "whole", kind, **options)
    run(folder / "cut", kind, stop_at=stop_at, **options)
    result, net, optim = run(folder / "cut", kind, resume="auto", **options)
    assert result.losses.tolist() == whole.losses.tolist()
    assert_same_weights(weights(net), weights(whole_net))
    shape = lambda each: [len(group["params"]) for group in each.param_groups]  # noqa: E731
    assert shape(optim) == shape(whole_optim)
    flags = lambda each: [parameter.requires_grad for parameter in each.parameters()]  # noqa: E731
    assert flags(net) == flags(whole_net)


@pytest.mark.parametrize("kind", CALLBACKS)
@pytest.mark.parametrize("stop_at", [1, 5, 6, 7, 11])
def test_groups_are_those_of_the_run_that_was_stopped(tmp_path, kind, stop_at):
    """Whether the callback knows from its state, does it again, or knows nothing."""
    assert_resumed(tmp_path, kind, stop_at, schedule="textbook")


@pytest.mark.parametrize("kind", [Unfreezes, AddsAgain, Extends])
@pytest.mark.parametrize("optimizer", ["sgd", "named"])
@pytest.mark.parametrize("scheduler", ["step", "epoch"])
def test_with_other_optimizers_schedulers_and_belts(tmp_path, kind, optimizer, scheduler):
    """In the middle of an accumulation too, under a compiled model, on the other schedule."""
    options = {"optimizer": optimizer, "scheduler": scheduler, "schedule": "overlap"}
    assert_resumed(tmp_path / "plain", kind, 8, **options)
    compiled = lambda net: torch.compile(net, backend="eager")  # noqa: E731
    assert_resumed(tmp_path / "compiled", kind, 9, accumulate_grad_batches=2, wrap=compiled, **options)


def test_a_file_that_knows_no_groups_is_resumed_where_they_fit(tmp_path, monkeypatch):
    """As older files are; where the numbers of groups differ, it is said."""
    monkeypatch.setattr("pipeline.state.groups.restore", lambda *arguments: None)
    assert_resumed(tmp_path / "fits", AddsAgain, 8)
    run(tmp_path / "differs", Unfreezes, stop_at=8)
    with pytest.raises(
        CheckpointError, match=r"optimizer does not fit this run's: .* number of parameter groups"
    ):
        run(tmp_path / "differs", Unfreezes, resume="auto")


class UnfreezesLambda(Unfreezes):
    """Gives the scheduler a function for its group; a resumed run's too, if it is told to."""

    does_again = True

    def on_fit_started(self, event):
        self.scheduler, self.rates = event.state.scheduler, event.state.scheduler.base_lrs

    def append(self):
        self.scheduler.lr_lambdas.append(lambda step: 0.5**step)

    def load_state_dict(self, state):
        super().load_state_dict(state)
        if self.does_again and self.is_done:
            self.append()

    def add(self, optimizer):
        super().add(optimizer)
        optimizer.param_groups[1]["initial_lr"] = 0.01
        self.rates.append(0.01)
        self.append()


def test_a_scheduler_with_a_function_for_each_group(tmp_path):
    """Functions are in no file: who appended one does so again, or is told before the first step."""
    lambdas = lambda optim: torch.optim.lr_scheduler.LambdaLR(optim, lambda step: 0.9**step)  # noqa: E731
    options = {"scheduler": "epoch", "make_scheduler": lambdas, "max_epochs": 3}
    assert_resumed(tmp_path / "again", UnfreezesLambda, 8, **options)

    class Forgetful(UnfreezesLambda):
        does_again = False

    Forgetful.__name__ = "UnfreezesLambda"
    with pytest.raises(CheckpointError, match=r"2 functions in lr_lambdas, this run's has 1"):
        run(tmp_path / "again" / "cut", Forgetful, resume="auto", **{**options, "max_epochs": 4})


def test_groups_that_cannot_be_found_are_refused(tmp_path):
    """A parameter that the model does not have is no group's."""
    run(tmp_path, Unfreezes, stop_at=8)

    class Other(Unfreezes):
        def load_state_dict(self, state):
            self.model.backbone = torch.nn.Identity()

    Other.__name__ = "Unfreezes"
    with pytest.raises(CheckpointError, match="optimizer does not fit"):
        run(tmp_path, Other, resume="auto")


def test_the_file_has_names_of_the_plain_model(tmp_path):
    """In the optimizer's groups too, where it was given names."""

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = torch.compile(torch.nn.Linear(4, 1), backend="eager")

        def forward(self, inputs):
            return self.module(inputs)

    model = Wrapped()
    optimizer = torch.optim.AdamW(model.named_parameters(), 0.1)
    trainer = Trainer(run_dir=tmp_path, enable_progress_bar=False, device="cpu")
    result = trainer.fit(model, optimizer, DATA, loss_fn=F.mse_loss, batch_size=4)
    found = load_checkpoint(result.last_checkpoint)
    assert list(found["model"]) == ["module.weight", "module.bias"]
    assert found["optimizer"]["param_groups"][0]["param_names"] == ["module.weight", "module.bias"]
    assert found["trained"]["groups"] == [["module.weight", "module.bias"]]
