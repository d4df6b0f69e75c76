"""What is looked at behind a dataset, what counts as moved, and when two batches are the same."""

from __future__ import annotations

import array
import functools
import importlib
import importlib.util
import io
import itertools
import logging
import os
import random
import re
import sqlite3
import sys
import threading
from collections import OrderedDict, deque
from contextlib import closing
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torchvision import transforms
from torchvision.transforms import v2

from pipeline.checks import Checks, DifferenceError, DoubtError, NotComparableError, Record, StateWatch, Trial
from pipeline.checks.reach import reach
from pipeline.data import MapSource, as_source
from tests.stateful import Cached, Plain

pandas = pytest.importorskip("pandas") if importlib.util.find_spec("pandas") else None
TABLE = {"scale": 1.0}
logger = logging.getLogger("tests.checks")


def found(thing):
    """Return what is reachable from an attribute of something."""
    return reach([("data", SimpleNamespace(part=thing))])


@pytest.mark.parametrize(
    "make",
    [
        lambda: itertools.count(),
        lambda: iter([1, 2]),
        lambda: (each for each in range(3)),
        lambda: io.BytesIO(b"abc"),
        lambda: np.random.default_rng(0),
        lambda: np.random.RandomState(0),
        lambda: random.Random(0),
        lambda: torch.Generator(),
        lambda: [[{"deep": (random.Random(0),)}]],
        lambda: functools.partial(max, random.Random(0)),
        lambda: SimpleNamespace(inner=SimpleNamespace(rng=random.Random(0))).inner.rng.random,
    ],
)
def test_what_is_read_in_turn_is_found(make):
    """Iterators, generators, files and generators of random numbers, wherever they lie."""
    assert found(make()).ordered


def test_a_handle_of_a_library_is_found_by_its_refusal_to_be_pickled():
    """A connection has no attributes to look into, and does not pickle."""
    with closing(sqlite3.connect(":memory:")) as connection:
        assert list(found([connection]).bound) == ["data.part[…]"]


def test_a_handle_hides_in_no_closure_default_or_global():
    """Functions are followed into what they close over, their defaults, and the globals that they name."""
    rng = random.Random(0)
    assert found(lambda: rng.random()).ordered
    assert found(lambda each, rng=rng: rng.random()).ordered

    def reads_global(index):
        return TABLE["scale"] * index

    names = [cell.path for cell in found(reads_global).cells]
    assert "TABLE" in names


@pytest.mark.parametrize(
    "make",
    [
        lambda: logger,
        lambda: threading.Lock(),
        lambda: threading.RLock(),
        lambda: sys.stdout,
        lambda: random.random,
        lambda: torch.float32,
        lambda: len,
        lambda: np,
        lambda: transforms.Compose(
            [transforms.RandomCrop(8), transforms.ToTensor(), lambda image: image * 2]
        ),
        lambda: v2.Compose([v2.RandomHorizontalFlip(), v2.Normalize([0.5], [0.5])]),
        lambda: np.zeros(3),
        lambda: {"cache": {}},
    ],
)
def test_what_every_program_has_is_no_handle(make):
    """Loggers, locks, streams, functions, modules, transforms, arrays and caches keep nothing in the loop."""
    seen = found(make())
    assert not seen.ordered
    assert not seen.bound


def test_a_search_is_bounded():
    """A list of a million, and a nest without an end, are looked at in part."""
    endless = []
    endless.append(endless)
    assert len(found([list(range(10**6)), endless]).cells) < 10
    nest = []
    for _ in range(100):
        nest = [nest]
    assert found(nest).is_cut


def changes(thing, change):
    """Return what a watch says of a change, by name."""
    watch = StateWatch(lambda: [("data", thing)])
    change(thing)
    return {each.name: each.change for each in watch.moved()}


class Base:
    """Has a value that those who inherit from it read."""

    scale = 1


class Slotted:
    """Has a slot."""

    __slots__ = ("inner",)

    def __init__(self):
        self.inner = 1


class Thing(Base):
    """Holds one of each."""

    shared: ClassVar = [1]

    def __init__(self):
        self.count, self.items, self.queue = 1000, [1, 2], deque([1, 2])
        self.cache, self.recent, self.names = {1: 2}, OrderedDict({1: 2, 2: 3}), {1}
        self.tensor, self.array, self.model = torch.zeros(4), np.zeros(4), torch.nn.Linear(2, 2)
        self.rng, self.bytes = random.Random(0), bytearray(3)
        self.big, self.long, self.numbers = np.zeros(10**5), [0] * 10**4, array.array("i", [1, 2])
        self.module, self.slotted = torch.nn.Identity(), Slotted()
        self.module._level = 1
        self.table = SimpleNamespace() if pandas is None else pandas.DataFrame({"a": [1, 2]})


