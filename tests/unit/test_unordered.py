"""`Loader(in_order=False)`: batches as they are ready, each once, whatever is late and wherever."""

from __future__ import annotations

import contextlib
import itertools
import os
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline import Loader, Trainer
from pipeline.concurrency import ChannelClosedError, Scope, UnorderedChannel
from pipeline.errors import ConfigError
from pipeline.inbound.decide_placement import Place
from pipeline.testing import Gate
from tests.workers import Augmented, Held


class Gated(Augmented):
    """One sample waits at a gate, on whichever thread makes it; another one may open the gate."""

    def __init__(self, count, *, index, gate, opener=None):
        super().__init__(count)
        self.index, self.gate, self.opener = index, gate, opener

    def __getitem__(self, index):
        if index == self.opener:
            self.gate.open()
        if index == self.index:
            self.gate.pass_through()
        return torch.tensor([float(index)]), index


class Drawing(Augmented):
    """One sample draws from Python's generator, which a thread cannot isolate."""

    def __getitem__(self, index):
        if index == 11:
            random.random()
        return torch.rand(1), index


class Cycling:
    """A chooser that goes on to the next place after so many batches."""

    def __init__(self, places, num_batches):
        self._places, self._num_batches, self._asked = itertools.cycle(places), num_batches, 0
        self.places = []

    def choose(self, reader):
        self.places.append(next(self._places))
        self._asked = 0
        return self.places[-1]

    def goes_on(self):
        self._asked += 1
        return self._asked < self._num_batches

    def watch(self, batches):
        return batches


def numbers(batches):
    """Return the sample indices of batches, one list each."""
    return [target.tolist() for _, target in batches]


def epoch_of(count, batch_size):
    """Return the sample indices of an epoch that is not shuffled."""
    return [list(range(start, min(start + batch_size, count))) for start in range(0, count, batch_size)]


@given(
    st.integers(1, 9),
    st.integers(0, 60),
    st.none() | st.integers(0, 9),
    st.integers(1, 4),
    st.integers(0, 5),
    st.sets(st.integers(0, 60), max_size=2),
)
def test_every_item_arrives_once(depth, count, low_water, num_producers, start, given_up):
    """Whatever the depth, the low-water mark and the producers; what was given up is left, nothing else."""
    channel = UnorderedChannel(depth, low_water, start)

    def produce():
        with contextlib.suppress(ChannelClosedError):
            while True:
                position = channel.claim()
                if position in given_up:
                    return channel.give_up(position)
                if position >= start + count:
                    return channel.end(position)
                channel.put(position, position)

    with Scope() as scope:
        for number in range(num_producers):
            scope.start(produce, name=f"producer/{number}", stop=channel.abandon)
        taken = list(channel)
    left = [position for position in channel.left if position < start + count]
    reached = channel.position + len(channel.left)
    assert sorted(taken + left) == list(range(start, min(reached, start + count)))
    assert left or len(taken) == count


def test_an_item_that_is_late_holds_up_none():
    """The second is handed over while the first is being made, and the first when it is there."""
    channel = UnorderedChannel(4)
    first, second = channel.claim(), channel.claim()
    channel.put(second, "second")
    items = iter(channel)
    assert next(items) == "second"
    channel.put(first, "first")
    channel.stop()
    assert list(items) == ["first"]
    assert channel.position == 2


def test_an_error_waits_for_what_is_ready_alone():
    """Not for an item that is late; in a plain channel it would come behind it."""
    channel, error = UnorderedChannel(4), KeyError("mine")
    _, failing, ready = channel.claim(), channel.claim(), channel.claim()
    channel.put(ready, "ready")
    channel.end(failing, error)
    items = iter(channel)
    assert next(items) == "ready"
    with pytest.raises(KeyError) as caught:
        next(items)
    assert caught.value is error


def test_a_late_batch_on_a_thread_holds_up_no_other():
    """All others of the epoch arrive while it waits at a gate; then it does."""
    gate = Gate()
    data = Gated(24, index=11, gate=gate)  # the loop makes the first three batches
    loader = Loader(data, batch_size=2, placement="thread", num_workers=2, in_order=False, check_data=False)
    batches = iter(loader)
    found = numbers(itertools.islice(batches, 11))
    gate.open()
    assert numbers(batches) == [[10, 11]]
    assert sorted([*found, [10, 11]]) == epoch_of(24, 2)
    assert sorted(numbers(loader)) == epoch_of(24, 2), "a further epoch"


