"""A run that is stopped anywhere and resumed gives the numbers of the run that never was, bit for bit.

`BELTS` says how batches are made and numbers taken away. A run is saved under one and resumed under
another: a new placement is added here, and everything below is tried on it.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from pipeline import Callback, EarlyStopping, SimulatedBackend, Trainer
from pipeline.metrics import accuracy
from pipeline.workers import Processes
from tests.textbook import assert_same_weights, build_model, weights

BELTS = {
    "textbook": {"schedule": "textbook"},
    "overlap-inline": {"schedule": "overlap", "placement": "inline", "prefetch_depth": 3},
    "overlap-thread": {"schedule": "overlap", "placement": "thread", "num_workers": 3},
    "overlap-process": {"schedule": "overlap", "placement": "process", "num_workers": 2},
    "overlap-simulated": {"schedule": "overlap", "prefetch_depth": 2, "device": "simulated"},
}
STOPS = [
    (belt, stop) for belt in BELTS for stop in range(1, 21) if belt != "overlap-process" or stop % 4 == 3
]
OTHER = dict(zip(BELTS, [*list(BELTS)[1:], next(iter(BELTS))], strict=True))
CHANGING = ("time/", "gil/", "rate/", "memory/")


@pytest.fixture(autouse=True)
def workers_are_waited_for(monkeypatch):
    """Have every batch made by a worker; as it is, the loop makes them until the workers are there."""
    monkeypatch.setattr(Processes, "is_ready", lambda self, *counts: self._pool.wait_until_ready(60.0))


class Augmented(Dataset):
    """Draws from torch's generator for each sample."""

    def __init__(self, num_samples):
        self.inputs = torch.randn(num_samples, 6, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return self.inputs[index] + torch.randn(6) * 0.1, int(torch.randint(0, 3, ()))


class Drawing(Callback):
    """Has a state, and moves Python's and NumPy's generators at each step."""

    def on_fit_started(self, event):
        self.seen = 0

    def on_step_finished(self, event):
        self.seen += 1
        scale = 1 + 1e-3 * (random.random() + np.random.rand())
        for group in event.state.optimizer.param_groups:
            group["weight_decay"] = 1e-3 * scale * self.seen

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class StopAt(Callback):
    """Interrupts the run as a signal does, when so many micro-batches have been used; 0 for never."""

    def __init__(self, micro_batch):
        self.left = micro_batch

    def loss_fn(self, outputs, target):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return F.cross_entropy(outputs, target)


def run(
    run_dir,
    belt,
    *,
    stop_at=0,
    stopper=StopAt,
    make_data=None,
    kind="conv",
    accumulate=1,
    scheduler=None,
    **options,
):
    """Train a small model with everything on that has a state; the weights begin from one seed."""
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    model = build_model(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    belts = dict(BELTS[belt])
    device = SimulatedBackend() if belts.pop("device", "cpu") == "simulated" else "cpu"
    data = Augmented(22) if make_data is None else make_data()
    is_loader = isinstance(data, (DataLoader, Stateful))
    batching = {} if is_loader else {"batch_size": 4, "shuffle": True}
    if isinstance(data, IterableDataset):
        batching = {"batch_size": 2, "num_shards": data.num_shards}
    trainer = Trainer(
        run_dir=run_dir, enable_progress_bar=False, accumulate_grad_batches=accumulate, ema_decay=0.9,
        gradient_clip_val=0.5, device=device, **{"max_epochs": 2, **belts, **options},
    )  # fmt: skip
    result = trainer.fit(
        model, optimizer, data, loss_fn=stopper(stop_at).loss_fn,
        val_data=DataLoader(Augmented(8), 4) if is_loader else Augmented(8),
        metrics={"accuracy": accuracy}, train_metrics={"accuracy": accuracy},
        callbacks=[Drawing(), EarlyStopping(patience=50)],
        scheduler=scheduler and torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
        scheduler_interval=scheduler or "epoch",
        **batching,
    )  # fmt: skip
    return result, model


def rows_of(run_dir):
    """Return the logged rows, but for what is time."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: each for name, each in row.items() if not name.startswith(CHANGING)} for row in rows]


def assert_same_run(found, expected, found_dir, expected_dir):
    (result, model), (whole, whole_model) = found, expected
    assert result.losses.tolist() == whole.losses.tolist()
    assert_same_weights(weights(model), weights(whole_model))
    assert_same_weights(weights(result.ema_model), weights(whole.ema_model))
    assert rows_of(found_dir) == rows_of(expected_dir)
    assert (result.num_steps, result.num_epochs) == (whole.num_steps, whole.num_epochs)
    strip = lambda rows: [(row.step, row.epoch, row.values) for row in rows]  # noqa: E731
    assert strip(result.history) == strip(whole.history)


def check(folder, belt, then, stop_at, **options):
    """Run once without a stop, once with, resume under another belt, and compare."""
    expected = run(folder / "whole", belt, **options)
    result, _ = run(folder / "cut", belt, stop_at=stop_at, **options)
    assert result.stop_reason == "SIGTERM"
    found = run(folder / "cut", then, resume="auto", **options)
    assert found[0].resumed_from == result.last_checkpoint
    assert_same_run(found, expected, folder / "cut", folder / "whole")


@pytest.mark.parametrize(("belt", "stop_at"), STOPS)
def test_every_step_of_a_run(tmp_path, belt, stop_at):
    """Twelve steps and eight batches of validation in two epochs: stopped at each, resumed elsewhere."""
    check(tmp_path, belt, OTHER[belt], stop_at, val_check_interval=4, scheduler="step")


@given(
    belt=st.sampled_from(list(BELTS)),
    then=st.sampled_from(list(BELTS)),
    stop_at=st.integers(1, 12),
    accumulate=st.integers(1, 4),
    depth=st.integers(1, 9),
    kind=st.sampled_from(["linear", "dropout", "conv"]),
    scheduler=st.sampled_from([None, "step", "epoch"]),
    every_n=st.none() | st.integers(1, 3),
)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_step_accumulation_belt_and_depth(
    tmp_path_factory, belt, then, stop_at, accumulate, depth, kind, scheduler, every_n
):
    """Whatever a run is made of, and whatever it goes on with."""
    folder = tmp_path_factory.mktemp("run")
    options = {"accumulate": accumulate, "kind": kind, "scheduler": scheduler}
    expected = run(folder / "whole", belt, **options)
    result, _ = run(folder / "cut", belt, stop_at=stop_at, checkpoint_every_n_steps=every_n, **options)
    assert result.stop_reason == "SIGTERM"
    found = run(folder / "cut", then, resume="auto", max_steps=None, max_log_lag=depth, **options)
    assert_same_run(found, expected, folder / "cut", folder / "whole")
    shutil.rmtree(folder)


class AskAt(StopAt):
    """Asks for a checkpoint, as a user does with SIGUSR1, and then fails."""

    def loss_fn(self, outputs, target):
        self.left -= torch.is_grad_enabled()
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        if self.left == -1:
            raise KeyError("dies")
        return F.cross_entropy(outputs, target)


@pytest.mark.parametrize("belt", ["textbook", "overlap-inline", "overlap-simulated"])
@pytest.mark.parametrize("micro_batch", range(1, 12))
def test_in_the_middle_of_an_accumulation(tmp_path, belt, micro_batch):
    """A checkpoint between two micro-batches holds their gradients and sums."""
    options = {"accumulate": 3, "kind": "conv"}
    expected = run(tmp_path / "whole", belt, **options)
    with pytest.raises(KeyError, match="dies"):
        run(tmp_path / "cut", belt, stop_at=micro_batch, stopper=AskAt, **options)
    found = run(tmp_path / "cut", OTHER[belt], resume="auto", **options)
    assert_same_run(found, expected, tmp_path / "cut", tmp_path / "whole")


LOADERS = {
    "shuffled": lambda: DataLoader(Augmented(22), 4, shuffle=True),
    "own generator": lambda: DataLoader(
        Augmented(22), 4, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "collate": lambda: DataLoader(Augmented(22), 4, shuffle=True, worker_init_fn=print),
}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("stop_at", [1, 3, 6, 7, 11])
def test_a_data_loader(tmp_path, name, stop_at):
    """It draws its order from a generator when its epoch begins: it is given that moment again."""
    for belt in ("textbook", "overlap-inline"):
        check(tmp_path / belt, belt, OTHER[belt], stop_at, make_data=LOADERS[name], kind="dropout")


class Sharded(IterableDataset):
    """Shards of unequal length, whose samples depend on what was drawn before."""

    def __init__(self, num_shards):
        self.num_shards, self.walk = num_shards, torch.zeros(6)

    def __iter__(self):
        info, walk = get_worker_info(), self.walk
        for index in range(11 if info is None else 2 + 3 * info.id):
            walk = walk + torch.randn(6) + random.random()
            yield walk, index % 3


def make_sharded():
    return Sharded(3)


def make_stream():
    return Sharded(1)


@pytest.mark.filterwarnings("ignore:random numbers were drawn")
@pytest.mark.parametrize("make_data", [make_sharded, make_stream])
@pytest.mark.parametrize("stop_at", [1, 4, 5, 8, 11])
def test_an_iterable_dataset(tmp_path, make_data, stop_at):
    """It is read again up to its place, in whatever place the run goes on."""
    for belt in ("textbook", "overlap-inline", "overlap-process"):
        check(tmp_path / belt, belt, OTHER[belt], stop_at, make_data=make_data, kind="dropout")


class Stateful:
    """A loader that knows where it is, and counts what it is asked for."""

    def __init__(self):
        self.data, self.position, self.num_made = Augmented(22), 0, 0

    def __iter__(self):
        while self.position < 5:
            self.position += 1
            self.num_made += 1
            rows = slice(4 * self.position, 4 * self.position + 4)
            inputs = self.data.inputs[rows]
            yield inputs, torch.arange(len(inputs)) % 3
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


@pytest.mark.parametrize("belt", ["textbook", "overlap-inline"])
@pytest.mark.parametrize("stop_at", [1, 3, 4, 7])
def test_a_loader_with_a_state_is_resumed_through_it(tmp_path, belt, stop_at):
    """It is given the state of the batch consumed, however far ahead it was, and reads nothing again."""
    loaders = []

    def make():
        loaders.append(Stateful())
        return loaders[-1]

    check(tmp_path, belt, OTHER[belt], stop_at, make_data=make, kind="linear")
    whole, _, resumed = loaders
    used_before = stop_at if stop_at <= 5 else stop_at - 2  # a validation of two batches is behind epoch 0
    assert resumed.num_made == whole.num_made - used_before


def test_resuming_twice_and_after_the_end(tmp_path):
    """A run in three parts is the same run; one that is over does nothing more when it is resumed."""
    expected = run(tmp_path / "whole", "textbook")
    run(tmp_path / "cut", "overlap-inline", stop_at=3)
    run(tmp_path / "cut", "textbook", stop_at=4, resume="auto")
    found = run(tmp_path / "cut", "overlap-inline", resume="auto")
    assert_same_run(found, expected, tmp_path / "cut", tmp_path / "whole")
    again = run(tmp_path / "cut", "textbook", resume="auto")
    assert again[0].stop_reason == "max_epochs"
    assert_same_run(again, expected, tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(("first", "then"), list(itertools.product((5, 6, 7), (9, 12, 20))))
def test_a_run_of_some_steps_can_be_made_longer(tmp_path, first, then):
    """With max_steps raised, a run goes on in the middle of its epoch as if it had been longer at once."""
    expected = run(tmp_path / "whole", "textbook", max_epochs=None, max_steps=then)
    run(tmp_path / "cut", "overlap-inline", max_epochs=None, max_steps=first)
    found = run(tmp_path / "cut", "textbook", max_epochs=None, max_steps=then, resume="auto")
    assert_same_run(found, expected, tmp_path / "cut", tmp_path / "whole")


def test_the_comparison_can_fail(tmp_path):
    """Without the generators' states the resumed run is another one."""
    expected = run(tmp_path / "whole", "textbook", kind="dropout")
    run(tmp_path / "cut", "textbook", stop_at=3, kind="dropout")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.loop.resume.restore_generators", lambda *states: None)
        found = run(tmp_path / "cut", "textbook", kind="dropout", resume="auto")
    assert found[0].losses.tolist() != expected[0].losses.tolist()
