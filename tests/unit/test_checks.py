"""What is looked at behind a dataset, what counts as moved, and when two batches are the same."""

from __future__ import annotations

import abc
import array
import asyncio
import contextvars
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
import types
import weakref
from collections import OrderedDict, deque
from contextlib import closing
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torchvision import transforms
from torchvision.transforms import v2

from pipeline.checks import (
    Checks,
    DifferenceError,
    DoubtError,
    MovedThereError,
    NotComparableError,
    Record,
    StateWatch,
    Trial,
)
from pipeline.checks.in_worker import WorkerLook
from pipeline.checks.reach import reach
from pipeline.checks.undo import Undo, put_back
from pipeline.checks.watch import Moved
from pipeline.data import MapSource, as_source
from tests.stateful import Cached, Plain

pandas = pytest.importorskip("pandas") if importlib.util.find_spec("pandas") else None
TABLE = {"scale": 1.0}
LEVEL = contextvars.ContextVar("LEVEL", default=1)
logger = logging.getLogger("tests.checks")


class Abstract(abc.ABC):  # noqa: B024
    """A class that another metaclass makes."""

    rng = random.Random(0)


class Part:
    """Has what it is given."""

    def __init__(self, rng=None):
        self.rng = rng


KEPT = Part(random.Random(0))


class Options(dict):
    """A dict whose attributes are its values, and which has every attribute."""

    __getattr__ = dict.get


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
        lambda: np.random.PCG64(0),
        lambda: np.array([random.Random(0), None], dtype=object),
        lambda: weakref.ref(KEPT),
        lambda: Abstract,
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


def test_an_event_loop_is_run_by_one_thread():
    """Two threads cannot run it at once."""
    with closing(asyncio.new_event_loop()) as loop:
        assert "data.part[…]" in found([loop]).bound


def test_each_thread_may_have_a_file_of_its_own():
    """Behind `threading.local` a file is shared by none; a generator of numbers is another one in each."""
    local = threading.local()
    local.file = io.BytesIO(b"abc")
    assert not found(local).ordered
    local.rng = random.Random(0)
    assert found(local).ordered


def test_a_reference_to_what_is_gone_is_nothing():
    """Neither a reference nor a proxy to it can be looked into."""
    thing = Part()
    gone = [weakref.ref(thing)]
    del thing
    assert not found(gone).is_cut
    options = Options(a=1)
    proxy = weakref.proxy(options)
    del options
    assert not found(proxy).cells[1:]


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
        lambda: Options(a=1),
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
        self.local, self.seeds, self.code = (
            threading.local(),
            np.random.SeedSequence(1),
            types.ModuleType("mine"),
        )
        self.options, self.function = Options(a=1), (lambda: LEVEL.get())
        self.function.count, self.level, self.objects = 0, LEVEL, np.array([1, None], dtype=object)
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
        (lambda thing: thing.module.eval(), {"data.module.training": "moved"}),
        (lambda thing: setattr(thing.local, "count", 1), {"data.local.count": "moved"}),
        (lambda thing: thing.seeds.spawn(1), {"data.seeds.n_children_spawned": "moved"}),
        (lambda thing: setattr(thing.function, "count", 1), {"<lambda>.count": "moved"}),
        (lambda thing: setattr(thing.code, "count", 1), {"data.code.count": "moved"}),
        (lambda thing: LEVEL.set(5), {"data.level": "moved"}),
        (lambda thing: thing.options.update(a=2), {"data.options": "moved"}),
        (lambda thing: thing.objects.__setitem__(0, 2), {"data.objects": "moved"}),
        (lambda thing: setattr(Thing, "level_of_class", 2), {"Thing.level_of_class": "moved"}),
        (
            lambda thing: thing.cache.__setitem__(2, SimpleNamespace(file=io.BytesIO())),
            {"data.cache": "moved"},
        ),
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
    assert checks.comparer.num_compared == 3  # two of the loop with itself, and this one


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

    trial, seconds = Trial(checks.comparer, SimpleNamespace(is_random_access=True, remake=remake)), []

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


