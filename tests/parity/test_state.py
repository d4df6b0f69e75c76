"""Datasets with state: in every place a plain loop's batches, or a refusal before a wrong one is used."""

from __future__ import annotations

import random
import warnings
from contextlib import closing, contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, Sampler

from pipeline import Callback, ConfigError, Loader, PipelineError, Trainer
from pipeline.inbound.decide_placement import INLINE, TEXTBOOK, Place
from pipeline.inbound.process_place import ProcessPlace
from pipeline.report.placement_report import PlacementReport
from pipeline.testing import InMemoryLogger
from tests import stateful
from tests.stateful import (
    COUNTS,
    FUNCTIONS_OF_INDEX,
    IN_ORDER,
    CountingBehindReference,
    CountingInClass,
    CountingInClosure,
    Drawing,
    Plain,
    Rows,
    Stateful,
    Tabled,
    Tuned,
)

PLACES = ["auto", "inline", "thread", "process"]


def reset():
    """Put back what the datasets of a module share."""
    COUNTS["asked"], CountingInClass.num_asked, stateful.SCALE[0] = 0, 0, 1.0
    stateful.following.count = stateful.CountingInAbstract.num_asked = 0
    stateful.COUNT.set(0)


def promised(data, epochs=1, batch_size=4):
    """Return what a plain loop gets, sample after sample."""
    return [
        torch.stack([data[index] for index in range(start, min(start + batch_size, len(data)))])
        for _ in range(epochs)
        for start in range(0, len(data), batch_size)
    ]


def same(left, right):
    """Say whether two lists of batches are equal bit for bit."""
    return len(left) == len(right) and all(map(torch.equal, left, right))


def batches_of(data, placement, epochs=1, **arguments):
    """Return what the Trainer trains on, cloned, with what was warned of."""
    seen, model = [], torch.nn.Linear(2, 1)

    def step(model, batch):
        seen.append(batch.clone())
        return model(batch).square().mean() * 1e-6

    trainer = Trainer(
        max_epochs=epochs,
        run_dir=None,
        enable_progress_bar=False,
        device="cpu",
        placement=placement,
        **arguments,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        result = trainer.fit(model, optimizer, data, step=step, batch_size=4)
    return seen, [str(each.message) for each in caught], result.placement


@pytest.mark.parametrize("placement", ["auto", "inline", "thread"])
@pytest.mark.parametrize("kind", [*FUNCTIONS_OF_INDEX, *IN_ORDER])
def test_state_gives_the_batches_of_a_plain_loop(kind, placement):
    """Whatever a dataset keeps, each place trains on what a plain loop would have."""
    reset()
    with closing(kind()) as data:
        expected = promised(data, epochs=3)
    reset()
    with closing(kind()) as data:
        found, _, _ = batches_of(data, placement, epochs=3, num_workers=3)
    assert same(found, expected)


@pytest.mark.parametrize("kind", [*FUNCTIONS_OF_INDEX, *IN_ORDER])
def test_state_in_processes_is_that_of_a_plain_loop_or_refused(kind):
    """Processes get a copy: what moves stays in the loop, with a warning, and another table ends the run."""
    reset()
    with closing(kind(256)) as data:
        expected = promised(data)
    reset()
    found = []
    with warnings.catch_warnings(record=True) as caught, closing(kind(256)) as data:
        warnings.simplefilter("always")
        try:
            with Loader(data, batch_size=4, placement="process", num_workers=2) as loader:
                loader._inbound.start_processes(2)
                loader._inbound._processes.wait_until_ready()
                for batch in loader:
                    found.append(batch.clone())
        except PipelineError as error:
            refusal = str(error)
        else:
            refusal = ""
    assert same(found, expected[: len(found)])
    assert len(found) == len(expected) or refusal
    if kind in IN_ORDER:
        assert refusal or any("with the same numbers" in str(each.message) for each in caught)
    else:
        assert not refusal or kind is Tabled


class Wandering:
    """Goes from place to place, a few batches in each, as ``auto`` may."""

    is_settled = True

    def __init__(self, places, rng, most=9):
        self.places, self.rng, self.most, self.left = places, rng, most, 0
        self.place, self.visited = TEXTBOOK, []

    def choose(self, reader):
        if self.left <= 0:
            self.place, self.left = self.rng.choice(self.places), self.rng.randrange(1, self.most)
        self.visited.append(self.place)
        return self.place

    def goes_on(self):
        return self.left > 0

    def watch(self, batches):
        for batch in batches:
            self.left -= 1
            yield batch

    @property
    def report(self):
        return PlacementReport(str(self.place), "wandering", num_workers=self.place.num_workers)


@contextmanager
def wandering(*places, seed=0, most=9):
    """Have ``auto`` wander between places."""
    with pytest.MonkeyPatch.context() as patch:
        made = []

        def make(*_):
            made.append(Wandering([TEXTBOOK, *places], random.Random(seed), most))
            return made[-1]

        patch.setattr("pipeline.inbound.belt.Auto", make)
        yield made


THREADS = INLINE, Place("thread", 2), Place("thread", 4)


@settings(max_examples=40)
@given(
    kind=st.sampled_from([*FUNCTIONS_OF_INDEX, *IN_ORDER]),
    seed=st.integers(0, 1000),
    size=st.integers(5, 90),
    epochs=st.integers(1, 3),
)
def test_state_is_in_order_wherever_auto_goes(kind, seed, size, epochs):
    """From place to place and back, the batches are those of a plain loop."""
    reset()
    with closing(kind(size)) as data:
        expected = promised(data, epochs=epochs)
    reset()
    with closing(kind(size)) as data, wandering(*THREADS, seed=seed):
        found, _, _ = batches_of(data, "auto", epochs=epochs)
    assert same(found, expected)


def there_at_once(place, wanted, reader, forbid):
    """Wait for processes, where the belt would go on without them."""
    if not place.start(wanted.num_workers, wanted.num_threads):
        place.processes.wait_until_ready()
    return True


@settings(max_examples=15)
@given(
    kind=st.sampled_from([*FUNCTIONS_OF_INDEX, *IN_ORDER]),
    seed=st.integers(0, 1000),
    size=st.integers(24, 120),
    epochs=st.integers(1, 2),
)
def test_state_is_in_order_where_auto_goes_to_processes_too(kind, seed, size, epochs):
    """The same, with worker processes that are there at once: a copy of what moves is never used."""
    reset()
    with closing(kind(size)) as data:
        expected = promised(data, epochs=epochs)
    reset()
    processes = Place("process", 1), Place("process", 2)
    with closing(kind(size)) as data, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProcessPlace, "is_there", there_at_once)
        with wandering(*THREADS, *processes, seed=seed):
            try:
                found, _, _ = batches_of(data, "auto", epochs=epochs)
            except ConfigError:  # it does not pickle, which the real chooser takes for an obstacle
                assert kind in (Rows, CountingInClosure, CountingBehindReference)
                return
    assert same(found, expected)


