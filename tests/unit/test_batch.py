"""A batch is the user's object: moved by its own `to`, rebuilt only where it must be, counted rightly."""

from __future__ import annotations

import dataclasses
import functools
import threading
import types
import warnings
from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from pipeline import SimulatedBackend, prefetch
from pipeline.batch import copy_memory, map_tensors, move_batch, num_samples, tensors_in
from pipeline.device import make_transfer
from pipeline.device.backend import EagerBackend
from tests.workers import Encoding, Graph

META, CPU = torch.device("meta"), torch.device("cpu")
Pair = namedtuple("Pair", "inputs target")


def to_meta(batch):
    return move_batch(batch, META, lambda tensor: tensor.to(META))


class NamedPair(Pair):
    """A named tuple that takes attributes."""


class TaggedList(list):
    """A list that takes attributes."""


class KeysAreAttributes(dict):
    """The well-known recipe."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class Output(OrderedDict):
    """Like a model's output: what is put under a key is an attribute too."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)


class Record(UserDict):
    """A dictionary in an object."""


class Table(Mapping):
    """A mapping that derives from nothing else."""

    def __init__(self, columns):
        self.columns = columns

    def __getitem__(self, key):
        return self.columns[key]

    def __iter__(self):
        return iter(self.columns)

    def __len__(self):
        return len(self.columns)


@dataclasses.dataclass
class Derived:
    """A dataclass of which the constructor takes a part."""

    inputs: torch.Tensor
    double: torch.Tensor = dataclasses.field(init=False)

    def __post_init__(self):
        self.double = self.inputs * 2
        self.triple = self.inputs * 3

    @functools.cached_property
    def place(self):
        """Where it is, as it was when somebody asked first."""
        return self.inputs.device


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    """A dataclass that cannot be written to."""

    inputs: torch.Tensor
    name: str = "x"


def tagged(found, **attributes):
    for name, value in attributes.items():
        setattr(found, name, value)
    return found


def containers():
    x = torch.arange(3.0)
    output = Output()
    output["logits"] = x
    return {
        "list": [x, "a"],
        "tuple": (x, None),
        "dict": {"x": x, "n": 1},
        "nested": {"x": [(x, {"y": x * 2})]},
        "list of a class": tagged(TaggedList([x]), tag=1),
        "named tuple": tagged(NamedPair(x, 2), tag=1),
        "returned by max": torch.max(torch.eye(3), 0),
        "default": defaultdict(list, x=x),
        "keys are attributes": KeysAreAttributes(x=x, n=1),
        "output": output,
        "user dict": tagged(Record(x=x), encodings=["tokens"]),
        "mapping": Table({"x": x}),
        "read-only": types.MappingProxyType({"x": x}),
        "deque": deque([x, 1], maxlen=4),
        "namespace": types.SimpleNamespace(x=x, n=1),
        "dataclass": Derived(x),
        "frozen": Frozen(x),
    }


KINDS = list(containers())


@pytest.mark.parametrize("kind", KINDS)
def test_a_container_keeps_its_type_and_what_belongs_to_it(kind):
    """Every tensor in it has moved, the user's own is as it was."""
    batch = containers()[kind]
    moved = to_meta(batch)
    assert type(moved) is type(batch)
    assert {each.device for each in tensors_in(moved)} == {META}
    assert {each.device for each in tensors_in(batch)} == {CPU}
    for name in ("tag", "maxlen", "default_factory", "encodings", "n", "name"):
        assert getattr(moved, name, None) == getattr(batch, name, None)


@pytest.mark.parametrize("kind", KINDS)
def test_what_need_not_move_is_not_rebuilt(kind):
    """The very object, from a transfer that changes nothing, and from one that has nothing to do."""
    batch = containers()[kind]
    assert map_tensors(batch, lambda tensor: tensor) is batch
    assert move_batch(batch, CPU, lambda tensor: tensor.to(CPU)) is batch
    transfer = make_transfer(EagerBackend(CPU), overlaps=True, prepare=None)
    assert transfer.receive(transfer.send(batch)) is batch


def test_attributes_and_items_stay_the_same_object():
    """Where one name of a tensor moves, the other one does; what was computed of the old one is forgotten."""
    found = to_meta(containers()["keys are attributes"])
    assert found.x is found["x"]
    found = to_meta(containers()["output"])
    assert found.logits is found["logits"]
    batch = Derived(torch.ones(2))
    assert batch.place == CPU
    assert to_meta(batch).place == META