def write(memory, value):
    """Write to a tensor behind its version counter's back."""
    memory.numpy()[:] = value


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda thing: setattr(thing, "count", 1001), {"data.count": "moved"}),
        (lambda thing: setattr(thing, "count", int("1000")), {}),
        (lambda thing: setattr(thing, "more", 1), {"data.more": "moved"}),
        (lambda thing: thing.items.append(3), {"data.items": "moved"}),
        (lambda thing: thing.items.__setitem__(0, 5), {"data.items": "moved"}),
        (lambda thing: thing.queue.rotate(), {"data.queue": "moved"}),
        (lambda thing: thing.cache.__setitem__(2, "x"), {"data.cache": "grown"}),
        (lambda thing: thing.cache.__setitem__(2, 3), {"data.cache": "moved"}),
        (lambda thing: thing.long.__setitem__(777, 3), {"data.long": "moved"}),
        (lambda thing: thing.big.__setitem__(777, 3), {"data.big": "moved"}),
        (lambda thing: thing.numbers.__setitem__(1, 3), {"data.numbers": "moved"}),
        (lambda thing: setattr(thing.module, "_level", 3), {"data.module._level": "moved"}),
        (lambda thing: setattr(Base, "scale", 3), {"Base.scale": "moved"}),
        (lambda thing: thing.names.remove(1) or thing.names.add(2), {"data.names": "moved"}),
        pytest.param(
            lambda thing: thing.table.__setitem__("a", [3, 4]),
            {"data.table.0": "moved"},
            marks=pytest.mark.skipif(pandas is None, reason="needs pandas"),
        ),
        (lambda thing: setattr(thing.slotted, "inner", 3), {"data.slotted.inner": "moved"}),
        (lambda thing: thing.cache.__setitem__(1, 3), {"data.cache": "moved"}),
        (lambda thing: thing.cache.__setitem__(2, random.Random(0)), {"data.cache": "moved"}),
        (lambda thing: thing.recent.move_to_end(1), {"data.recent": "moved"}),
        (lambda thing: thing.recent.popitem(), {"data.recent": "moved"}),
        (lambda thing: thing.names.add(2), {"data.names": "grown"}),
        (lambda thing: thing.tensor.add_(1), {"data.tensor": "moved"}),
        (lambda thing: write(thing.tensor, 1), {"data.tensor": "moved"}),
        (lambda thing: thing.array.fill(1), {"data.array": "moved"}),
        (lambda thing: thing.big.fill(1), {"data.big": "moved"}),
        (lambda thing: thing.rng.random(), {"data.rng": "moved"}),
        (lambda thing: thing.bytes.__setitem__(0, 1), {"data.bytes": "moved"}),
        (lambda thing: thing.model.weight.data.add_(1), {"data.model['weight']": "moved"}),
        (lambda thing: Thing.shared.append(1), {"Thing.shared": "moved"}),
        (lambda thing: None, {}),
    ],
)
def test_what_moves_is_named(change, named):
    """An attribute, an element, a version, a byte; a cache that only gets more has grown."""
    assert changes(Thing(), change) == named


def test_a_cache_may_be_large():
    """That a dict of thousands has got one more is growth; that an old value is another one is not."""
    cache = {number: str(number) for number in range(5000)}
    assert changes(cache, lambda each: each.update({5000: "x"})) == {"data": "grown"}
    assert changes(cache, lambda each: each.update({2500: "x"})) == {"data": "moved"}


def batch():
    """Return a batch of many kinds."""
    return {
        "x": torch.arange(12.0).reshape(3, 4),
        "big": torch.zeros(1 << 17),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "array": np.arange(4),
        "texts": ["a", "b"],
        "set": {"a", "b", "c"},
        "nan": float("nan"),
        "thing": SimpleNamespace(y=torch.ones(2)),
        "sparse": torch.eye(3).to_sparse(),
        "none": None,
    }


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda each: each["x"].__setitem__((1, 1), 9), r"\['x'\] is Tensor"),
        (lambda each: each["big"].__setitem__(1000, 1), r"\['big'\]"),
        (lambda each: each.update(x=each["x"].double()), r"\['x'\].*float64"),
        (lambda each: each.update(x=each["x"].t().contiguous().t()), r"\['x'\]"),
        (lambda each: each.update(half=each["half"] * 2), r"\['half'\]"),
        (lambda each: each["array"].__setitem__(0, 7), r"\['array'\]"),
        (lambda each: each["texts"].append("c"), r"\['texts'\]"),
        (lambda each: each["set"].add("d"), r"\['set'\]"),
        (lambda each: each.update(nan=0.0), r"\['nan'\] is float '0.0' instead of float 'nan'"),
        (lambda each: each["thing"].y.fill_(3), r"\['thing'\]\.y"),
        (lambda each: each.update(none=0), r"\['none'\] is int 0 instead of NoneType None"),
        (lambda each: each.update(more=1), "the batch is dict of 11 instead of dict of 10"),
    ],
)
def test_a_difference_names_the_field_and_what_was_found(change, where):
    """Values, dtypes, types and strides count; a batch that is the same is the same, NaN and all."""
    assert Record(batch()).difference(Record(batch())) == ""
    other = batch()
    change(other)
    assert re.search(where, Record(batch()).difference(Record(other)))