class Change(Callback):
    """Changes something after some steps."""

    def __init__(self, at, change):
        self.at, self.change = at, change

    def on_step_finished(self, event):
        if event.state.step == self.at:
            self.change(event.state.step)


def tuned_loop(at, change_of, size=64, epochs=2):
    """Return what a plain loop gets if its dataset is changed after a step."""
    data, seen, step = Tuned(size), [], 0
    for _ in range(epochs):
        for start in range(0, size, 4):
            seen.append(torch.stack([data[index] for index in range(start, min(start + 4, size))]))
            step += 1
            if step == at:
                change_of(data)
    return seen


def set_level(data):
    """Change an attribute."""
    data.level = 2.5


@settings(max_examples=25)
@given(at=st.integers(1, 32), seed=st.integers(0, 100))
def test_a_change_by_a_callback_is_seen_in_the_next_batch(at, seed):
    """An attribute that a step changes decides the batch that follows, in an epoch and at its end."""
    data = Tuned()
    seen, model = [], torch.nn.Linear(2, 1)

    def step(model, batch):
        seen.append(batch.clone())
        return model(batch).square().mean() * 1e-6

    with wandering(*THREADS, seed=seed), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = Trainer(max_epochs=2, run_dir=None, enable_progress_bar=False, device="cpu")
        callbacks = [Change(at, lambda _: set_level(data))]
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        trainer.fit(model, optimizer, data, step=step, batch_size=4, callbacks=callbacks)
    is_late = any("without that change" in str(each.message) for each in caught)
    assert same(seen, tuned_loop(at, set_level)) or is_late