def test_a_batch_that_holds_itself_ends():
    """As a tree of nodes that know their parents does."""
    batch = [torch.ones(2)]
    batch.append(batch)
    assert to_meta(batch)[0].device == META


class Moving:
    """Has a `to` of some shape."""

    def __init__(self):
        self.x, self.asked = torch.ones(2), []


class InPlace(Moving):
    def to(self, device):
        self.x = self.x.to(device)


class ByName(Moving):
    def to(self, *, device):
        return tagged(ByName(), x=self.x.to(device))


class Passing(Moving):
    def to(self, *args, **kwargs):
        return tagged(Passing(), x=self.x.to(*args, **kwargs))


class MovingDict(UserDict):
    def to(self, where):
        return tagged(MovingDict({key: value.to(where) for key, value in self.data.items()}), moved=True)

    @property
    def x(self):
        return self.data["x"]


class Slotted:
    __slots__ = ("x",)

    def to(self, device, non_blocking=False):
        made = Slotted()
        made.x = self.x.to(device, non_blocking=non_blocking)
        return made


@pytest.mark.parametrize(
    "batch",
    [InPlace(), ByName(), Passing(), MovingDict(x=torch.ones(2)), tagged(Slotted(), x=torch.ones(2))],
    ids=lambda batch: type(batch).__name__,
)
def test_what_can_move_itself_does(batch):
    """Whatever the shape of its `to`, at any depth; one that returns nothing has moved in place."""
    moved = to_meta({"a": [batch]})["a"][0]
    assert type(moved) is type(batch)
    assert moved.x.device == META


def test_a_graph_without_features_is_on_a_device_too():
    """An object with a `device` is moved though it holds no tensor that anybody can see."""

    class Bare:
        def __init__(self, device):
            self.device = device

        def to(self, device):
            return Bare(device)

    assert to_meta(Bare(CPU)).device == META


class Failing(Moving):
    """Must not be asked."""

    def to(self, device):
        raise AssertionError


class Quantity(Failing):
    """Has a `to` for something else."""

    def to(self, unit):
        raise AssertionError


class Words(Failing):
    """Holds no tensor."""

    def __init__(self):
        self.words = ["a"]


@pytest.mark.parametrize("batch", [Quantity(), Words()], ids=lambda batch: type(batch).__name__)
def test_a_to_that_is_not_about_devices_is_not_called(batch):
    """Nor that of an object that holds no tensor."""
    assert to_meta([batch])[0] is batch


@pytest.mark.parametrize("overlaps", [False, True])
def test_on_the_cpu_nothing_is_called(overlaps):
    """The very object arrives, on the simulated device too, whose tensors are the CPU's."""
    batch = Failing()
    for backend in (EagerBackend(CPU), SimulatedBackend()):
        transfer = make_transfer(backend, overlaps=overlaps, prepare=torch.Tensor.double)
        assert transfer.receive(transfer.send([batch]))[0] is batch


def packed():
    return pack_sequence([torch.ones(3, 2), torch.zeros(1, 2)], enforce_sorted=False)


def test_a_packed_sequence_leaves_its_sizes_on_the_host():
    """As its own `to` does."""
    moved = to_meta((packed(), torch.ones(2)))[0]
    assert (moved.data.device, moved.batch_sizes.device) == (META, CPU)


BASE = torch.arange(12.0).reshape(3, 4)
with warnings.catch_warnings():  # that sparse tensors by rows are new, which torch says once
    warnings.simplefilter("ignore")
    BY_ROWS = BASE.to_sparse_csr()
