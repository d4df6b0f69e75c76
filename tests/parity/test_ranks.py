"""Several ranks share a dataset: each sample is on one of them, the numbers are those of DDP by hand."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pipeline import Loader, Trainer
from pipeline.data import as_source
from pipeline.data.sample_order import BatchPlan
from pipeline.errors import CheckpointError, ConfigError
from pipeline.randomness.seeds import shuffle_generator
from pipeline.ranks import ranks
from tests.workers import Augmented

ROOT = Path(__file__).parents[2]

RANK = """
import json, sys, warnings, torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from pipeline import ConfigError, Loader, Trainer
from pipeline.randomness.seeds import shuffle_generator
from tests.textbook import make_batch
from tests.workers import Augmented, Stream

rank, store, folder = int(sys.argv[1]), *sys.argv[2:]
torch.set_num_threads(1)

class Numbered(Augmented):
    def __getitem__(self, index):
        return super().__getitem__(index)[0], index

early = Loader(Numbered(10), batch_size=2, shuffle=True)
lengths = [len(early), len(list(early))]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)

class Sum:
    def update(self, outputs, target): pass
    def compute(self): return 0.0
    def reset(self): pass

seen = {True: [], False: []}

def loss_fn(outputs, target):
    seen[torch.is_grad_enabled()].append(target.tolist())
    return F.cross_entropy(outputs, target % 3)

def right(outputs, target):
    return (outputs.argmax(1) == target % 3).float()

def fresh():
    torch.manual_seed(7)
    layers = torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    model = DistributedDataParallel(torch.nn.Sequential(*layers))
    return model, torch.optim.AdamW(model.parameters(), 0.01)

def fit(data, model, optimizer, trainer=None, **arguments):
    settings = {"schedule": "overlap", "device": "cpu", "run_dir": None, "enable_progress_bar": False}
    trainer = Trainer(**{**settings, **(trainer or {})})
    batching = {"batch_size": 3, "shuffle": True}
    return trainer.fit(model, optimizer, data, loss_fn=loss_fn, **{**batching, **arguments})

def by_hand(data, model, optimizer, epochs):
    losses, indices = [], []
    for epoch in range(epochs):
        order = torch.randperm(len(data), generator=shuffle_generator(7, epoch)).tolist()
        steps = [order[start : start + 6] for start in range(0, len(order), 6)]
        if len(steps[-1]) < 2:
            *steps, step, rest = steps
            steps.append(step + rest)
        for step in steps:
            inputs, target = make_batch(data, step[rank::2], 7, epoch)
            loss = F.cross_entropy(model(inputs), target % 3)
            loss.backward(); optimizer.step(); optimizer.zero_grad()
            losses.append(loss.item()); indices.append(target.tolist())
    return losses, indices

said = {}
for count, placement in ((23, "inline"), (19, "thread")):
    model, optimizer = fresh()
    settings = {"max_epochs": 2, "placement": placement, "num_workers": 2}
    validation = {"val_data": Numbered(7), "metrics": {"right": right}}
    result = fit(Numbered(count), model, optimizer, settings, **validation)
    found = {name: list(value) for name, value in (("train", seen[True]), ("val", seen[False]))}
    seen[True].clear(); seen[False].clear()
    other, other_optimizer = fresh()
    losses, indices = by_hand(Numbered(count), other, other_optimizer, 2)
    with torch.no_grad():
        inputs, target = make_batch(Numbered(7), range(7), 7, -1)
        outputs = model.eval()(inputs)
    weights = [value.tolist() for value in model.state_dict().values()]
    said[count] = {
        **found, "losses": list(result.losses), "by_hand": losses, "indices": indices, "weights": weights,
        "weights_by_hand": [value.tolist() for value in other.state_dict().values()],
        "val_loss": result.metrics["val/loss"], "right": result.metrics["val/right"],
        "expected_loss": F.cross_entropy(outputs, target % 3).item(),
        "expected_right": right(outputs, target).mean().item(),
    }

def said_by(call):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        try:
            call()
        except ConfigError as error:
            return str(error)
    return [str(each.message) for each in found if "rank" in str(each.message)]

def problem(data, trainer=None, **arguments):
    return said_by(lambda: fit(data, *fresh(), {"max_epochs": 1, **(trainer or {})}, **arguments))