def test_a_record_is_of_the_batch_as_it_was():
    """What a step does to its batch afterwards changes no record."""
    made = batch()
    record = Record(made)
    made["x"].zero_()
    assert record.difference(Record(batch())) == ""


ODD_ARRAYS = {
    "records with objects": lambda name: np.array([(1, name)], dtype=[("number", int), ("name", object)]),
    "texts of any length": lambda name: np.array([name, "b"], dtype=np.dtypes.StringDType()),
    "masked objects": lambda name: np.ma.masked_array(np.array([name, None], dtype=object), mask=[0, 1]),
    "no bytes at all": lambda name: np.empty(len(name), dtype="V0"),
}


@pytest.mark.parametrize("kind", ODD_ARRAYS)
def test_arrays_that_are_not_plain_bytes_are_compared_too(kind):
    """By what is in them."""
    make = ODD_ARRAYS[kind]
    assert Record([make("a")]).difference(Record([make("a")])) == ""
    assert Record([make("a")]).difference(Record([make("other")]))


def test_what_cannot_be_read_cannot_be_compared():
    """A lock in a batch is named."""
    with pytest.raises(NotComparableError, match="lock"):
        Record([threading.Lock()])


def source_of(data):
    """Return a source, and a reader of its first epoch."""
    source = as_source(data, name="train_data", batch_size=4, collate_fn=None, seed=0)
    assert isinstance(source, MapSource)
    return source, source.open(0)


def test_a_batch_that_differs_is_refused_before_it_is_used():
    """Of a place that makes another batch 1, the batch and the field are named, and nothing is handed on."""
    source, reader = source_of(Plain())
    checks = Checks(source, is_trusted=True)
    for _ in checks.looked_at(reader, lambda each: each, controls=True):
        pass
    trial = checks.trial("there", reader)
    assert list(trial.references) == [1, 2]
    with pytest.raises(DifferenceError, match="batch 1 came out differently there"):
        trial.hand_on(1, torch.zeros(4, 2), lambda each: pytest.fail("it was handed on"))
    with pytest.raises(DifferenceError, match="could not be made there: KeyError: 'x'"):
        raise trial.blamed(2, KeyError("x"))
    assert checks.num_compared == 3  # two of the loop with itself, and this one


def test_a_batch_is_compared_again_when_the_run_can_afford_it():
    """Half a percent of the time: with makings of a second that is one in 200 s."""
    now = [0.0]
    source, reader = source_of(Plain(4000))
    checks = Checks(source, is_trusted=True, clock=lambda: now[0])
    for _ in checks.looked_at(reader, lambda each: each, controls=True):
        pass

    def remake(position, *, is_hooked):
        now[0] += 1.0
        return reader.__class__.remake(reader, position, is_hooked=is_hooked)

    trial, seconds = Trial(checks, SimpleNamespace(is_random_access=True, remake=remake)), []

    def made():
        for position in range(3, 1000):
            item = trial.hand_on(position, reader.read(), lambda each: each)
            if hasattr(item, "record"):
                seconds.append(now[0])
                trial.settle(item)
            yield item

    for _ in checks.watched(made(), can_go_back=True):
        now[0] += 1.0
    assert 3 <= len(seconds) <= 6
    assert checks.spent_s <= 0.006 * now[0]


def test_what_moves_while_batches_are_made_ahead_is_seen_before_the_next_one():
    """The batch that was made before is not handed over."""
    data = Cached()
    source, reader = source_of(data)
    checks = Checks(source, is_trusted=True, clock=lambda: 0.0)
    for _ in checks.looked_at(reader, lambda each: each, controls=True):
        pass
    handed = []
    with pytest.raises(DoubtError, match=r"train_data\.size changed while batches were made ahead$"):
        for each in checks.watched(iter(range(100)), can_go_back=True):
            handed.append(each)
            if each == 0:
                data.size = 63
    assert handed == [0]


@pytest.mark.parametrize("name", ["replay", "readers", "enumeration", "typing_tools", "abcd"])
def test_a_module_of_the_users_may_begin_as_one_of_the_librarys_does(name, tmp_path, monkeypatch):
    """What lies in replay.py is looked into, though re.py is left alone."""
    (tmp_path / f"{name}.py").write_text("class Data:\n    def __init__(self): self.stream = iter([1])\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(name)
    assert found(module.Data()).ordered


def test_rows_of_a_mapped_file_are_no_handle(tmp_path):
    """A memory map may be read by any thread."""
    path = tmp_path / "rows"
    np.arange(4.0).tofile(path)
    seen = found(np.memmap(path, float, "r"))
    assert not seen.bound
    assert not seen.ordered


def test_moving_in_a_file_by_its_number_is_found():
    """A descriptor is an integer; the function that seeks in it gives it away."""

    def read(number):
        os.lseek(number, 0, os.SEEK_SET)

    assert found(read).ordered