def test_a_pinned_place_sees_changes_between_epochs():
    """New lists, arrays and shared tensors are those of the next epoch's batches, without a warning."""
    data = Tuned()
    with Loader(data, batch_size=4, placement="thread", num_workers=2) as loader, warnings.catch_warnings():
        warnings.simplefilter("error")
        for level in (1.0, 2.0, 3.0):
            data.level = level
            assert torch.cat(list(loader))[:, 1].tolist() == [index * level for index in range(64)]


class Acting(Plain):
    """Makes its samples with a model."""

    def __init__(self, model, size=64):
        super().__init__(size)
        self.model = model

    def value(self, index):
        with torch.no_grad():
            return float(self.model(torch.full((1, 2), float(index))).sum())


def trained_by_hand(make_data, size=64):
    """Return the batches of a plain loop whose data uses the model that is trained."""
    torch.manual_seed(0)
    model, seen = torch.nn.Linear(2, 1), []
    data, optimizer = make_data(model), torch.optim.SGD(model.parameters(), lr=1e-4)
    for start in range(0, size, 4):
        batch = torch.stack([data[index] for index in range(start, start + 4)])
        seen.append(batch)
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return seen


@pytest.mark.parametrize("make_data", [Acting, lambda model: Acting(lambda each: model(each))])
@pytest.mark.parametrize("placement", ["auto", "inline", "thread"])
def test_a_dataset_that_uses_the_model_is_asked_in_its_turn(make_data, placement):
    """Samples that the model helps to make are made after the last update; so is what a closure hides."""
    torch.manual_seed(0)
    model, seen = torch.nn.Linear(2, 1), []

    def step(model, batch):
        seen.append(batch.clone())
        return model(batch).square().mean()

    trainer = Trainer(run_dir=None, enable_progress_bar=False, device="cpu", placement=placement)
    with wandering(*THREADS), warnings.catch_warnings(record=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        trainer.fit(model, optimizer, make_data(model), step=step, batch_size=4)
    assert same(seen, trained_by_hand(make_data))


@pytest.mark.parametrize("kind", ["generator", "iterator", "object"])
def test_what_yields_batches_itself_is_read_in_its_turn(kind):
    """A generator's batch is made after the step before it, unless a placement is named."""
    steps = [0]

    class Batches:
        def __iter__(self):
            for _ in range(40):
                yield torch.full((2, 2), float(steps[0]))

    ages, model = [], torch.nn.Linear(2, 1)

    def made(_):
        return torch.full((2, 2), float(steps[0]))

    data = {"object": Batches(), "generator": iter(Batches()), "iterator": map(made, range(40))}[kind]

    def step(model, batch):
        ages.append(steps[0] - int(batch[0, 0]))
        steps[0] += 1
        return model(batch).square().mean() * 1e-6

    with wandering(*THREADS):
        trainer = Trainer(max_steps=40, run_dir=None, enable_progress_bar=False, device="cpu")
        result = trainer.fit(model, torch.optim.SGD(model.parameters(), lr=1e-6), data, step=step)
    assert ages == [0] * 40
    assert result.placement.limit.startswith("train_data yields batches itself")


def test_who_knows_better_may_have_nothing_looked_at():
    """With check_data=False a dataset with a generator of its own is read by a thread."""
    data = Drawing(64)
    with Loader(data, batch_size=4, placement="inline", check_data=False) as loader:
        found = torch.cat(list(loader))
    assert torch.equal(found, torch.cat(promised(Drawing(64))))
    assert loader.placement.num_compared == 0
    assert loader.placement.checks_s == 0


@pytest.mark.parametrize(("placement", "oldest"), [("auto", 0), ("inline", 8)])
def test_rows_say_how_old_a_batch_is_that_yields_itself(placement, oldest):
    """How many batches were used while it was made and waited; none if it is read in its turn."""
    rows, model = InMemoryLogger(), torch.nn.Linear(2, 1)
    trainer = Trainer(run_dir=None, enable_progress_bar=False, device="cpu", placement=placement)
    data = (torch.ones(2, 2) for _ in range(40))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    trainer.fit(model, optimizer, data, step=lambda model, batch: model(batch).sum(), loggers=[rows])
    ages = [row.values["time/age_batches"] for row in rows.rows if "time/age_batches" in row.values]
    assert len(ages) == 40
    assert max(ages) <= oldest
    assert placement == "auto" or max(ages) > 0


class Frames(Stateful):
    """Takes frames from a stream, and turns some of them over; counts how often it was asked."""

    def __init__(self, size=32):
        super().__init__(size)
        self.stream, self.num_asked = iter(range(10**6)), 0

    def value(self, index):
        self.num_asked += 1
        return next(self.stream) * (1 if random.random() < 0.5 else -1)


@pytest.mark.parametrize("placement", ["textbook", "auto", "inline", "thread"])
def test_each_sample_of_a_stream_is_asked_for_once(placement):
    """A dataset that draws is not asked again for its first samples: what it reads is used."""
    data = Frames()
    settings = {"schedule": "textbook"} if placement == "textbook" else {}
    name = "auto" if placement == "textbook" else placement
    found, _, _ = batches_of(data, name, **settings)
    assert data.num_asked == 32
    assert torch.cat(found)[:, 1].abs().tolist() == list(range(32))


class Mined(Stateful):
    """Reads a list, an array and a tensor in shared memory, which a callback changes between epochs."""

    def __init__(self, size=48):
        super().__init__(size)
        self.items, self.table, self.shared = [0.0] * 4, np.zeros(3), torch.zeros(1).share_memory_()
        self.numbers = {"a": 0.0}

    def value(self, index):
        return self.items[index % 4] + self.table[0] + float(self.shared) + self.numbers["a"]


@pytest.mark.parametrize("placement", ["auto", "thread", "process"])
def test_what_changes_between_epochs_is_that_of_the_next_one(placement):
    """New lists, arrays written in place, shared tensors, values of a dict: wherever batches are made."""
    data, found = Mined(), []
    with Loader(data, batch_size=4, placement=placement, num_workers=2) as loader:
        if placement == "process":
            while not loader._inbound.is_ready():
                list(loader)
        for epoch in range(4):
            value = float(epoch)
            data.items, data.numbers["a"] = [value] * 4, value
            data.table[:] = value
            data.shared.fill_(value)
            found.append({float(each[1]) for batch in loader for each in batch})
    assert found == [{0.0}, {4.0}, {8.0}, {12.0}]


@pytest.mark.parametrize("placement", ["auto", "inline", "thread"])
def test_a_dataset_that_grows_is_as_long_as_it_is_at_each_epoch(placement):
    """As in a plain loop; a callback adds samples at the end of an epoch."""
    data, seen, model = Plain(16), [], torch.nn.Linear(2, 1)

    class Grow(Callback):
        def on_epoch_finished(self, event):
            data.size += 8

    def step(model, batch):
        seen.extend(batch[:, 0].tolist())
        return model(batch).square().mean() * 1e-6

    trainer = Trainer(
        max_epochs=3, run_dir=None, enable_progress_bar=False, device="cpu", placement=placement
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    trainer.fit(model, optimizer, data, step=step, batch_size=4, callbacks=[Grow()])
    assert seen == [*range(16), *range(24), *range(32)]


class Numbers(IterableDataset):
    """Counts."""

    def __iter__(self):
        return (torch.full((2,), float(number)) for number in range(200))


class Backwards(Sampler):
    """A sampler of the user's own."""

    def __len__(self):
        return 200

    def __iter__(self):
        return iter(range(199, -1, -1))


KNOWN = {
    "iterable in a DataLoader": lambda: (DataLoader(Numbers(), 4), {}),
    "sampler in a DataLoader": lambda: (DataLoader(Plain(200), 4, sampler=Backwards()), {}),
    "iterable with a batch size": lambda: (Numbers(), {"batch_size": 4}),
    "list of batches": lambda: ([torch.full((4, 2), float(number)) for number in range(50)], {}),
}


@settings(max_examples=20)
@given(name=st.sampled_from(sorted(KNOWN)), seed=st.integers(0, 1000))
def test_what_is_read_once_loses_no_batch(name, seed):
    """Loaders that are known may be read ahead, and back: each batch comes once, in its order."""
    expected = batches_by_hand(name)
    data, batching = KNOWN[name]()
    seen, model = [], torch.nn.Linear(2, 1)

    def step(model, batch):
        seen.append(batch.clone())
        return model(batch).square().mean() * 1e-6

    with wandering(INLINE, Place("inline"), seed=seed), warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = Trainer(run_dir=None, enable_progress_bar=False, device="cpu")
        trainer.fit(model, torch.optim.SGD(model.parameters(), lr=1e-6), data, step=step, **batching)
    assert same(seen, expected)


def batches_by_hand(name):
    """Return what a plain loop gets."""
    data, batching = KNOWN[name]()
    return [batch.clone() for batch in (DataLoader(data, **batching) if batching else data)]
