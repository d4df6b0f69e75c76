"""Every place makes the same batches, bit for bit, in the same order, with dying workers and without."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler, default_collate

from pipeline import Loader, Trainer
from pipeline.data import EVALUATION_EPOCH, as_source
from pipeline.workers import Processes
from tests.textbook import assert_same_weights, build_model, seeded_batches, textbook, weights
from tests.workers import (
    Augmented,
    Deadly,
    Films,
    Late,
    Meeting,
    Ragged,
    Reducing,
    Surroundings,
    collate_ragged,
)

PLACES = [
    {"schedule": "textbook"},
    {"schedule": "overlap", "placement": "inline"},
    {"placement": "thread", "num_workers": 3},
    {"placement": "process", "num_workers": 2},
    {"placement": "process", "num_workers": 1, "threads_per_worker": 3},
]


def run(data, place, *, epochs=2, model="dropout", **arguments):
    """Train; return the losses and weights."""
    torch.manual_seed(3)
    model = build_model(model)
    trainer = Trainer(max_epochs=epochs, run_dir=None, enable_progress_bar=False, device="cpu", **place)
    arguments = {"batch_size": 4, "shuffle": True, **arguments}
    result = trainer.fit(
        model, torch.optim.SGD(model.parameters(), 0.05), data, loss_fn=F.cross_entropy, **arguments
    )
    return list(result.losses), weights(model)


def made_by_processes(data, *, num_workers=2, num_threads=1, depth=4, epochs=(0,), **arguments):
    """Return the batches that worker processes make, each epoch's as a list."""
    arguments = {"batch_size": 4, "shuffle": False, "drop_last": False, "collate_fn": None, **arguments}
    source = as_source(data, name="data", seed=0, **arguments)
    processes = Processes(source, num_workers, 60, num_threads)
    try:
        assert processes.wait_until_ready()
        return [list(processes.batches(source.open(epoch), depth)) for epoch in epochs]
    finally:
        processes.close()


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.get("placement", "textbook"))
def test_a_place_equals_the_textbook_loop(place):
    """Losses and weights are those of 25 plain lines, with augmentation and dropout."""
    data = Augmented(23)
    torch.manual_seed(3)
    model = build_model("dropout")
    batches = seeded_batches(data, epochs=2, batch_size=4, shuffle=True)
    losses = textbook(model, torch.optim.SGD(model.parameters(), 0.05), batches)
    found, learned = run(data, place)
    assert found == losses
    assert_same_weights(learned, weights(model))


class Scaled:
    """Samples that remember a parameter, unless nobody wants gradients."""

    def __init__(self):
        self.scale = torch.ones(1, requires_grad=True)

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return self.scale * index


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_threads_make_batches_in_the_callers_grad_mode(mode):
    """A new thread begins with gradients; a plain loop's dataset sees the mode of its caller."""
    with mode():
        expected = [torch.utils.data.default_collate([Scaled()[index]]) for index in range(12)]
        for place in ("inline", "thread"):
            found = list(Loader(Scaled(), batch_size=1, placement=place, num_workers=2))
            for batch, other in zip(found, expected, strict=True):
                assert torch.equal(batch, other)
                assert (batch.requires_grad, batch.is_inference()) == (
                    other.requires_grad,
                    other.is_inference(),
                )


class Multiplied:
    """Samples that are products, whose type depends on autocast."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.full((2, 2), 1.1) @ torch.full((2, 2), index / 3)


@pytest.mark.parametrize("place", ["inline", "thread"])
def test_threads_make_batches_in_the_callers_autocast(place):
    """Of a dataset and of a generator: a plain loop's are made in it as well."""
    data = Multiplied()
    with torch.autocast("cpu", torch.bfloat16):
        expected = [data[index] for index in range(12)]
        found = [batch[0] for batch in Loader(data, batch_size=1, placement=place, num_workers=2)]
        yielded = list(Loader((data[index] for index in range(12)), placement=place, num_workers=2))
    for made in (found, yielded):
        assert [each.dtype for each in made] == [torch.bfloat16] * 12
        assert all(map(torch.equal, made, expected))


