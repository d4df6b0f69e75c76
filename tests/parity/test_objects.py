"""A batch is the same object in every place, the one that a DataLoader would have made; and is counted."""

from __future__ import annotations

import array
import json
import mmap
import pickle
import types
from collections import OrderedDict, UserDict, deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from pipeline import Loader, SimulatedBackend, Trainer
from pipeline.batch import copy_memory, map_tensors, move_batch, tensors_in
from pipeline.data import as_source
from pipeline.errors import ConfigError, StageError
from pipeline.workers.packing import Arena, pack, unpack
from tests.parity.test_places import PLACES, made_by_processes
from tests.textbook import assert_same_weights, build_model, weights
from tests.workers import (
    Augmented,
    Encoding,
    Pair,
    Parts,
    Settings,
    collate_encoded,
    collate_graph,
    collate_packed,
    collate_views,
    odd_values,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:ComplexHalf support",
    "ignore:Sparse CSR tensor",
    "ignore:The PyTorch API of nested tensors",
    "ignore:torch.quantize_per_tensor",
    "ignore:TypedStorage is deprecated",
)


def facts(value):
    """Return all that can be told of a value."""
    if isinstance(value, torch.Tensor):
        is_strided = value.layout is torch.strided and not value.is_nested
        lies = (value.stride(), value.is_conj(), value.is_neg()) if is_strided else value.layout
        return type(value), value.dtype, value.requires_grad, value.is_leaf, lies, vars(value), repr(value)
    if isinstance(value, np.ndarray):
        return type(value), value.dtype, value.strides, value.flags.writeable, repr(value)
    attributes = sorted(vars(value)) if hasattr(value, "__dict__") else []
    inside = {name: facts(getattr(value, name)) for name in attributes if not name.startswith("_")}
    if hasattr(value, "items"):
        return type(value), inside, [(key, facts(part)) for key, part in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return type(value), inside, [facts(part) for part in value]
    return type(value), inside or repr(value)


def made_by(place):
    data = Augmented(8, draws=())
    if place == "process":
        return made_by_processes(data, collate_fn=odd_values)[0]
    device = SimulatedBackend() if place == "simulated" else "cpu"
    placement = place if place in ("inline", "thread") else "inline"
    loader = Loader(
        data, batch_size=4, collate_fn=odd_values, placement=placement, num_workers=2, device=device
    )
    with loader:
        return list(loader)


@pytest.mark.parametrize("place", ["inline", "thread", "process", "simulated"])
def test_every_kind_of_value_arrives_as_it_was_made(place):
    """Type, dtype, strides, flags, values, attributes; where a device lies between, as that would have it."""
    expected, found = odd_values(), made_by(place)
    assert len(found) == 2
    for batch in found:
        assert list(batch) == list(expected)
        for name, value in expected.items():
            if place == "simulated" and name in ("leaf", "parameter", "sparse", "tagged"):
                assert batch[name].requires_grad == value.requires_grad  # moved: no leaf, no attributes
            elif place == "simulated" and name in ("conjugate", "negative", "column", "expanded"):
                assert torch.equal(batch[name], value)  # a copy lies as a copy does
            else:
                assert facts(batch[name]) == facts(value), name


CONTAINERS = [
    list,
    tuple,
    deque,
    lambda parts: dict(enumerate(parts)),
    lambda parts: Settings(enumerate(parts)),
    lambda parts: UserDict(enumerate(parts)),
    lambda parts: Pair(parts, None),
    lambda parts: Parts(parts, ["a"]),
    lambda parts: types.SimpleNamespace(parts=parts),
]
VALUES = st.sampled_from(
    ["column", "expanded", "sparse", "parameter", "tagged", "masked", "backwards", "text"]
)


@st.composite
def nested(draw, depth=3):
    """Draw containers in containers."""
    if depth == 0 or draw(st.booleans()):
        return odd_values()[draw(VALUES)]
    parts = draw(st.lists(nested(depth=depth - 1), max_size=3))
    return draw(st.sampled_from(CONTAINERS))(parts)


@settings(max_examples=60, deadline=None)
@given(batch=nested())
def test_a_nested_batch_stays_what_it_is(batch):
    """Looked through it is the very object; copied, and handed over by a process, it is the same again."""
    assert map_tensors(batch, lambda tensor: tensor) is batch
    assert facts(copy_memory(batch)) == facts(batch)
    arena = Arena(mmap.mmap(-1, 1 << 16))
    assert facts(unpack(pack(batch, arena), arena.buffer)) == facts(batch)
    moved = move_batch([batch], torch.device("meta"), lambda tensor: tensor.to("meta"))
    assert all(each.device.type == "meta" for each in tensors_in(moved))


def test_a_graph_that_a_process_would_lose_is_refused_by_name():
    """A plain loop would train what it depends on; a worker's copy trains nothing."""
    with pytest.raises(pickle.PicklingError, match=r"shape \(4, 6\) was computed from"):
        made_by_processes(Augmented(8, draws=()), collate_fn=collate_graph)


class Sequences(Dataset):
    """Sequences of different lengths; the target is the sample's number."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.full((1 + 3 * index, 2), float(index)), torch.tensor(float(index))


def target_of_pair(model, batch):
    return (model(torch.ones(1, 6)).sum() * 0 + batch[1]).mean()


def no_progress():
    return Trainer(run_dir=None, enable_progress_bar=False, device="cpu")


def test_a_loss_is_a_mean_over_sequences():
    """Three of them and one: not over the elements that they have."""
    found = no_progress().evaluate(
        build_model("linear"), Sequences(), step=target_of_pair, batch_size=3, collate_fn=collate_packed
    )
    assert found["loss"] == pytest.approx((0 + 1 + 2 + 3) / 4)


def time_first(samples):
    inputs, targets = zip(*samples, strict=True)
    return torch.nn.utils.rnn.pad_sequence(inputs), torch.stack(targets)[:, None]


def test_a_loss_is_a_mean_over_the_samples_where_time_comes_first():
    """Batches [T, B, F] with [B, 1]."""
    found = no_progress().evaluate(
        build_model("linear"), DataLoader(Sequences(), 3, collate_fn=time_first), step=target_of_pair
    )
    assert found["loss"] == pytest.approx((0 + 1 + 2 + 3) / 4)


def test_who_knows_better_says_how_many_samples_there_are(tmp_path):
    """Weights of means, metrics, and rates of a run; in `fit` and in `evaluate`."""
    data, model, counted = (
        [(torch.full((size, 6), 1.0), size) for size in (1, 2, 5)],
        build_model("linear"),
        [],
    )

    def step(model, batch):
        return model(batch[0]).sum() * 0 + batch[1]

    def count(batch):
        counted.append(batch[1])
        return 10 * batch[1]

    found = no_progress().evaluate(
        model, data, step=step, count_samples=count, metrics={"size": lambda loss: loss}
    )
    assert found == pytest.approx({"loss": 30 / 8, "size": 30 / 8})
    trainer = Trainer(run_dir=tmp_path, enable_progress_bar=False, device="cpu", enable_checkpointing=False)
    trainer.fit(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        data,
        step=step,
        val_data=data,
        train_metrics={"size": lambda loss: loss},
        count_samples=count,
    )
    assert counted == [1, 2, 5, 1, 1, 2, 2, 5, 5, 1, 2, 5]
    rows = [json.loads(line) for line in next(tmp_path.rglob("metrics.jsonl")).read_text().splitlines()]
    assert rows[-1]["val/loss"] == pytest.approx(30 / 8)
    rates = [row["rate/samples_per_s"] * row["time/step_ms"] / 1e3 for row in rows if "train/loss" in row]
    assert rates == pytest.approx([10, 20, 50])


def textbook(data):
    """Train on a tokenizer's batches, as everybody does."""
    torch.manual_seed(3)
    model, losses = build_model("linear"), []
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(2):
        for batch in DataLoader(data, 4, collate_fn=collate_encoded):
            loss = encoded_step(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses, weights(model)


def encoded_step(model, batch):
    assert type(batch) is Encoding
    assert batch.encodings == ["tokens"]
    return torch.nn.functional.cross_entropy(model(batch.inputs), batch["labels"])


@pytest.mark.parametrize("place", [{}, *PLACES, {"device": SimulatedBackend()}], ids=str)
def test_a_tokenizers_batches_train(place):
    """By default and in each place, with what belongs to them, as in the textbook loop."""
    data = Augmented(40, draws=())
    expected, learned = textbook(data)
    torch.manual_seed(3)
    model = build_model("linear")
    trainer = Trainer(
        **{"max_epochs": 2, "run_dir": None, "enable_progress_bar": False, "device": "cpu", **place}
    )
    result = trainer.fit(
        model,
        torch.optim.SGD(model.parameters(), 0.05),
        data,
        step=encoded_step,
        batch_size=4,
        collate_fn=collate_encoded,
    )
    assert list(result.losses) == expected
    assert_same_weights(weights(model), learned)


class Many(Dataset):
    """Makes many samples at once, of some kind, and remembers what it was asked for."""

    def __init__(self, make):
        self.make, self.asked = make, []

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return torch.tensor(index)

    def __getitems__(self, indices):
        self.asked.append((type(indices), [(type(index), index) for index in indices]))
        return self.make(indices)


MADE = {
    "list": lambda indices: [torch.tensor(index) for index in indices],
    "list of pairs": lambda indices: [(torch.tensor(index), index) for index in indices],
    "tuple": lambda indices: tuple((torch.tensor(index), index) for index in indices),
    "dict": lambda indices: {"x": torch.tensor(indices)},
    "tensor": torch.tensor,
    "array": np.array,
    "generator": lambda indices: (torch.tensor(index) for index in indices),
    "text": lambda indices: "abc",
    "nothing": lambda indices: None,
}


def as_it_is(samples):
    return samples


def outcome(batches):
    """Return the batches, or what their making raised."""
    try:
        return repr([list(batch) if hasattr(batch, "__next__") else batch for batch in batches])
    except Exception as error:
        return type(error).__name__


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("collate_fn", [as_it_is, None])
@pytest.mark.parametrize("is_subset", [False, True])
def test_what_many_samples_are_made_as_goes_to_the_collate_function(kind, collate_fn, is_subset):
    """As it is, as torch's fetcher hands it on; asked for with a list of ints, a subset's mapped ones."""
    plain, ours, taken_apart = (Many(MADE[kind]) for _ in range(3))

    def chosen(data):
        return Subset(data, [3, 1, 4, 1, 5]) if is_subset else data

    own = {} if collate_fn is None else {"collate_fn": collate_fn}
    expected = outcome(DataLoader(chosen(plain), 2, **own))
    assert outcome(Loader(chosen(ours), batch_size=2, placement="inline", **own)) == expected
    assert outcome(Loader(DataLoader(chosen(taken_apart), 2, **own), placement="inline")) == expected
    assert ours.asked[: len(plain.asked)] == taken_apart.asked[: len(plain.asked)] == plain.asked


class Numbers(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(7))


COLLATED = [lambda samples: None, lambda samples: "text", len, iter, lambda samples: {}, as_it_is]


@pytest.mark.parametrize("collate_fn", COLLATED, ids=["None", "text", "int", "iterator", "empty", "list"])
@pytest.mark.parametrize("batch_size", [3, None])
@pytest.mark.parametrize("data", [TensorDataset(torch.arange(7.0)), Numbers()], ids=["map", "iterable"])
def test_whatever_a_collate_function_returns_is_a_batch(collate_fn, batch_size, data):
    """With batches and without, of a map-style dataset and of an iterable one."""
    loader = DataLoader(data, batch_size, collate_fn=collate_fn)
    expected = outcome(loader)
    for placement in ("inline", "auto"):
        assert outcome(Loader(loader, placement=placement)) == expected
    if batch_size is not None:
        own = Loader(data, batch_size=batch_size, collate_fn=collate_fn, placement="thread", num_workers=2)
        assert outcome(own) == expected


@pytest.mark.parametrize("placement", ["inline", "thread", "auto"])
def test_one_object_may_be_every_batch(placement):
    """A collate function that fills the same memory again and again gives each batch its own values."""
    kept = {"x": torch.zeros(3), "names": []}

    def collate(samples):
        kept["x"].copy_(torch.stack([inputs[0] for inputs, _ in samples]))
        kept["names"][:] = [f"{target}" for _, target in samples]
        return kept

    loader = Loader(
        Augmented(9, draws=()), batch_size=3, collate_fn=collate, placement=placement, num_workers=2
    )
    for number, batch in enumerate(loader):
        assert batch["x"].tolist() == [3 * number, 3 * number + 1, 3 * number + 2]
        assert batch["names"] == ["0", "1", "2"]


@pytest.mark.parametrize("place", ["textbook", "inline", "thread", "process"])
def test_what_lies_in_one_memory_does_so_in_each_place(place):
    """A step that writes to one view sees it in the others; one object under two names is one."""
    data = Augmented(40, draws=())
    if place == "process":
        batches = made_by_processes(data, collate_fn=collate_views)[0]
    elif place == "textbook":
        batches = list(DataLoader(data, 4, collate_fn=collate_views))
    else:
        with Loader(data, batch_size=4, collate_fn=collate_views, placement=place, num_workers=2) as loader:
            batches = list(loader)
    assert len(batches) == 10
    for batch in batches:
        before = batch["all"].clone()
        batch["target"].add_(1)
        assert torch.equal(batch["inputs"][:, 1:], before[:, 1:-1] + 1)
        assert torch.equal(batch["all"][:, 1:], before[:, 1:] + 1)
        batch["array"][0] = 7
        assert batch["all"][-1].tolist() == [7] * 6
        assert batch["again"] is batch["all"]
        assert batch["same"] is batch["names"]


class Meta:
    """What belongs to a batch, without a tensor."""

    def __init__(self):
        self.numbers = []


def refilled():
    """Yield one batch again and again, filled anew."""
    kept = {"meta": Meta(), "array": array.array("f", [0]), "tagged": torch.zeros(1).as_subclass(Labelled)}
    kept["tagged"].label = "a"
    for number in range(9):
        kept["meta"].numbers[:] = [number]
        kept["array"][0] = number
        kept["tagged"].fill_(number)
        yield kept


class Labelled(torch.Tensor):
    """A tensor that may have attributes."""


def test_whatever_is_filled_anew_is_the_batchs_own():
    """An object without tensors, as a list is; a tensor of a class of its own, with its attributes."""
    for number, batch in enumerate(list(Loader(refilled(), placement="inline"))):
        assert batch["meta"].numbers == [number]
        assert batch["array"].tolist() == [number]
        assert batch["tagged"].tolist() == [number]
        assert batch["tagged"].label == "a"


class Refilled(list):
    """A list of batches that are one tensor, filled anew for each."""

    def __iter__(self):
        memory = torch.zeros(1)
        for value in super().__iter__():
            yield memory.fill_(value)


class RefilledLoader(DataLoader):
    """A DataLoader whose user fills one tensor with each of its batches."""

    def __iter__(self):
        memory = torch.zeros(1)
        for batch in super().__iter__():
            yield memory.copy_(batch)


@pytest.mark.parametrize(
    "data", [Refilled(range(12)), RefilledLoader(torch.arange(12.0), 1)], ids=lambda data: type(data).__name__
)
def test_what_iterates_in_a_way_of_its_own_is_taken_for_the_users_code(data):
    """A class derived from a list or a DataLoader may use its memory again: batches made ahead are copied."""
    source = as_source(data, name="data", batch_size=None, collate_fn=None, seed=0)
    assert not source.is_known_kind
    loader = Loader(data, placement="inline")
    assert [batch.item() for batch in list(loader)] == list(range(12))


def test_what_is_registered_for_tuples_is_called(monkeypatch):
    """As torch calls it, for whatever class somebody has put into its table."""
    table = torch.utils.data._utils.collate.default_collate_fn_map
    monkeypatch.setitem(table, tuple, lambda samples, *, collate_fn_map: ("mine", len(samples)))
    assert list(Loader(Augmented(4, draws=()), batch_size=2, placement="inline")) == [("mine", 2)] * 2


def test_a_count_that_is_no_function_is_refused():
    """Before the first step, with what to write."""
    data, model = [(torch.ones(2, 6), torch.ones(2, 3))], build_model("linear")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss_fn = torch.nn.functional.mse_loss
    with pytest.raises(ConfigError, match=r"count_samples must be a function of a batch.*got 4"):
        no_progress().fit(model, optimizer, data, loss_fn=loss_fn, count_samples=4)
    with pytest.raises(ConfigError, match=r"count_tokens must be a function of a batch.*got 4"):
        no_progress().fit(model, optimizer, data, loss_fn=loss_fn, count_tokens=4)
    with pytest.raises(ConfigError, match=r"count_samples must be a function of a batch.*got None"):
        no_progress().evaluate(model, data, loss_fn=loss_fn, count_samples=None)


class Output(OrderedDict):
    """Like the result of a model of Hugging Face."""


@pytest.mark.parametrize("kind", [Output, OrderedDict])
def test_what_a_kind_of_dict_has_beside_numbers_is_said(kind):
    """Of a model's own output once; of Python's own kinds it is refused, as in a dict."""

    def step(model, batch):
        outputs = model(batch[0])
        return kind(loss=outputs.sum(), size=2, logits=outputs, nothing=None)

    data, model = [(torch.ones(2, 6),)] * 3, build_model("linear")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    if kind is OrderedDict:
        with pytest.raises(StageError, match="'logits' beside the loss, which must be a number"):
            no_progress().fit(model, optimizer, data, step=step)
        return
    with pytest.warns(UserWarning, match="Output: its numbers are logged, and logits not") as found:
        no_progress().fit(model, optimizer, data, step=step)
    assert len(found) == 1


def test_predictions_of_different_length_are_a_list():
    """Sequences that were padded batch by batch cannot be put together."""
    data = [torch.ones(2, 3, 6), torch.ones(2, 5, 6)]
    found = no_progress().predict(build_model("linear"), data)
    assert [each.shape for each in found] == [(2, 3, 3), (2, 5, 3)]
