"""A run is resumed where its data stood: loaders with an order of their own, data that has changed since."""

from __future__ import annotations

import itertools
import os
import random
import signal
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from pipeline import Callback, Loader, Trainer, prefetch

PLACES = {"textbook": {"schedule": "textbook"}, "inline": {"placement": "inline"}}


class Drawn(Dataset):
    """Its samples' numbers, with something drawn behind the point."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return torch.full((3,), float(index)) + torch.rand(3)


class Telling(Callback):
    """Tells a sampler its epoch, as a plain loop does before each."""

    def __init__(self, sampler):
        self.sampler = sampler

    def on_epoch_finished(self, event):
        self.sampler.set_epoch(event.state.epoch + 1)


def shuffled(count, **options):
    return DataLoader(Drawn(count), 4, shuffle=True, **options)


def of_one_generator():
    generator = torch.Generator().manual_seed(3)
    return {"data": shuffled(22, generator=generator), "val_data": shuffled(8, generator=generator)}


def told_its_epoch(**options):
    sampler = DistributedSampler(Drawn(22), 1, 0)
    return {"data": DataLoader(Drawn(22), 4, sampler=sampler, **options), "callbacks": [Telling(sampler)]}


KINDS = {
    "a loader of ours": lambda: {"data": Loader(Drawn(22), batch_size=4, shuffle=True)},
    "prefetch": lambda: {"data": prefetch(DataLoader(Drawn(22), 4), device="cpu")},
    "one generator for two loaders": of_one_generator,
    "a generator of the validation's": lambda: {
        "data": shuffled(22), "val_data": shuffled(8, generator=torch.Generator().manual_seed(1)),
    },
    "a loader of ours to validate on": lambda: {
        "data": shuffled(22), "val_data": Loader(Drawn(8), batch_size=4),
    },
    "a sampler that is told its epoch": told_its_epoch,
    "the same, run as it is": lambda: told_its_epoch(worker_init_fn=print),
}  # fmt: skip


def run(data, *, val_data=None, stop_at=0, callbacks=(), batch_size=4, **options):
    """Train; return the batches of training and of validation, as lists, and what was warned of."""
    torch.manual_seed(7)
    model, seen = torch.nn.Linear(3, 1), {True: [], False: []}

    def step(model, batch):
        found = seen[torch.is_grad_enabled()]
        found.append(batch.tolist())
        if torch.is_grad_enabled() and len(found) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return model(batch).square().mean()

    trainer = Trainer(**{"run_dir": None, "enable_progress_bar": False, "device": "cpu", **options})
    batching = {"batch_size": batch_size} if isinstance(data, (Drawn, IterableDataset)) else {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(
            model, torch.optim.SGD(model.parameters(), 1e-4), data, step=step, val_data=val_data,
            callbacks=callbacks, shuffle=isinstance(data, Drawn), **batching,
        )  # fmt: skip
    return seen[True], seen[False], [str(each.message) for each in caught]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("stop_at", [3, 8, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_the_batches_are_those_of_a_run_that_was_not_stopped(tmp_path, kind, stop_at, place):
    """Those of the training and of each validation, between two epochs and in the middle of one."""
    options = {"max_epochs": 3, "val_check_interval": 2, **PLACES[place]}
    whole = run(**KINDS[kind](), **options)
    first = run(**KINDS[kind](), stop_at=stop_at, run_dir=tmp_path, **options)
    rest = run(**KINDS[kind](), run_dir=tmp_path, resume="auto", **options)
    assert [first[0] + rest[0], first[1] + rest[1]] == [whole[0], whole[1]]
    assert [each for each in rest[2] if "draw from one generator" not in each] == []
    assert any("draw from one generator" in each for each in rest[2]) == ("one generator" in kind)


def stopped(tmp_path, data, **options):
    """Stop a run in the middle of an epoch of six batches."""
    assert len(run(data, stop_at=2, run_dir=tmp_path, **options)[0]) == 2


def test_a_dataset_that_has_grown_finishes_its_epoch_first(tmp_path):
    """The epoch that is resumed is as long, and in the order, as when it began; the next one has all."""
    whole = run(Drawn(22))[0]
    stopped(tmp_path, Drawn(22), max_epochs=2)
    rest, _, said = run(Drawn(30), run_dir=tmp_path, resume="auto", max_epochs=2)
    assert rest[:4] == whole[2:]
    assert sorted(int(row[0]) for batch in rest[4:] for row in batch) == list(range(30))
    assert said == []


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (lambda: Drawn(22), lambda: Drawn(18)),
        (lambda: Drawn(22), lambda: Drawn(5)),
        (lambda: shuffled(22), lambda: shuffled(30)),
        (lambda: shuffled(22), lambda: DataLoader(Drawn(22), 4)),
        (lambda: shuffled(22), lambda: DataLoader(Drawn(22), 2, shuffle=True)),
    ],
    ids=["fewer", "too few", "more, of a sampler", "not shuffled", "other batches"],
)
def test_another_order_in_the_middle_of_an_epoch_is_said(tmp_path, before, now):
    """Samples would be lost and doubled without a word."""
    stopped(tmp_path, before())
    said = run(now(), run_dir=tmp_path, resume="auto")[2]
    assert len(said) == 1
    assert said[0].startswith("train_data has its samples in another order than in the epoch that is resumed")


class Counted(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(66.0).view(22, 3))


def test_another_batch_size_of_an_iterable_dataset_is_said(tmp_path):
    """As many batches are left out as were used, whatever their size."""
    stopped(tmp_path, Counted())
    said = run(Counted(), batch_size=2, run_dir=tmp_path, resume="auto")[2]
    assert len(said) == 1
    assert said[0].startswith("batch_size was 4 and is 2")


def endless():
    while True:
        yield torch.rand(4, 3) + random.random()


@pytest.mark.parametrize("make", [endless, lambda: itertools.cycle(shuffled(22))], ids=["generator", "cycle"])
def test_an_iterator_that_begins_again_is_said(tmp_path, make):
    """Its epochs are pieces of one stream; where a fresh one stands, only its user can know."""
    options = {"max_epochs": 3, "limit_train_batches": 5}
    run(make(), stop_at=3, run_dir=tmp_path / "first", **options)
    assert run(make(), run_dir=tmp_path / "first", resume="auto", **options)[2] == []
    run(make(), stop_at=7, run_dir=tmp_path / "second", **options)
    said = run(make(), run_dir=tmp_path / "second", resume="auto", **options)[2]
    assert len(said) == 1
    assert "of which 1 epochs were used before the run was stopped" in said[0]


@pytest.mark.parametrize("stop_at", [3, 6, 8])
def test_a_loader_that_is_kept_is_resumed_in_its_epoch(tmp_path, stop_at):
    """In the same process, as in a notebook: it has counted an epoch more than the run has finished."""
    whole, _, _ = run(Loader(Drawn(22), batch_size=4, shuffle=True), max_epochs=3)
    loader = Loader(Drawn(22), batch_size=4, shuffle=True)
    first, _, _ = run(loader, stop_at=stop_at, run_dir=tmp_path, max_epochs=3)
    rest, _, _ = run(loader, run_dir=tmp_path, resume="auto", max_epochs=3)
    assert first + rest == whole


class Positioned(list):
    """Batches that know where they stand."""

    def state_dict(self):
        return {"at": 0}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize("is_dataset_first", [True, False])
def test_data_of_another_kind_in_the_middle_of_an_epoch_is_said(tmp_path, is_dataset_first):
    """A dataset, and then batches that have a state; or the other way round."""
    kinds = [Drawn(22), Positioned(torch.ones(6, 4, 3))]
    before, after = kinds if is_dataset_first else reversed(kinds)
    stopped(tmp_path, before, max_epochs=2)
    found, _, warned = run(after, run_dir=tmp_path, resume="auto", max_epochs=2)
    assert len(found) == 10
    assert any("train_data is of another kind" in each for each in warned)