DRAWS = [(), ("torch",), ("python",), ("numpy", "torch"), ("dropout",)]


@settings(max_examples=20)
@given(
    count=st.integers(1, 40),
    first_draw=st.integers(0, 40),
    batch_size=st.integers(1, 9),
    num_workers=st.integers(1, 3),
    num_threads=st.integers(1, 3),
    depth=st.integers(1, 6),
    shuffle=st.booleans(),
    draws=st.sampled_from(DRAWS),
)
def test_processes_make_the_batches_of_a_plain_loop(
    count, first_draw, batch_size, num_workers, num_threads, depth, shuffle, draws
):
    """Whatever the workers, their threads and the depth: the order and every number, hookable or not."""
    data = Late(count, index=first_draw, draws=draws)
    arguments = {"batch_size": batch_size, "shuffle": shuffle, "drop_last": False, "collate_fn": None}
    found = made_by_processes(
        data, num_workers=num_workers, num_threads=num_threads, depth=depth, epochs=(0, 1), **arguments
    )
    assert_plain(data, found, **arguments)


def assert_plain(data, found, **arguments):
    """Compare the batches of each epoch with those that the loop thread makes."""
    arguments = {"batch_size": 4, "shuffle": False, "drop_last": False, "collate_fn": None, **arguments}
    source = as_source(data, name="data", seed=0, **arguments)
    for epoch, batches in enumerate(found):
        reader = source.open(epoch)
        assert len(batches) == source.num_batches
        for batch in batches:
            expected = reader.read()
            assert torch.equal(batch[0], expected[0])
            assert torch.equal(batch[1], expected[1])


@pytest.mark.parametrize("draws", DRAWS, ids=str)
@pytest.mark.parametrize("index", [0, 4, 8, 12], ids=lambda index: f"from {index} on")
def test_threads_of_a_worker_make_batches_at_once(draws, index):
    """Two of them wait for each other: without a second thread there would be no end; same numbers.

    Draws that a thread cannot isolate begin in the first batch, in both of the two, in one of them, or later.
    """
    pair = (4, 8) if index or draws in [(), ("torch",)] else ()  # else nothing is made at once
    data = Meeting(24, pair=pair, index=index, draws=draws)
    found = made_by_processes(data, num_workers=1, num_threads=2, epochs=(0, 1))
    assert_plain(data, found)


def test_a_dataset_that_seeds_torch_itself_is_found_by_a_workers_first_batch():
    """A thread would draw from the sample's own generator, which nobody has seeded by hand."""
    data = Augmented(24, draws=("reseed",))
    assert_plain(data, made_by_processes(data, num_workers=1, num_threads=2))


@pytest.mark.parametrize("draws", [("python",), ("numpy",), ("dropout",), ("torch", "python", "numpy")])
@pytest.mark.filterwarnings("ignore:random numbers were drawn")
def test_unhookable_draws_are_the_same_in_every_place(draws):
    """Threads hand such batches to the loop thread; processes draw from generators of their own."""
    found = [run(Augmented(14, draws=draws), place, model="linear")[0] for place in PLACES]
    assert all(losses == found[0] for losses in found[1:])


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.get("placement", "textbook"))
def test_a_data_loader_may_be_made_anywhere(place):
    """A DataLoader without workers keeps its order in every place; one line changes."""
    torch.manual_seed(7)
    data = [(torch.randn(6), index % 3) for index in range(22)]
    loader = DataLoader(data, batch_size=5, shuffle=True, drop_last=True)
    torch.manual_seed(3)
    model = build_model("dropout")
    losses = textbook(model, torch.optim.SGD(model.parameters(), 0.05), [loader, loader])
    found, learned = run(loader, place, batch_size=None, shuffle=False)
    assert found == losses
    assert_same_weights(learned, weights(model))