none = {"batch_size": None, "shuffle": False}
data = Numbered(8)
said["few"] = problem(Numbered(1))
said["seeds"] = problem(data, {"seed": rank})
said["sizes"] = problem(Numbered(8 + rank))
said["loader"] = problem(DataLoader(data, 4), **none)
sampler = DistributedSampler(data)
said["sampler"] = problem(DataLoader(data, 4, sampler=sampler), {"seed": rank}, **none)
said["lonely"] = problem(data, val_data=data, metrics={"sum": Sum()})
said["quiet"] = problem(data, val_data=data)
seen[True].clear(); seen[False].clear()
shards = {"shuffle": False, "num_shards": 2}
fit(Stream([5, 5]), *fresh(), {"max_epochs": 1}, val_data=Stream([4, 2]), **shards)
said["shards"] = [*seen[True], *seen[False]]
said["odd"] = problem(Stream([5, 5, 5]), **{**shards, "num_shards": 3})
said["others"] = problem(Stream([5, 5, 5, 5]), **{**shards, "num_shards": 2 + 2 * rank})
model, optimizer = fresh()
trainer = Trainer(device="cpu", run_dir=None, enable_progress_bar=False)
said["predicted"] = len(trainer.predict(model.module, Numbered(19), batch_size=4))
if rank == 0:  # on its own, without the others
    seen[False].clear()
    trainer.evaluate(model.module, Numbered(19), loss_fn=loss_fn, batch_size=4)
    said["evaluated"] = sum(map(len, seen[False]))
plain = torch.nn.Linear(6, 3)
optimizer = torch.optim.SGD(plain.parameters(), 0.1)
fit(Numbered(19), plain, optimizer, {"max_steps": 4, "run_dir": folder + "/open"})
fit(Numbered(19), plain, optimizer, {"max_epochs": 1, "run_dir": folder + "/closed"})

def noise():
    for _ in range(4):
        yield torch.rand(3, 6), torch.randint(10**6, (3,))

def seeded_by_rank(data, **arguments):
    model = fresh()
    torch.manual_seed(30 + rank)
    seen[True].clear()
    result = fit(data, *model, {"max_epochs": 1}, **arguments)
    return [result.seed, [*seen[True]]]

said["by_rank"] = seeded_by_rank(Numbered(12))
said["noise"] = seeded_by_rank(noise(), **none)
said["same"] = problem([(torch.ones(3, 6), torch.tensor([0, 1, 2]))] * 3, **none)
said["own"] = problem(noise(), **none)
said["mixed"] = problem(data, {"seed": rank} if rank else {})
torch.manual_seed(50 + rank)
early.epoch = 0
said["early"] = [[target.tolist() for _, target in early] for _ in range(2)]
said["lengths"] = [*lengths, len(early)]
other = Loader(data, batch_size=2, seed=rank)
said["loader_seeds"] = said_by(lambda: list(other))
plain = Loader(DataLoader(data, 4))
said["plain"] = said_by(lambda: [list(plain), list(plain)])
alone = Loader(DataLoader(data, 4, sampler=sampler))
said["shared"] = said_by(lambda: list(alone) if rank == 0 else None)
print(json.dumps(said))
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Return what two processes in a group said, and the folder with their runs."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-W", "error", "-c", RANK]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(folder / "store"), str(folder)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [each.communicate(timeout=100) for each in processes]
    assert [each.returncode for each in processes] == [0, 0], said
    return [json.loads(out) for out, _ in said], folder


@pytest.mark.parametrize("count", ["23", "19"])
def test_losses_and_weights_are_those_of_a_loop_by_hand(two_ranks, count):
    """`fit` of a DDP model on gloo, against the loop that everybody writes, bit for bit on both ranks."""
    for said in (each[count] for each in two_ranks[0]):
        assert said["train"] == said["indices"]
        assert said["losses"] == said["by_hand"]
        assert said["weights"] == said["weights_by_hand"]
    first, second = (each[count] for each in two_ranks[0])
    assert first["weights"] == second["weights"]
    assert first["losses"] != second["losses"], "they train on samples of their own"


@pytest.mark.parametrize(("count", "sizes"), [("23", (3, 2)), ("19", (4, 3))])
def test_the_two_ranks_together_see_each_sample_once(two_ranks, count, sizes):
    """In each of the two epochs, in as many steps on both; what is left over makes no step of its own."""
    first, second = (each[count]["train"] for each in two_ranks[0])
    assert len(first) == len(second)
    half = len(first) // 2
    for epoch in (slice(half), slice(half, None)):
        assert sorted(itertools.chain(*first[epoch], *second[epoch])) == list(range(int(count)))
        assert (len(first[epoch][-1]), len(second[epoch][-1])) == sizes


