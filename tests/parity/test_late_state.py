"""Datasets whose state begins to move late, or that keep what they have drawn: a plain loop's batches."""

from __future__ import annotations

import random
from contextlib import closing
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DataLoader, Sampler, Subset

from pipeline import Callback, Loader, Trainer
from pipeline.checks import looking
from pipeline.inbound.belt import Inbound
from pipeline.inbound.decide_placement import INLINE
from pipeline.inbound.process_place import ProcessPlace
from pipeline.randomness.seeds import sample_seed
from tests.parity.test_state import THREADS, Wandering, batches_of, promised, same, there_at_once, wandering
from tests.stateful import (
    KEPT_DRAWS,
    LATE,
    Augmenting,
    LateConnecting,
    LateLog,
    Plain,
    Stateful,
    Switched,
    Tuned,
    Worn,
    drawn,
)


def looking_always(patch):
    """Have every batch looked at, however long it takes beside one that is made in no time."""
    patch.setattr("pipeline.checks.checks.LOOK_RATIO", 1e9)
    patch.setattr("pipeline.inbound.process_place.looking", partial(looking, ratio=1e9))


@settings(max_examples=60)
@given(
    kind=st.sampled_from(LATE), seed=st.integers(0, 1000), size=st.integers(34, 120), epochs=st.integers(1, 2)
)
def test_what_begins_to_move_late_keeps_its_order(kind, seed, size, epochs):
    """What batches made ahead have counted, opened or read is put back before the loop makes them again."""
    with closing(kind(size)) as data:
        expected = promised(data, epochs=epochs)
    with closing(kind(size)) as data, pytest.MonkeyPatch.context() as patch:
        looking_always(patch)
        with wandering(*THREADS, seed=seed, most=30):
            found, _, _ = batches_of(data, "auto", epochs=epochs)
    assert same(found, expected)


@pytest.mark.parametrize("kind", LATE)
@pytest.mark.parametrize("placement", ["thread", "process"])
def test_what_begins_to_move_late_keeps_its_order_in_a_place_that_is_named(kind, placement, monkeypatch):
    """A worker looks at its own copy: the loop makes that batch and the others, from the state before."""
    looking_always(monkeypatch)
    monkeypatch.setattr(ProcessPlace, "is_there", there_at_once)
    with closing(kind(160)) as data:
        expected = promised(data)
    with closing(kind(160)) as data:
        found, warned, placed = batches_of(data, placement, num_workers=2)
    assert same(found, expected)
    if (kind, placement) != (LateConnecting, "process"):  # each process has a connection of its own
        assert any("changed" in each for each in warned)
        assert placed.limit


def drawn_in_a_plain_loop(data, epochs):
    """Return the batches whose samples draw from seeds of their own."""
    drawn.cache_clear()
    found = []
    for epoch in range(epochs):
        samples = []
        for index in range(len(data)):
            torch.manual_seed(sample_seed(3, epoch, index))
            samples.append(data[index])
        found += torch.stack(samples).split(4)
    drawn.cache_clear()
    return found


@pytest.mark.parametrize("kind", KEPT_DRAWS)
@pytest.mark.parametrize("placement", ["auto", "thread", "process"])
def test_draws_that_are_kept_are_those_of_a_plain_loop(kind, placement, monkeypatch):
    """Who keeps what was drawn makes all batches: a cache in each process would keep other draws."""
    monkeypatch.setattr(ProcessPlace, "is_there", there_at_once)
    expected = drawn_in_a_plain_loop(kind(), 3)
    with wandering(*THREADS):
        found, _, placed = batches_of(kind(), placement, epochs=3, seed=3, num_workers=2)
    assert same(found, expected)
    assert "keeps random numbers" in placed.limit


def test_a_cache_beside_draws_may_be_anywhere():
    """What is kept was not drawn: made again, a batch draws as much."""
    data = Augmenting()
    found, _, placed = batches_of(data, "thread", epochs=2, seed=3)
    assert placed.limit == ""
    assert placed.num_compared > 0
    assert same(found, drawn_in_a_plain_loop(Augmenting(), 2))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda data: Subset(data, list(range(99, 35, -1))),
        lambda data: Subset(Subset(data, torch.arange(99, -1, -1)), range(20, 84)),
        lambda data: ConcatDataset([data, Worn(28)]),
    ],
)
def test_a_samples_own_part_is_found_behind_a_wrapper(wrap):
    """A wrapped dataset knows a sample by another number; what it changes of it is looked at before."""
    expected = promised(wrap(Worn(36)), epochs=2)
    found, warned, _ = batches_of(wrap(Worn(36)), "thread", epochs=2)
    assert same(found, expected)
    assert not any("made twice" in each for each in warned)


@pytest.mark.parametrize("placement", ["auto", "thread", "process"])
def test_a_transform_that_is_switched_is_seen(placement, monkeypatch):
    """`eval()` of a module in the dataset, between two epochs."""
    monkeypatch.setattr(ProcessPlace, "is_there", there_at_once)
    data = Switched()
    with wandering(*THREADS), Loader(data, batch_size=4, placement=placement, num_workers=2) as loader:
        for epoch in range(4):
            data.transform.train(epoch % 2 == 0)
            assert {float(value) for value in torch.cat(list(loader))[:, 1]} == {float(epoch % 2)}