@settings(max_examples=6)
@given(
    index=st.integers(0, 22),
    num_workers=st.integers(1, 3),
    num_threads=st.integers(1, 3),
    depth=st.integers(1, 6),
)
def test_a_worker_that_dies_changes_no_number(tmp_path_factory, index, num_workers, num_threads, depth):
    """It is named with its signal, its batch and the samples, and another makes the batch again."""
    memory = tmp_path_factory.mktemp("died") / "once"
    expected = made_by_processes(Augmented(23))[0]
    others = "" if num_threads == 1 else ".*"  # which nobody could tell from it
    with pytest.warns(
        RuntimeWarning, match=rf"signal SIGKILL while it made {others}batch {index // 4} of epoch 0"
    ):
        found = made_by_processes(
            Deadly(23, index=index, memory=str(memory)),
            num_workers=num_workers,
            num_threads=num_threads,
            depth=depth,
        )[0]
    for batch, other in zip(found, expected, strict=True):
        assert torch.equal(batch[0], other[0])


def test_ragged_and_nested_batches_come_through():
    """Whatever does not fit a slot, or is no plain tensor, comes another way, and is the same."""
    data = Ragged()
    found = made_by_processes(data, num_workers=1, num_threads=2, collate_fn=collate_ragged)[0]
    for number, batch in enumerate(found):
        expected = collate_ragged([data[index] for index in range(4 * number, 4 * number + 4)])
        assert list(batch) == list(expected)
        assert all(torch.equal(*pair) for pair in zip(batch["values"], expected["values"], strict=True))
        for name in ("padded", "columns", "nothing"):
            assert torch.equal(batch[name], expected[name])
            assert batch[name].stride() == expected[name].stride()
        assert batch["array"].tolist() == expected["array"].tolist()
        assert batch["names"] == expected["names"]
        assert type(batch["pair"]) is type(expected["pair"])
        assert torch.equal(batch["pair"].inputs, expected["pair"].inputs)
        assert torch.equal(batch["parts"].inputs, expected["parts"].inputs)
        assert torch.equal(batch["sparse"].to_dense(), expected["sparse"].to_dense())


def collate_twice(samples):
    inputs, _ = default_collate(samples)
    return inputs, inputs


def test_what_shares_memory_in_a_batch_shares_it_there():
    """A step that writes to one of two names of a tensor sees it in the other, as in a plain loop."""
    for depth in (1, 4):  # by the overflow, and by a slot
        for inputs, target in made_by_processes(Augmented(8), depth=depth, collate_fn=collate_twice)[0]:
            inputs.zero_()
            assert not target.any()


def test_samples_may_go_by_a_key():
    """A sampler of keys is the DataLoader's own business: it is run as it is."""
    data = {"a": torch.zeros(2), "b": torch.ones(2)}
    source = as_source(
        DataLoader(data, 2, sampler=SubsetRandomSampler(["a", "b"])),
        name="data",
        batch_size=None,
        shuffle=False,
        drop_last=False,
        collate_fn=None,
        seed=0,
    )
    assert source.open(0).read().sum() == 2


class Doubled(Subset):
    """A user's own way to many samples at once."""

    def __getitems__(self, indices):
        return [2 * self[index] for index in indices]


def test_a_subset_of_the_users_own_is_taken_at_its_word():
    """A DataLoader calls its ``__getitems__``, and so does whoever takes the DataLoader apart."""
    loader = DataLoader(Doubled(torch.ones(4), range(4)), 2)
    arguments = {"batch_size": None, "shuffle": False, "drop_last": False, "collate_fn": None}
    reader = as_source(loader, name="data", seed=0, **arguments).open(0)
    assert torch.equal(reader.read(), next(iter(loader)))


def test_batches_that_are_kept_stay_valid():
    """A slot is used again only when nobody views it: a list of all batches is right, after the end too."""
    found = made_by_processes(Augmented(40, draws=()), depth=2)[0]
    for number, (inputs, _) in enumerate(found):
        assert inputs[:, 0].tolist() == [float(index) for index in range(4 * number, 4 * number + 4)]


