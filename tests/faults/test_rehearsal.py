"""What a checkpoint cannot hold is said before the first step, and ends no run that would do without it."""

from __future__ import annotations

import collections
import os
import random
import re
import signal
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from pipeline import Callback, CheckpointError, Trainer
from pipeline.checkpoint import load_checkpoint
from tests.textbook import assert_same_weights, weights

DATA = TensorDataset(torch.randn(24, 3), torch.randn(24, 1))
SCHEDULES = ["textbook", "overlap"]


@contextmanager
def recorded():
    """Gather warnings, those of the writer thread too."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


class Keeps(Callback):
    """Has a state, from some step on."""

    def __init__(self, state, since=0):
        self.state, self.since, self.steps = state, since, []

    def on_step_finished(self, event):
        self.steps.append(event.state.step)

    def state_dict(self):
        return self.state if len(self.steps) >= self.since else {}


class Extra(torch.nn.Linear):
    """A module with an extra state."""

    extra = None

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def fit(run_dir, *, callbacks=(), make_scheduler=None, make_optimizer=None, extra=None, **settings):
    torch.manual_seed(0)
    model = Extra(3, 1)
    model.extra = extra
    optimizer = (make_optimizer or (lambda each: torch.optim.AdamW(each, 0.1)))(model.parameters())
    scheduler = None if make_scheduler is None else make_scheduler(optimizer)
    trainer = Trainer(run_dir=run_dir, enable_progress_bar=False, device="cpu", **settings)
    result = trainer.fit(
        model, optimizer, DATA, loss_fn=F.mse_loss, batch_size=4, callbacks=callbacks, scheduler=scheduler,
        scheduler_interval="step",
    )  # fmt: skip
    return result, model


class Holds(torch.optim.lr_scheduler.StepLR):
    """A scheduler with an attribute."""

    def __init__(self, optimizer, held):
        self.held = held
        super().__init__(optimizer, 1, 0.9)


REFUSED = {
    "callback": ({"callbacks": [Keeps({"x": {"y": object()}})]},
                 r"callbacks\[0\]\.state_dict\(\)\['x\.y'\] is a object"),
    "whole": ({"callbacks": [Keeps({}), Keeps(print)]}, r"callbacks\[1\]\.state_dict\(\) is a builtin"),
    "module": ({"extra": random.Random()}, r"model\.state_dict\(\)\['_extra_state'\] is a Random"),
    "scheduler": ({"make_scheduler": lambda each: Holds(each, random.Random())},
                  r"scheduler\.state_dict\(\)\['held'\] is a Random.*Let its state_dict"),
}  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_held_is_named_before_the_first_step(tmp_path, name, schedule):
    """As its owner knows it; with warn the run goes on without checkpoints."""
    arguments, message = REFUSED[name]
    counts = Keeps({})
    callbacks = [*arguments.get("callbacks", ()), counts]
    with pytest.raises(CheckpointError, match=message):
        fit(tmp_path / "a", schedule=schedule, **{**arguments, "callbacks": callbacks})
    assert not counts.steps
    with recorded() as caught:
        result, _ = fit(
            tmp_path / "b",
            schedule=schedule,
            on_checkpoint_error="warn",
            **{**arguments, "callbacks": callbacks},
        )
    first, second = (str(each.message) for each in caught)
    assert first.startswith("none of this run's checkpoints can be written: ")
    assert second.startswith("the checkpoint of step 6 could not be written: ")
    assert re.search(message, first)
    assert re.search(message, second)
    assert result.num_steps == 6


def test_nothing_is_tried_where_nothing_is_written():
    """Whoever keeps what no file can hold, and wants none, is left alone."""
    assert fit(None, callbacks=[Keeps({"x": object()})])[0].num_steps == 6


class Odd(torch.optim.SGD):
    """An optimizer whose state appears in its first step."""

    def step(self, closure=None):
        for group in self.param_groups:
            for each in group["params"]:
                self.state[each]["rng"] = random.Random()
        return super().step(closure)


def test_what_appears_in_the_first_step_is_named_behind_it(tmp_path):
    """An optimizer's state, which is not there before; nothing but a step is lost."""
    counts = Keeps({})
    with pytest.raises(CheckpointError, match=r"optimizer\.state_dict\(\)\['state\.0\.rng'\] is a Random"):
        fit(tmp_path, make_optimizer=lambda each: Odd(each, 0.1), callbacks=[counts])
    assert counts.steps == [1]