@pytest.mark.parametrize("count", ["23", "19"])
def test_a_validation_is_over_the_samples_of_all_ranks(two_ranks, count):
    """Shares of four and three samples, and the means of all seven on both ranks."""
    first, second = (each[count] for each in two_ranks[0])
    assert sorted(itertools.chain(first["val"][-1], second["val"][-1])) == list(range(7))
    for said in (first, second):
        assert said["val_loss"] == pytest.approx(said["expected_loss"], rel=1e-6)
        assert said["right"] == pytest.approx(said["expected_right"], rel=1e-6)
        assert said["val_loss"] == first["val_loss"]


def test_evaluate_and_predict_use_all_samples_on_each_rank(two_ranks):
    """Rank zero may call them alone: nobody is waited for."""
    first, second = two_ranks[0]
    assert first["predicted"] == second["predicted"] == 19
    assert first["evaluated"] == 19


def test_what_cannot_be_shared_is_refused_or_warned_of(two_ranks):
    """Too few samples, other seeds, other data; a DataLoader of all samples; a metric of one rank's."""
    for said in two_ranks[0]:
        assert "has 1 samples, fewer than the 2 ranks" in said["few"]
        assert "seed must be the same on all ranks, got 0 to 1" in said["seeds"]
        assert "len(train_data) must be the same on all ranks, got 8 to 9" in said["sizes"]
        assert len(said["loader"]) == 1
        assert "DataLoader with sampler=DistributedSampler(dataset)" in said["loader"][0]
        assert len(said["lonely"]) == 1
        assert "metrics sum: an object" in said["lonely"][0]
        assert said["sampler"] == said["quiet"] == []


def test_the_shards_of_an_iterable_dataset_are_dealt_out(two_ranks):
    """To train on and to validate; their number must go into the ranks, and be the same on all."""
    first, second = two_ranks[0]
    assert first["shards"] == [[0, 1, 2], [0, 1], [0, 1, 2], [0]]
    assert second["shards"] == [[1, 2, 0], [1, 2], [1, 2]]
    for said in (first, second):
        assert "2 ranks share the shards of train_data" in said["odd"]
        assert "num_shards of train_data must be the same on all ranks, got 2 to 4" in said["others"]


def test_ranks_that_were_seeded_differently_share_one_order(two_ranks):
    """By torch alone it is rank zero's seed: `fit` says so, and no sample is on both."""
    for (seed, batches), said in ((each["by_rank"], each) for each in two_ranks[0]):
        assert seed == 30
        assert said["noise"][0] == 30
        assert len(batches) == 2
    first, second = (each["by_rank"][1] for each in two_ranks[0])
    assert sorted(itertools.chain(*first, *second)) == list(range(12))
    order = torch.randperm(12, generator=shuffle_generator(30, 0)).tolist()
    assert list(itertools.chain(*first)) == order[::2]


def test_ranks_that_read_the_same_generator_draw_batches_of_their_own(two_ranks):
    """Each of them, the first one and the others: none is the other rank's."""
    first, second = (each["noise"][1] for each in two_ranks[0])
    assert len(first) == len(second) == 4
    assert not set(itertools.chain(*first)) & set(itertools.chain(*second))


def test_batches_that_are_the_same_on_all_ranks_are_warned_of(two_ranks):
    """Of what yields them itself, when the first one is there; not where each rank has its own."""
    for said in two_ranks[0]:
        assert len(said["same"]) == 1
        assert "train_data (list) gives each of the 2 ranks the same first batch" in said["same"][0]
        assert said["own"] == []


def test_seeds_that_were_given_must_be_given_to_all(two_ranks):
    """One rank's own beside none is refused, by `fit`; another one's by a `Loader` too."""
    for said in two_ranks[0]:
        assert "seed must be the same on all ranks, got 1 to 1, and none on some of them" in said["mixed"]
        assert "seed must be the same on all ranks, got 0 to 1." in said["loader_seeds"]


def test_a_loader_made_before_the_group_is_a_ranks_when_it_is_read(two_ranks):
    """Its length and its samples are those of the share, in the order of rank zero's seed, epoch by epoch."""
    first, second = two_ranks[0]
    assert first["lengths"] == second["lengths"] == [5, 5, 3]
    for epoch in range(2):
        order = torch.randperm(10, generator=shuffle_generator(50, epoch)).tolist()
        for rank, said in enumerate((first, second)):
            assert list(itertools.chain(*said["early"][epoch])) == order[rank::2]