def test_slots_are_used_again():
    """As long as batches are let go, a long epoch takes no more slots than its depth and one in use."""
    source = as_source(
        Augmented(400), name="data", batch_size=2, shuffle=False, drop_last=False, collate_fn=None, seed=0
    )
    processes = Processes(source, 2, 60)
    try:
        assert processes.wait_until_ready()
        for _ in processes.batches(source.open(0), 4):
            pass
        assert processes.num_slots <= 6
    finally:
        processes.close()


def test_an_epoch_left_early_leaves_no_trace_in_the_next():
    """Answers that nobody waits for any more are dropped, and their slots come back."""
    source = as_source(
        Augmented(40), name="data", batch_size=2, shuffle=False, drop_last=False, collate_fn=None, seed=0
    )
    processes = Processes(source, 2, 60)
    try:
        assert processes.wait_until_ready()
        for epoch in (*range(20), EVALUATION_EPOCH):
            batches = processes.batches(source.open(epoch), 6)
            assert torch.equal(next(batches)[0], source.open(epoch).read()[0])
            for _ in zip(range(5), batches, strict=False):  # by now there are answers behind the last one
                pass
            batches.close()
        reader = source.open(2)
        for batch in processes.batches(source.open(2), 6):
            assert torch.equal(batch[0], reader.read()[0])
        assert processes.num_slots <= 16  # those of the epochs left early came back
    finally:
        processes.close()


def test_batches_lie_in_memory_as_a_plain_loops_do():
    """Their strides decide in which order a kernel sums."""
    expected = [batch.stride() for batch in DataLoader(Films(), batch_size=4)]
    assert expected[0] == (96, 48, 1, 12, 3)
    assert [batch.stride() for batch in made_by_processes(Films())[0]] == expected


def test_validation_in_the_middle_is_made_by_processes_too():
    """Two sources, each with workers of its own, disturb each other in nothing."""
    found = [
        run(Augmented(23), {**place, "val_check_interval": 2}, val_data=Augmented(9), epochs=1)
        for place in PLACES
    ]
    assert all(losses == found[0][0] for losses, _ in found[1:])


@pytest.mark.parametrize("num_threads", [1, 2])
def test_intra_op_threads_are_those_of_the_trainer(num_threads):
    """A sum over a large sample rounds as it does in the loop, with two threads as with one."""
    torch.set_num_threads(2)
    source = as_source(
        Reducing(), name="data", batch_size=4, shuffle=False, drop_last=False, collate_fn=None, seed=0
    )
    reader = source.open(0)
    for batch in made_by_processes(Reducing(), num_workers=1, num_threads=num_threads)[0]:
        assert torch.equal(batch, reader.read())


def test_a_dataset_that_changes_between_epochs_changes_in_its_workers():
    """A size set by a callback, or by hand, is that of the next epoch's batches, wherever they are made."""
    data = Augmented(12, draws=())
    with Loader(data, batch_size=4, placement="process", num_workers=1) as loader:
        while not loader._inbound.is_ready():
            list(loader)
        assert len(list(loader)) == 3
        data.offset = 100
        for _ in range(2):
            assert next(iter(loader))[0][0, 0] == 100


def test_an_unseeded_draw_is_noticed():
    """The comparison can fail: another epoch's batch is not the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = made_by_processes(Augmented(8), epochs=(0, 1))
    assert not torch.equal(first[0][0], second[0][0])


@pytest.mark.parametrize("num_threads", [1, 2])
def test_workers_have_the_surroundings_of_the_trainer(num_threads, monkeypatch):
    """The environment and torch's default dtype are those of now, and not of when the server started."""
    monkeypatch.setenv("SURROUNDINGS", "7")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        batches = made_by_processes(Surroundings(12), num_workers=1, num_threads=num_threads)[0]
    finally:
        torch.set_default_dtype(before)
    assert all(batch.dtype is torch.float64 for batch in batches)
    assert torch.cat(batches).flatten().tolist() == [*range(7, 19)]
