"""A loader's own state is asked for where a checkpoint needs it, and not at every batch."""

from __future__ import annotations

import os
import random
import signal

import pytest
import torch

from pipeline import Callback, CheckpointError, Loader, Trainer, prefetch
from pipeline.data.iterable_states import KeptStates

NUM_BATCHES = 200
BELTS = {
    "in turn": {"schedule": "textbook"},
    "ahead": {"schedule": "overlap", "placement": "inline", "prefetch_depth": 4},
}


class Stream:
    """A loader whose state is its place; counts how often it is asked for it, and what it has made."""

    def __init__(self, num_batches=NUM_BATCHES, draw=None):
        self.num_batches, self.draw = num_batches, draw or (lambda: 0.0)
        self.position = self.num_asked = self.num_made = 0

    def __iter__(self):
        try:
            while self.position < self.num_batches:
                self.position += 1
                self.num_made += 1
                yield torch.full((4, 3), self.position / self.num_batches) + self.draw()
        finally:
            self.position = 0  # whoever lets go of it begins anew

    def state_dict(self):
        self.num_asked += 1
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def run(data, *, run_dir=None, stop_at=0, callbacks=(), **settings):
    """Train; a signal comes in a certain step, as it does when nobody foresees it."""
    torch.manual_seed(0)
    model, left = torch.nn.Linear(3, 1), [stop_at]

    def step(model, batch):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return model(batch).square().mean()

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = Trainer(run_dir=run_dir, enable_progress_bar=False, device="cpu", **settings)
    return trainer.fit(model, optimizer, data, step=step, callbacks=callbacks)


@pytest.mark.parametrize("belt", BELTS)
def test_nobody_is_asked_where_nothing_is_written(belt):
    """No folder, no checkpoints: no state; nor where a loop of one's own is."""
    for options in ({}, {"enable_checkpointing": False}):
        data = Stream()
        run(data, **BELTS[belt], **options)
        assert data.num_asked == 0
    for batches in (Loader(data), prefetch(data)):
        assert len(list(batches)) == NUM_BATCHES
        assert data.num_asked == 0


def test_a_loop_that_reads_in_turn_asks_when_it_saves(tmp_path):
    """Once to see that the state can be held, once for each checkpoint in the middle of an epoch."""
    data = Stream()
    run(data, run_dir=tmp_path / "a", **BELTS["in turn"])
    assert data.num_asked == 2  # tried after the first batch, and again after the first step
    data = Stream()
    run(data, run_dir=tmp_path / "b", checkpoint_every_n_steps=50, **BELTS["in turn"])
    assert data.num_asked == 2 + 4


def test_a_loop_that_reads_ahead_asks_now_and_then(tmp_path):
    """At the first batches, more and more rarely, and where a checkpoint can be foreseen."""
    data = Stream()
    run(data, run_dir=tmp_path / "a", **BELTS["ahead"])
    assert data.num_asked < 30
    data = Stream()
    result = run(data, run_dir=tmp_path / "b", checkpoint_every_n_steps=70, max_steps=140, **BELTS["ahead"])
    assert data.num_asked < 30
    again = Stream()
    run(again, run_dir=tmp_path / "c", resume=result.last_checkpoint, **BELTS["ahead"])
    assert again.num_made == NUM_BATCHES - 140


@pytest.mark.parametrize("belt", BELTS)
@pytest.mark.parametrize("stop_at", [1, 50, 121, NUM_BATCHES])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_stop_that_nobody_foresaw_is_resumed_exactly(tmp_path, belt, stop_at, accumulate):
    """From the state at the step, or the newest before it and the batches in between, which draw the same."""
    options = {"accumulate_grad_batches": accumulate, "max_epochs": 2}
    draw = lambda: torch.rand(()) * 0.1  # noqa: E731
    whole = run(Stream(draw=draw), run_dir=tmp_path / "whole", **BELTS[belt], **options)
    run(Stream(draw=draw), run_dir=tmp_path / "cut", stop_at=stop_at, **BELTS[belt], **options)
    for other, settings in BELTS.items():
        data = Stream(draw=draw)
        path = max((tmp_path / "cut" / "checkpoints").glob("step-*"))
        result = run(data, run_dir=tmp_path / other, resume=path, **settings, **options)
        assert result.losses.tolist() == whole.losses.tolist()
        used = min(-(-stop_at // accumulate) * accumulate, NUM_BATCHES)
        is_read_again = 0 if belt == "in turn" else used // 3
        assert data.num_made <= 2 * NUM_BATCHES - used + is_read_again


def test_an_epoch_cut_short_by_a_limit_can_be_made_longer(tmp_path):
    """Its end was the loop's wish, and not the loader's."""
    for belt, settings in BELTS.items():
        whole = run(Stream(), run_dir=tmp_path / belt / "whole", max_steps=90, **settings)
        part = run(Stream(), run_dir=tmp_path / belt / "part", max_steps=40, **settings)
        data = Stream()
        rest = run(
            data, run_dir=tmp_path / belt / "rest", max_steps=90, resume=part.last_checkpoint, **settings
        )
        assert rest.losses.tolist() == whole.losses.tolist()
        assert data.num_made == 50


def test_a_state_that_cannot_be_held_is_refused_before_the_first_step(tmp_path):
    """By name, as soon as the loader has given a batch."""

    class Odd(Stream):
        def state_dict(self):
            return {"rng": random.Random()}

    steps = []

    class Counts(Callback):
        def on_step_finished(self, event):
            steps.append(event.state.step)

    for belt, settings in BELTS.items():
        with pytest.raises(CheckpointError, match=r"train_data\.state_dict\(\)\['rng'\] is a Random"):
            run(Odd(), run_dir=tmp_path / belt, callbacks=[Counts()], **settings)
    assert not steps


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.mark.parametrize(("state_s", "most"), [(0.0, 120), (0.001, 120), (0.02, 60), (1.0, 4)])
def test_states_take_one_percent_of_the_time(state_s, most):
    """A hundred seconds of batches of 10 ms, made ahead: dear states are kept more rarely."""
    clock = Clock()
    kept = KeptStates(lambda position: False, lambda state: None, 8, clock)
    num_asked = 0

    def ask():
        nonlocal num_asked
        num_asked += 1
        clock.now_s += state_s
        return num_asked

    for position in range(1, 10_001):
        clock.now_s += 0.01
        kept.made(position, ask, True, position == 1)
    assert num_asked <= most
    assert num_asked * state_s <= 0.05 + 0.01 * clock.now_s + state_s
    assert kept.newest(0) is None
    assert len(kept._states) < 12, "older ones are let go"
    assert 10_000 - kept.newest(10_000)[0] <= max(100, 100 * state_s / 0.01 + 2)


def test_a_position_that_is_foreseen_is_kept_whatever_it_takes():
    """There a checkpoint will be made."""
    kept = KeptStates(lambda position: position == 77, lambda state: None, 50, Clock())
    for position in range(1, 100):
        kept.made(position, lambda: [position], True, position == 1)  # noqa: B023
    assert kept.newest(77) == (77, [77])
    assert kept.newest(78) == (77, [77])