def test_a_dict_that_a_thread_fills_meanwhile_has_grown():
    """A look that falls between two keys is taken again."""

    class Filling(dict):
        def get(self, key, otherwise=None):
            if len(self) < 105:
                self[len(self)] = str(len(self))
            return super().get(key, otherwise)

    cache = Filling({number: str(number) for number in range(99)})
    watch = StateWatch(lambda: [("data", SimpleNamespace(cache=cache))])
    cache[200] = "x"
    assert watch.is_quiet()


def test_what_has_no_equality_counts_as_moved():
    """A key whose comparison fails, such as a tensor, breaks nothing."""
    cache = {torch.zeros(2): 1}
    watch = StateWatch(lambda: [("data", SimpleNamespace(cache=cache))])
    cache.clear()
    cache[torch.ones(2)] = 1
    assert not watch.is_quiet()
    assert [each.name for each in watch.moved()] == ["data.cache"]


@pytest.mark.parametrize(
    ("change", "value_of"),
    [
        (lambda thing: setattr(thing, "count", 7), lambda thing: thing.count),
        (lambda thing: setattr(thing, "more", 7), lambda thing: hasattr(thing, "more")),
        (lambda thing: thing.items.append(7), lambda thing: list(thing.items)),
        (lambda thing: thing.queue.rotate(), lambda thing: list(thing.queue)),
        (lambda thing: thing.cache.__setitem__(1, 7), lambda thing: dict(thing.cache)),
        (lambda thing: thing.names.remove(1), lambda thing: set(thing.names)),
        (lambda thing: thing.tensor.add_(7), lambda thing: thing.tensor.tolist()),
        (lambda thing: thing.array.fill(7), lambda thing: thing.array.tolist()),
        (lambda thing: setattr(thing.slotted, "inner", 7), lambda thing: thing.slotted.inner),
        (lambda thing: setattr(Base, "scale", 7), lambda thing: Base.scale),
        (lambda thing: setattr(thing.module, "_level", 7), lambda thing: thing.module._level),
        (lambda thing: setattr(thing.function, "count", 7), lambda thing: thing.function.count),
    ],
)
def test_what_batches_made_ahead_have_moved_is_put_back(change, value_of):
    """Plain values, small containers, arrays and tensors, wherever they lie."""
    thing = Thing()
    watch, before = StateWatch(lambda: [("data", thing)]), value_of(thing)
    change(thing)
    assert value_of(thing) != before
    are_back = [put_back(cell, was) for cell, was in watch.moved_cells()]
    assert are_back
    assert all(are_back)
    assert value_of(thing) == before


def test_what_cannot_be_put_back_is_said():
    """The numbers of a table, a generator: nobody has kept what they were."""
    thing = Thing()
    watch = StateWatch(lambda: [("data", thing)])
    thing.rng.random()
    thing.big.fill(1)
    assert [put_back(cell, was) for cell, was in watch.moved_cells()] == [False, False]


def test_a_worker_says_what_moves_in_its_copy():
    """From its second batch on; what the loop has looked at may move, and a connection that it opens."""
    data = Part()
    data.count, data.shard, data.connection = 0, 0, None
    look = WorkerLook(lambda: [("data", data)], frozenset(["data.shard"]), 1e9)
    data.count += 1
    look()
    data.shard += 1
    look()
    with closing(sqlite3.connect(":memory:")) as data.connection:
        look()
        data.count += 1
        for _ in range(2):  # what has moved may have moved the next batch too
            with pytest.raises(
                MovedThereError, match=r"^data\.count changed as batches were made in a process$"
            ):
                look()


def test_what_a_full_look_alone_has_seen_is_said():
    """Only a full look had seen it, so nobody knows what it was; another epoch begins without it."""
    undo = Undo("data")
    undo.begin((), ["data.counts"])
    undo.extend(10)
    assert undo.num_pending(4) == 6
    with pytest.warns(UserWarning, match="cannot be put back"):
        assert not undo.undoes([Moved("data.counts", "moved")], 4)
    undo.begin((), ["data.counts"])
    undo.extend(10)
    undo.forget()
    assert undo.num_pending(4) == 0