class Epochs(Stateful):
    """Knows its epoch."""

    epoch = 0

    def value(self, index):
        return self.epoch


@pytest.mark.parametrize("placement", ["auto", "thread"])
def test_a_number_that_is_set_for_each_epoch_keeps_no_batch_in_the_loop(placement):
    """`set_epoch` between two epochs is no change while batches are made ahead, however often."""
    data, seen, model = Epochs(48), [], torch.nn.Linear(2, 1)

    class SetEpoch(Callback):
        def on_epoch_finished(self, event):
            data.epoch = event.state.epoch + 1

    def step(model, batch):
        seen.append(batch[:, 1].tolist())
        return model(batch).square().mean() * 1e-6

    trainer = Trainer(
        max_epochs=8, run_dir=None, enable_progress_bar=False, device="cpu", placement=placement
    )
    with wandering(INLINE):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        result = trainer.fit(model, optimizer, data, step=step, batch_size=4, callbacks=[SetEpoch()])
    assert seen == [[float(epoch)] * 4 for epoch in range(8) for _ in range(12)]
    assert result.placement.limit == ""


class Weighted(Sampler):
    """Draws samples with a generator and weights of its own."""

    def __init__(self):
        self.rng, self.low = random.Random(0), 0

    def __len__(self):
        return 400

    def __iter__(self):
        for _ in range(400):
            yield self.rng.randrange(self.low, 64)


def test_a_sampler_that_a_callback_changes_is_watched_though_it_moves_itself():
    """Its generator moves with each batch, as it should; its weights are changed by somebody else."""
    sampler, seen, model = Weighted(), [], torch.nn.Linear(2, 1)

    class Curriculum(Callback):
        def on_step_finished(self, event):
            if event.state.step == 40:
                sampler.low = 32

    def step(model, batch):
        seen.append(int(batch[:, 0].min()))
        return model(batch).square().mean() * 1e-6

    trainer = Trainer(run_dir=None, enable_progress_bar=False, device="cpu")
    with wandering(INLINE, seed=0, most=200), pytest.MonkeyPatch.context() as patch:
        looking_always(patch)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        loader = DataLoader(Plain(64), 4, sampler=sampler)
        result = trainer.fit(model, optimizer, loader, step=step, callbacks=[Curriculum()])
    assert result.placement.limit.startswith("train_data.sampler.low changed while")
    assert min(seen[60:]) >= 32


@pytest.mark.parametrize("placement", ["auto", "thread"])
def test_a_change_in_one_epoch_keeps_no_batch_of_the_next_in_the_loop(placement, monkeypatch):
    """A callback changes the dataset once, near the end of a short epoch: later ones are made ahead again."""
    looking_always(monkeypatch)
    data, seen, ahead, model = Tuned(40), [], [], torch.nn.Linear(2, 1)
    make_ahead = Inbound._made_ahead

    class Once(Callback):
        def on_step_finished(self, event):
            if event.state.step == 6:
                data.level = 2.0

    def step(model, batch):
        seen.append(batch)
        return model(batch).square().mean() * 1e-9

    def noting(self, place, reader):
        ahead.append(len(seen))
        return make_ahead(self, place, reader)

    monkeypatch.setattr(Inbound, "_made_ahead", noting)
    options = {"placement": placement, "num_workers": 2, "enable_progress_bar": False, "device": "cpu"}
    trainer = Trainer(max_epochs=4, run_dir=None, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    monkeypatch.setattr("pipeline.inbound.belt.Auto", lambda *_: Wandering([INLINE], random.Random(0)))
    with pytest.warns(UserWarning, match="data.level changed"):
        trainer.fit(model, optimizer, data, step=step, batch_size=4, callbacks=[Once()])
    assert any(count >= 20 for count in ahead)


def test_workers_out_of_order_lose_no_batch(monkeypatch):
    """Nobody looks at their copies: what was handed over already is not all that comes before the change."""
    looking_always(monkeypatch)
    settings = {"placement": "process", "num_workers": 2, "in_order": False}
    with closing(LateLog(160)) as data, Loader(data, batch_size=4, **settings) as loader:
        loader._inbound.start_processes(2)
        loader._inbound._processes.wait_until_ready()
        assert loader._inbound._place._look() is None
        found = torch.cat(list(loader))[:, 0]
    assert sorted(found.tolist()) == list(range(160))


def test_what_no_worker_can_have_by_now_is_made_in_the_loop(monkeypatch):
    """torch's default device is changed after workers have started: that ends no run."""
    with Loader(Plain(64), batch_size=4, placement="process", num_workers=2) as loader:
        loader._inbound.start_processes(2)
        loader._inbound._processes.wait_until_ready()
        before = list(loader)
        monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda"))
        with pytest.warns(UserWarning, match="set_default_device"):
            after = list(loader)
    assert same(before, after)