@pytest.mark.parametrize("in_order", [True, False])
def test_who_is_overtaken_waits_only_out_of_order(in_order):
    """A sample waits until a later one is made: in order its batch comes in its turn all the same."""
    gate = Gate()
    data = Gated(24, index=11, gate=gate, opener=19)
    settings = {"placement": "thread", "num_workers": 2, "check_data": False}  # a gate decides nothing
    loader = Loader(data, batch_size=2, in_order=in_order, **settings)
    found = numbers(loader)
    assert (found == epoch_of(24, 2)) == in_order
    assert (found.index([10, 11]) < found.index([12, 13])) == in_order


def test_a_late_batch_in_a_worker_holds_up_only_those_behind_it(tmp_path):
    """Of four that are asked for ahead, at most two lie with the worker that waits; the rest arrives."""
    os.mkfifo(pipe := tmp_path / "pipe")
    data = Held(48, index=11, pipe=str(pipe))
    settings = {"placement": "process", "num_workers": 2, "depth": 4, "stall_timeout_s": 60}
    with Loader(data, batch_size=2, in_order=False, **settings) as loader:
        loader._inbound.start_processes(2)
        assert loader._inbound._processes.wait_until_ready()
        batches = iter(loader)
        found = [batch[0] for batch in itertools.islice(batches, 22)]
        with open(pipe, "w"):
            pass
        found += [batch[0] for batch in batches]
    plain = [batch[0] for batch in Loader(Augmented(48), batch_size=2, placement="inline")]
    late = [place for place, batch in enumerate(found) if torch.equal(batch, plain[5])]
    assert len(late) == 1
    assert late[0] >= 22
    assert sorted(batch.tolist() for batch in found) == sorted(batch.tolist() for batch in plain)


@pytest.mark.parametrize("in_order", [False, True])
def test_places_may_change_in_the_middle_of_an_epoch(in_order):
    """Loop thread, threads and processes take turns, as under `auto`: each batch once, the same numbers."""
    data = Augmented(61)
    plain = Loader(data, batch_size=2, shuffle=True, placement="inline")
    settings = {"placement": "process", "num_workers": 2, "in_order": in_order, "depth": 3}
    with Loader(data, batch_size=2, shuffle=True, **settings) as loader:
        loader._inbound.start_processes(2)
        assert loader._inbound._processes.wait_until_ready()
        places = [Place("textbook", 0), Place("thread", 3), Place("process", 2), Place("inline", 0)]
        loader._inbound.chooser = Cycling(places, 3)
        for _ in range(3):
            found, expected = ([batch[0].tolist() for batch in each] for each in (loader, plain))
            assert (found if in_order else sorted(found)) == (expected if in_order else sorted(expected))
        assert len(loader._inbound.chooser.places) >= 9


@pytest.mark.parametrize("place", ["thread", "process"])
def test_a_reader_that_stops_early_spoils_no_other_epoch(place):
    """What was made ahead and not taken is dropped; the next epoch is whole."""
    with Loader(Augmented(40), batch_size=2, placement=place, num_workers=2, in_order=False) as loader:
        if place == "process":
            loader._inbound.start_processes(2)
            assert loader._inbound._processes.wait_until_ready()
        plain = Loader(Augmented(40), batch_size=2, placement="inline")
        for _ in range(2):
            assert len(list(itertools.islice(loader, 3))) == 3
            next(iter(plain))
            found, expected = ([batch[0].tolist() for batch in each] for each in (loader, plain))
            assert sorted(found) == sorted(expected)


def test_a_batch_that_only_the_loop_thread_can_make_is_not_lost():
    """A sample draws from Python's generator: the threads give its batch up and end, the rest is made."""
    with (
        pytest.warns(UserWarning, match="drawn from random"),
        Loader(Drawing(60), batch_size=2, placement="thread", num_workers=3, in_order=False) as loader,
    ):
        assert sorted(numbers(loader)) == epoch_of(60, 2)


def test_it_is_for_data_that_has_another_order():
    """An iterable is refused, and the Trainer has no such setting."""
    with pytest.raises(ConfigError, match="list is read by one thread"):
        Loader([torch.zeros(2)], in_order=False)
    assert "in_order" not in vars(Trainer())