def test_what_appears_later_is_an_error_of_the_checkpoint(tmp_path):
    """The older ones are there; with warn they are kept, and training goes on."""
    settings = {"checkpoint_every_n_steps": 2, "max_epochs": 1}
    with pytest.raises(CheckpointError, match=r"callbacks\[0\]\.state_dict\(\)\['x'\] is a object") as caught:
        fit(tmp_path / "a", callbacks=[Keeps({"x": object()}, since=4)], **settings)
    assert "stage 'checkpoint', step 4" in str(caught.value.__notes__)
    with recorded() as said:
        result, _ = fit(
            tmp_path / "b",
            callbacks=[Keeps({"x": object()}, since=4)],
            on_checkpoint_error="warn",
            **settings,
        )
    assert result.num_steps == 6
    steps = [str(each.message).partition(" could")[0] for each in said]
    assert steps == ["the checkpoint of step 4"] + 2 * ["the checkpoint of step 6"]  # due, and the epoch's
    for folder in ("a", "b"):
        names = [each.name for each in (tmp_path / folder / "checkpoints").iterdir()]
        assert names == ["step-00000002.safetensors"]


def test_a_state_that_is_not_there_yet_is_no_error(tmp_path):
    """A callback whose state_dict works from its first step on is saved as before."""

    class Late(Keeps):
        def state_dict(self):
            return {"last": self.steps[-1]}

    result, _ = fit(tmp_path / "a", callbacks=[Late({})])
    assert load_checkpoint(result.last_checkpoint)["callbacks"]["callbacks"][0]["state"] == {"last": 6}

    class Never(Keeps):
        def state_dict(self):
            return {"last": self.other}

    with pytest.warns(RuntimeWarning, match="after step 1: AttributeError"), pytest.raises(AttributeError):
        fit(tmp_path / "b", callbacks=[Never({})])


def test_the_best_is_not_missed_where_a_file_could_not_be_written(tmp_path):
    """Its second name cannot be given: a warning, as for the file itself."""
    model = torch.nn.Linear(3, 1)
    trainer = Trainer(
        run_dir=tmp_path, enable_progress_bar=False, device="cpu", on_checkpoint_error="warn", max_steps=3
    )
    optimizer, callbacks = torch.optim.SGD(model.parameters(), 0.1), [Keeps({"x": object()})]
    with recorded() as said:
        result = trainer.fit(
            model, optimizer, DATA, loss_fn=F.mse_loss, batch_size=4, val_data=DATA, callbacks=callbacks
        )
    assert "the best checkpoint, of step 3, could not be kept" in str(said[-1].message)
    assert result.num_steps == 3


HELD = {
    "numpy": np.float32(0.5), "array": np.arange(3), "tensor": torch.arange(3.0), "tuple": {(1, "a"): 2},
    "counter": collections.Counter("abb"), "default": collections.defaultdict(int, a=1), "set": {1, 2},
    "deque": collections.deque([1], maxlen=2), "functions": [len, print], "function": len,
    "nested": {"function": len, "number": 3, "states": [{"function": len, "number": 4}]},
}  # fmt: skip


@pytest.mark.parametrize("name", HELD)
def test_what_schedulers_callbacks_and_modules_keep_is_resumed(tmp_path, name):
    """Attributes that JSON does not have; functions are those that the fresh scheduler has."""
    make_scheduler = lambda each: Holds(each, HELD[name])  # noqa: E731
    is_plain = "function" not in str(HELD[name])
    options = {"make_scheduler": make_scheduler, "extra": HELD[name] if is_plain else None}
    options["callbacks"] = [Keeps({"held": HELD[name]} if is_plain else {})]
    whole, whole_model = fit(tmp_path / "whole", max_epochs=2, **options)
    fit(tmp_path / "part", max_epochs=1, **options)
    rest, model = fit(tmp_path / "part", max_epochs=2, resume="auto", **options)
    assert rest.losses.tolist() == whole.losses.tolist()
    assert torch.equal(model.weight, whole_model.weight)