TENSORS = {
    "column": BASE[:, 1],
    "transposed": BASE.t(),
    "expanded": BASE[:, :1].expand(3, 9),
    "empty": BASE[:0],
    "scalar": torch.tensor(3),
    "conjugate": BASE.to(torch.complex64).conj(),
    "negative": torch._neg_view(BASE),
    "unsigned": BASE.to(torch.uint64)[:, 1],
    "float8": BASE.to(torch.float8_e4m3fn),
    "with an attribute": tagged(torch.ones(2), tag=1),
    "sparse": BASE.to_sparse(),
    "sparse by rows": BY_ROWS,
    "ragged": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_copy_of_a_tensor_is_exact(kind):
    """In all but its memory: kind, type, strides, flags, values and attributes."""
    tensor = TENSORS[kind]
    made = copy_memory(tensor)
    assert made is not tensor
    assert (type(made), made.dtype, made.layout) == (type(tensor), tensor.dtype, tensor.layout)
    assert repr(made) == repr(tensor)
    assert getattr(made, "tag", None) == getattr(tensor, "tag", None)
    if tensor.layout is torch.strided:
        assert (made.stride(), made.is_conj(), made.is_neg()) == (
            tensor.stride(),
            tensor.is_conj(),
            tensor.is_neg(),
        )
        assert not made.numel() or made.data_ptr() != tensor.data_ptr()


ARRAYS = {
    "masked": np.ma.masked_array([1, 2], mask=[0, 1], fill_value=7),
    "read-only": np.frombuffer(b"abcd", dtype=np.uint8),
    "backwards": np.arange(6).reshape(2, 3)[:, ::-1],
    "by columns": np.asfortranarray(np.ones((2, 3))),
    "objects": np.array([{"a": [1]}, None], dtype=object),
    "records": np.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8")]),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_a_copy_of_an_array_is_exact(kind):
    """Masks, flags, fields and the order in memory among the rest."""
    array = ARRAYS[kind]
    made = copy_memory([array])[0]
    assert not np.shares_memory(made, array)
    assert (type(made), made.dtype, made.strides) == (type(array), array.dtype, array.strides)
    assert (made.flags.writeable, repr(made)) == (array.flags.writeable, repr(array))


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_container_has_memory_of_its_own(kind):
    """Its type and attributes are the same; whoever made it may clear its lists, too."""
    batch = containers()[kind]
    made = copy_memory({"batch": batch, "names": (names := ["a"])})
    assert made["names"] == names
    assert made["names"] is not names
    assert type(made["batch"]) is type(batch)
    for copied, tensor in zip(tensors_in(made["batch"]), tensors_in(batch), strict=True):
        assert torch.equal(copied, tensor)
        assert copied.data_ptr() != tensor.data_ptr()


def test_a_copy_keeps_what_is_one_tensor_under_two_names():
    """A step that writes to one of them sees it in the other, as in a plain loop."""
    first, second, flat = copy_memory((BASE, BASE, BASE.view(-1)))
    first.zero_()
    assert not second.any()
    assert not flat.any()


class Opaque:
    """An object that nobody knows; it knows itself."""

    def __init__(self):
        self.x, self.array, self.me = torch.ones(2), np.ones(2), self


def test_an_object_is_copied_whole_or_not_at_all():
    """One that holds a lock, and a tensor that somebody may optimise, are handed over as they are."""
    batch = Opaque()
    made = copy_memory(batch)
    assert made.me is made
    assert made.x.data_ptr() != batch.x.data_ptr()
    assert not np.shares_memory(made.array, batch.array)
    for kept in (
        tagged(Opaque(), lock=threading.Lock()),
        torch.nn.Parameter(torch.ones(2)),
        torch.ones(2, requires_grad=True),
        torch.ones(2, requires_grad=True) * 2,
    ):
        assert copy_memory(kept) is kept


def test_a_device_gets_what_a_plain_loop_would_give_it():
    """A tensor with a gradient has it there, ragged and sparse ones keep their kind, beside plain ones."""
    leaf = torch.ones(2, requires_grad=True)
    others = {kind: TENSORS[kind] for kind in ("sparse", "sparse by rows", "ragged", "expanded")}
    backend = SimulatedBackend()
    (found,) = prefetch([{**others, "leaf": leaf, "graph": Graph(BASE)}], device=backend)
    found["leaf"].sum().backward()
    assert leaf.grad is not None
    assert found["graph"].x is BASE
    for kind, tensor in others.items():
        assert type(found[kind]) is type(tensor)
        assert repr(found[kind]) == repr(tensor)
    del found
    assert not backend.violations


class Unknown:
    """Has no `to`."""

    def __init__(self, x):
        self.x = x


def reused(kind):
    """Yield batches that all lie in the same memory."""
    x, array = torch.zeros(3), np.zeros(3)
    batch = {
        "container": {"x": x},
        "itself": Graph(x),
        "dict that moves": Encoding({"x": x}),
        "unknown": Unknown(x),
        "array": [x, array],
        "sparse": torch.zeros(3).to_sparse(),
    }[kind]
    for value in range(12):
        x.fill_(value)
        array.fill(value)
        if kind == "sparse":
            batch = torch.sparse_coo_tensor(
                torch.arange(3)[None], x, (3,), is_coalesced=True, check_invariants=False
            )
        yield batch


@pytest.mark.parametrize("kind", ["container", "itself", "dict that moves", "unknown", "array", "sparse"])
@pytest.mark.parametrize("device", ["cpu", SimulatedBackend()], ids=["cpu", "simulated"])
def test_memory_that_is_used_again_is_copied_before(kind, device):
    """Whatever it lies in: a batch has the values that it was made with."""
    for value, batch in enumerate(list(prefetch(reused(kind), device=device))):
        found = batch.to_dense() if kind == "sparse" else next(tensors_in(batch))
        assert found.tolist() == [value] * 3
        assert kind != "array" or batch[1].tolist() == [value] * 3


def sized(**attributes):
    return tagged(types.new_class("Sized")(), x=torch.ones(20, 3), **attributes)


class Rows(Unknown):
    """Has a length."""

    def __len__(self):
        return len(self.x)


IMAGES = (torch.ones(3, 8, 8), torch.ones(3, 9, 9))
BOXES = ({"boxes": torch.ones(5, 4)}, {"boxes": torch.ones(1, 4)})


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (packed(), 2),
        ((packed(), torch.ones(2)), 2),
        (pack_sequence([torch.ones(3), torch.ones(2), torch.ones(1)]), 3),
        (sized(num_graphs=4), 4),
        ((sized(num_graphs=4), torch.ones(9)), 4),
        (sized(batch_size=torch.Size([4, 2])), 4),
        (sized(), 20),
        (Rows(torch.ones(6, 2)), 6),
        (Rows({"x": torch.ones(6, 2), "y": torch.ones(6)}), 6),
        (Graph(torch.ones(6, 2)), 6),
        (Encoding({"batch_size": torch.ones(7), "ids": torch.ones(7, 3)}), 7),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), 2),
        ((torch.eye(5).to_sparse(), torch.ones(5)), 5),
        (torch.eye(5).to_sparse_csr(), 5),
        ((np.ones((6, 2)), np.ones(6)), 6),
        ((torch.ones(5, 3, 2), torch.ones(3, 1)), 3),  # [T, B, F] and [B, 1]
        ((torch.ones(5, 3).long(), torch.ones(7, 3).long()), 3),  # tokens [S, B] and [T, B]
        ((torch.ones(5, 3, 2), torch.ones(7, 3, 2), torch.ones(3)), 3),
        ((torch.ones(5, 1, 2), torch.ones(1, 1)), 1),  # the last one of an epoch
        ((torch.ones(4, 9).long(), torch.ones(1, 9).long()), 4),
        ((torch.ones(25, 64), torch.ones(75, 64)), 25),  # features
        ((torch.ones(4, 9).long(), torch.ones(1, 9).long(), torch.ones(4)), 4),  # positions for all
        ((torch.ones(4, 9).long(), torch.ones(4, 9), torch.ones(9)), 4),
        ({"ids": torch.ones(5, 3).long(), "lengths": torch.ones(3), "labels": torch.ones(3)}, 3),
        ((torch.ones(8, 3, 32, 32), torch.ones(20, 6)), 8),  # images, and boxes put together
        ((torch.ones(8, 3, 32, 32), torch.ones(3, 6)), 8),
        ((IMAGES, BOXES), 2),
        ([{"image": torch.ones(3, 8, 8), "boxes": torch.ones(2, 4)}] * 5, 5),
        ([{"ids": torch.ones(4)}, {"ids": torch.ones(4)}], 4),  # two columns
        ((torch.tensor(1.0), torch.ones(4)), 4),
        ({"names": ["a", "b"], "nothing": None}, 1),
    ],
)
def test_samples_are_counted_by_a_stated_rule(batch, count):
    """Objects that know are asked; then what all tensors agree on; then lists of records, and time first."""
    assert num_samples(batch) == count