def test_a_loader_says_once_what_it_does_not_share_out(two_ranks):
    """A DataLoader of all samples; not one with a sampler for it, which a rank may read alone."""
    for said in two_ranks[0]:
        assert len(said["plain"]) == 1
        assert "data is a DataLoader that gives each of the 2 ranks all samples" in said["plain"][0]
        assert said["shared"] == []


def resume(path, run_dir):
    """Go on with a run of two ranks on one."""
    torch.manual_seed(7)
    model = torch.nn.Linear(6, 3)
    trainer = Trainer(max_epochs=3, device="cpu", run_dir=run_dir, resume=path, enable_progress_bar=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return trainer.fit(model, optimizer, Augmented(19), loss_fn=F.cross_entropy, batch_size=3, shuffle=True)


def test_another_number_of_ranks_is_no_way_to_finish_an_epoch(two_ranks, tmp_path):
    """It is refused in the middle of an epoch, and allowed between two, with a warning."""
    path = max((two_ranks[1] / "open" / "checkpoints").glob("*.safetensors"))
    with pytest.raises(CheckpointError, match="an epoch shared by 2 ranks, and this run has 1"):
        resume(path, tmp_path / "a")
    path = max((two_ranks[1] / "closed" / "checkpoints").glob("*.safetensors"))
    with pytest.warns(UserWarning, match="is of a run with 2 ranks, this one has 1"):
        assert resume(path, tmp_path / "b").num_steps == 3 + 2 * 7


@given(
    num_samples=st.integers(1, 700),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 6),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)
def test_shares_are_the_epoch_without_overlap_or_gaps(
    num_samples, batch_size, world_size, shuffle, drop_last, seed, epoch
):
    """Equal counts of batches, sizes that differ by one at most, each step the next samples of the order."""
    num_samples = max(num_samples, world_size)
    order = torch.arange(num_samples)
    if shuffle:
        order = torch.randperm(num_samples, generator=shuffle_generator(seed, epoch))
    settings = {"batch_size": batch_size, "shuffle": shuffle, "drop_last": drop_last, "seed": seed}
    plans = [
        BatchPlan(num_samples, **settings, epoch=epoch, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    (count,) = {len(plan) for plan in plans}
    used = 0
    for position in range(count):
        batches = [plan.indices(position).tolist() for plan in plans]
        sizes = [len(batch) for batch in batches]
        assert max(sizes) - min(sizes) <= 1
        assert sizes == [batch_size] * world_size or (position == count - 1 and not drop_last)
        assert sorted(itertools.chain(*batches)) == sorted(order[used : used + sum(sizes)].tolist())
        used += sum(sizes)
    left = num_samples - used
    assert left < batch_size * world_size if drop_last else left == 0


@given(
    num_samples=st.integers(1, 700),
    batch_size=st.integers(1, 9),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_one_rank_has_the_batches_that_it_had(num_samples, batch_size, shuffle, drop_last):
    """Without other ranks, each batch is the next piece of the order."""
    order = torch.randperm(num_samples, generator=shuffle_generator(5, 2)) if shuffle else range(num_samples)
    expected = [
        list(map(int, order[start : start + batch_size])) for start in range(0, num_samples, batch_size)
    ]
    if drop_last and len(expected[-1]) < batch_size:
        expected.pop()
    plan = BatchPlan(
        num_samples, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, seed=5, epoch=2
    )
    assert [plan.indices(position).tolist() for position in range(len(plan))] == expected


def test_a_loader_has_its_ranks_share(monkeypatch):
    """`Loader` in a DDP loop of one's own: its length is that of the share."""
    assert ranks() == (0, 1)
    monkeypatch.setattr("pipeline.inbound.loader.ranks", lambda: (1, 3))
    loader = Loader(torch.utils.data.TensorDataset(torch.arange(10)), batch_size=2)
    assert len(loader) == 2
    assert [batch[0].tolist() for batch in loader] == [[1, 4], [7]]


def test_dropping_the_last_batch_may_leave_a_rank_none():
    """It says so, with the number of ranks."""
    settings = {"name": "train_data", "batch_size": 4, "shuffle": False, "collate_fn": None, "seed": 0}
    with pytest.raises(ConfigError, match="fewer than one batch of 4 for each of 2 ranks"):
        as_source(Augmented(7), drop_last=True, ranks=(0, 2), **settings)
    assert as_source(Augmented(7), drop_last=False, ranks=(0, 2), **settings).num_batches == 1