@pytest.mark.parametrize(
    "make_scheduler",
    [
        lambda each: torch.optim.lr_scheduler.LambdaLR(each, lambda step: 0.9**step),
        lambda each: torch.optim.lr_scheduler.OneCycleLR(each, 0.2, total_steps=20),
        lambda each: torch.optim.lr_scheduler.CyclicLR(
            each, 0.1, 0.2, scale_fn=lambda x: 0.5, cycle_momentum=False
        ),
        lambda each: torch.optim.lr_scheduler.SequentialLR(
            each,
            [
                torch.optim.lr_scheduler.LinearLR(each),
                torch.optim.lr_scheduler.LambdaLR(each, lambda step: 0.5),
            ],
            [3],
        ),
        lambda each: torch.optim.lr_scheduler.ChainedScheduler(
            [torch.optim.lr_scheduler.LinearLR(each), torch.optim.lr_scheduler.ExponentialLR(each, 0.9)]
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected call of", "ignore:The epoch parameter")
def test_torchs_own_schedulers_are_resumed(tmp_path, make_scheduler):
    """Those with functions, and those with others inside."""
    whole, _ = fit(tmp_path / "whole", max_epochs=2, make_scheduler=make_scheduler)
    fit(tmp_path / "part", max_epochs=1, make_scheduler=make_scheduler)
    rest, _ = fit(tmp_path / "part", max_epochs=2, resume="auto", make_scheduler=make_scheduler)
    assert rest.losses.tolist() == whole.losses.tolist()


WORDS = TensorDataset(
    torch.randint(0, 50, (32, 5), generator=torch.Generator().manual_seed(0)),
    torch.randn(32, 4, generator=torch.Generator().manual_seed(1)),
)


def train_sparse(run_dir, asks_at=0, **settings):
    """Train an embedding with sparse gradients, accumulated; dies behind a checkpoint that was asked for."""
    torch.manual_seed(0)
    model = torch.nn.EmbeddingBag(50, 4, sparse=True)
    left = [asks_at or 10**6]

    def step(model, batch):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        if left[0] == -1:
            raise KeyError("dies")
        return F.mse_loss(model(batch[0]), batch[1])

    optimizer = torch.optim.SparseAdam(model.parameters(), 0.1)
    trainer = Trainer(
        run_dir=run_dir, enable_progress_bar=False, device="cpu", accumulate_grad_batches=4, **settings
    )
    return trainer.fit(model, optimizer, WORDS, step=step, batch_size=4), model


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("asks_at", [1, 3, 6])
def test_sparse_gradients_in_the_middle_of_an_accumulation(tmp_path, schedule, asks_at):
    """They are held as they are, and resumed bit for bit."""
    whole, whole_model = train_sparse(tmp_path / "whole", schedule=schedule)
    with pytest.raises(KeyError, match="dies"):
        train_sparse(tmp_path / "cut", asks_at, schedule=schedule)
    rest, model = train_sparse(tmp_path / "cut", resume="auto")
    assert rest.losses.tolist() == whole.losses.tolist()
    assert_same_weights(weights(model), weights(whole_model))


def test_complex_weights_and_buffers_are_resumed(tmp_path):
    """Their optimizer's state is complex too."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(3, 1, dtype=torch.complex128))
            self.register_buffer("phase", torch.ones((), dtype=torch.complex128).conj())

        def forward(self, inputs):
            return (inputs.to(torch.complex128) @ self.weight * self.phase).abs().float()

    def train(run_dir, **settings):
        torch.manual_seed(0)
        model = Net()
        trainer = Trainer(run_dir=run_dir, enable_progress_bar=False, device="cpu", **settings)
        return trainer.fit(
            model, torch.optim.Adam(model.parameters()), DATA, loss_fn=F.mse_loss, batch_size=4
        )

    whole = train(tmp_path / "whole", max_epochs=2)
    train(tmp_path / "part", max_epochs=1)
    assert train(tmp_path / "part", max_epochs=2, resume="auto").losses.tolist() == whole.losses.tolist()
