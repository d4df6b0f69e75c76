"""Iterable datasets in shards: the order of a DataLoader's workers, and the same numbers in every place."""

from __future__ import annotations

import copy
import itertools
import os
import random
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, default_collate, get_worker_info
from torch.utils.data._utils import worker as torch_worker

from pipeline import Loader, SimulatedBackend, Trainer
from pipeline.data import END, as_source
from pipeline.errors import ConfigError, WorkerDiedError
from pipeline.inbound.decide_placement import INLINE, TEXTBOOK, Place
from pipeline.inbound.fixed import Pinned
from pipeline.randomness.seeds import sample_seed
from pipeline.workers import Processes
from tests.textbook import assert_same_weights, build_model, textbook, weights
from tests.workers import Counting, DeadlyStream, Endless, FailingStream, Logged, Stream, UserError, Whole

PLACES = {
    "textbook": {"schedule": "textbook"},
    "inline": {"schedule": "overlap", "placement": "inline", "prefetch_depth": 3},
    "thread": {"placement": "thread", "num_workers": 3},
    "process": {"placement": "process", "num_workers": 2},
    "simulated": {"schedule": "overlap", "prefetch_depth": 2, "device": "simulated"},
}
DRAWS = [(), ("own",), ("torch",), ("python",), ("numpy", "torch"), ("dropout",), ("torch", "seldom")]
SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=6)


@pytest.fixture(autouse=True)
def workers_are_waited_for(monkeypatch):
    """Have batches made by workers; as it is, the loop makes them until the workers are there."""
    monkeypatch.setattr(Processes, "is_ready", wait_until_ready)


def wait_until_ready(self, num_workers, num_threads=1):
    return self._pool.wait_until_ready(60.0) and self._pool.resize(num_workers, num_threads)


def source_of(data, *, num_shards=1, batch_size=2, drop_last=False, ranks=(0, 1)):
    return as_source(
        data, name="data", batch_size=batch_size, shuffle=False, drop_last=drop_last, collate_fn=None, seed=0,
        num_shards=num_shards, ranks=ranks,
    )  # fmt: skip


def read(reader):
    """Return what is left of an epoch, made on this thread."""
    return list(iter(reader.read, END))


def judge(data, epoch, *, num_shards, batch_size, seed=0):
    """Return an epoch's batches as they are promised: each made after seeding the global generators."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    shards = [
        list(
            judge_shard(
                copy.deepcopy(data) if num_shards > 1 else data, epoch, shard, num_shards, batch_size, seed
            )
        )
        for shard in range(num_shards)
    ]
    torch.set_rng_state(states[0]), random.setstate(states[1]), np.random.set_state(states[2])
    rounds = itertools.zip_longest(*shards)
    return [batch for batches in rounds for batch in batches if batch is not None]


def judge_shard(data, epoch, shard, num_shards, batch_size, seed):
    shard_seed = sample_seed(seed, epoch, shard)
    info = torch_worker.WorkerInfo(id=shard, num_workers=num_shards, seed=shard_seed, dataset=data)
    samples = None
    for number in itertools.count():
        batch_seed = sample_seed(shard_seed, number, 0)
        torch.manual_seed(batch_seed), random.seed(batch_seed)
        np.random.seed(batch_seed & 0xFFFFFFFF)
        torch_worker._worker_info = info if num_shards > 1 else None
        try:
            samples = iter(data) if samples is None else samples
            batch = list(itertools.islice(samples, batch_size))
        finally:
            torch_worker._worker_info = None
        if not batch:
            return
        yield default_collate(batch)


def run(data, place, *, epochs=2, **arguments):
    torch.manual_seed(3)
    model = build_model("dropout")
    place = {"device": "cpu", **PLACES[place]}
    if place["device"] == "simulated":
        place["device"] = SimulatedBackend()
    trainer = Trainer(
        **{
            "max_epochs": epochs,
            "run_dir": None,
            "enable_progress_bar": False,
            **place,
            **arguments.pop("settings", {}),
        }
    )
    result = trainer.fit(
        model, torch.optim.SGD(model.parameters(), 0.05), data, loss_fn=F.cross_entropy, **arguments
    )
    return list(result.losses), weights(model)


def without_own(draws, num_shards):
    """Leave out a generator of the dataset's own: without shards it has no copy, and goes on as it is."""
    return draws if num_shards > 1 else tuple(each for each in draws if each != "own")


def assert_same(found, expected):
    assert len(found) == len(expected)
    for batch, other in zip(found, expected, strict=True):
        assert torch.equal(batch[0], other[0])
        assert torch.equal(batch[1], other[1])


# A process that has threads is forked, which Python 3.12 and newer warn of.
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@settings(max_examples=10)
@given(sizes=SIZES, num_shards=st.integers(2, 4), batch_size=st.integers(1, 4), drop_last=st.booleans())
def test_the_order_is_that_of_a_data_loaders_workers(sizes, num_shards, batch_size, drop_last):
    """Uneven and empty shards too: the same batches, one after the other."""
    data = Stream(sizes, draws=("own",))
    expected = list(DataLoader(data, batch_size, num_workers=num_shards, drop_last=drop_last))
    source = source_of(data, num_shards=num_shards, batch_size=batch_size, drop_last=drop_last)
    assert_same(read(source.open(0)), expected)


@settings(max_examples=20)
@given(
    sizes=SIZES.filter(any),
    num_shards=st.integers(1, 4),
    batch_size=st.integers(1, 4),
    place=st.sampled_from(list(PLACES)),
    draws=st.sampled_from(DRAWS),
)
def test_a_place_equals_the_textbook_loop(sizes, num_shards, batch_size, place, draws):
    """Losses and weights are those of 25 plain lines over the promised batches, whatever the data draws."""
    draws = without_own(draws, num_shards)
    arguments = {"num_shards": num_shards, "batch_size": batch_size}
    torch.manual_seed(3)
    model = build_model("dropout")
    data = Stream(sizes, draws=draws)
    batches = [judge(data, epoch, seed=3, **arguments) for epoch in range(2)]
    losses = textbook(model, torch.optim.SGD(model.parameters(), 0.05), batches)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "random numbers were drawn")
        found, learned = run(Stream(sizes, draws=draws), place, **arguments)
    assert found == losses
    assert_same_weights(learned, weights(model))


class Wandering(Pinned):
    """Changes the place after so many batches each."""

    def __init__(self, stays):
        super().__init__(TEXTBOOK)
        self._stays, self._left = itertools.cycle(stays), 0

    def choose(self, reader):
        place, self._left = next(self._stays)
        return place

    def goes_on(self):
        self._left -= 1
        return self._left >= 0


STAYS = st.tuples(
    st.sampled_from([TEXTBOOK, INLINE, Place("process", 1), Place("process", 3)]), st.integers(1, 5)
)


@pytest.mark.filterwarnings("ignore:random numbers were drawn")
@settings(max_examples=15)
@given(
    stays=st.lists(STAYS, min_size=2, max_size=6),
    sizes=SIZES.filter(any),
    num_shards=st.integers(1, 4),
    draws=st.sampled_from(DRAWS),
    depth=st.integers(1, 5),
)
def test_the_place_may_change_between_any_two_batches(stays, sizes, num_shards, draws, depth):
    """Whoever goes on reads again what others have read, and makes the same batches, in every epoch."""
    draws = without_own(draws, num_shards)
    data = Stream(sizes, draws=draws)
    with Loader(data, batch_size=2, num_shards=num_shards, depth=depth) as loader:
        loader._inbound.chooser = Wandering(stays)
        for epoch in range(2):
            assert_same(list(loader), judge(data, epoch, num_shards=num_shards, batch_size=2))


def test_another_epoch_draws_other_numbers():
    """The comparisons can fail: neither two epochs nor two shards have the same noise."""
    source = source_of(Stream([4, 4], draws=("torch",)), num_shards=2, batch_size=4)
    (one, other), (later, _) = read(source.open(0)), read(source.open(1))
    assert not torch.equal(one[0], later[0])
    assert not torch.allclose(one[0][0], other[0][0] - 1)  # without the number of the file


@pytest.mark.parametrize("place", ["inline", "process"])
def test_an_endless_stream_ends_with_the_steps(place):
    """Nobody waits for its end; a limit of an epoch's batches is kept, too."""
    arguments = {"batch_size": 2, "num_shards": 3}
    expected = run(
        Endless(draws=("torch",)), "textbook", settings={"max_steps": 7, "max_epochs": None}, **arguments
    )
    found = run(Endless(draws=("torch",)), place, settings={"max_steps": 7, "max_epochs": None}, **arguments)
    assert found[0] == expected[0]
    limited = run(Endless(draws=("torch",)), place, settings={"limit_train_batches": 7}, **arguments)[0]
    assert limited[:7] == expected[0]
    assert len(limited) == 14


@settings(max_examples=5)
@given(file=st.integers(0, 3), index=st.integers(0, 6), num_workers=st.integers(1, 3))
def test_a_worker_that_dies_changes_no_number(tmp_path_factory, file, index, num_workers):
    """It is named with its shard; another one reads the shard again, and the others' shards that it had."""
    memory = str(tmp_path_factory.mktemp("died") / "once")
    number = max(
        index // 2, int(file == 0)
    )  # the first batch of all is the trainer's: who goes on reads it too
    arguments = {"num_shards": 4, "batch_size": 2}
    data = DeadlyStream([7] * 4, file=file, index=index, memory=memory)
    with (
        Loader(data, placement="process", num_workers=num_workers, **arguments) as loader,
        pytest.warns(
            RuntimeWarning, match=rf"SIGKILL while it made .*batch {number} of shard {file} of epoch 0"
        ),
    ):
        assert_same(list(loader), judge(Stream([7] * 4, draws=("torch",)), 0, **arguments))


@pytest.mark.filterwarnings("ignore:a worker process ended:RuntimeWarning")
def test_a_shard_that_kills_its_workers_ends_the_run():
    """The error names the shard and the number of its batch."""
    data = DeadlyStream([6, 6], file=1, index=4)
    with pytest.raises(WorkerDiedError, match=r"twice.* batch 2 of shard 1 of epoch 0"):
        run(data, "process", batch_size=2, num_shards=2)


@pytest.mark.parametrize("place", list(PLACES))
def test_the_users_exception_keeps_its_type(place):
    """It comes behind the batches before it, and says in which shard it was raised."""
    data = FailingStream([9, 9], file=1, index=5)
    with pytest.raises(UserError, match="mine") as caught:
        run(data, place, batch_size=2, num_shards=2)
    assert "stage 'fetch', batch 2 of shard 1 of epoch 0, step 5" in caught.value.__notes__


def test_one_shard_is_a_plain_loop():
    """Without shards there is no worker to ask for, and a dataset that counts its epochs goes on counting."""
    data, plain = Counting([5, 3]), Counting([5, 3])
    with Loader(data, batch_size=3) as loader:
        for _ in range(3):
            assert_same(list(loader), list(DataLoader(plain, 3)))
    assert data.epoch == 3


@pytest.mark.filterwarnings("ignore:random numbers were drawn")
@pytest.mark.parametrize("placement", ["inline", "textbook"])
def test_an_epoch_begun_again_counts_once(placement):
    """A draw that is only found when the first batch is made, which makes it again, is no further epoch."""
    data = Counting([6], draws=("python",))
    with Loader(data, batch_size=2, placement="inline") as loader:
        if placement == "textbook":
            loader._inbound.chooser = Pinned(TEXTBOOK)
        found = [list(loader), list(loader)]
    plain = Counting([6], draws=("python",))
    for epoch in range(2):
        assert_same(found[epoch], judge(plain, epoch, num_shards=1, batch_size=2))


def test_data_that_changes_itself_is_refused_in_a_process():
    """A process would count from where the trainer's stood: the error names what changes, and what to do."""
    with pytest.raises(ConfigError, match=r"Counting changes its own epoch .*local variables of __iter__"):
        run(Counting([9]), "process", batch_size=2)
    run(Counting([9, 9]), "process", batch_size=2, num_shards=2)  # each shard has a copy, in every place


@pytest.mark.parametrize("place", list(PLACES))
def test_data_that_does_not_split_itself_is_refused(place):
    """It would yield everything several times; the error shows the lines to write."""
    with pytest.raises(ConfigError, match=r"every sample 2 times.*(?s:.)*get_worker_info\(\)"):
        run(Whole([9]), place, batch_size=2, num_shards=2)


class Uncopyable(Stream):
    def __init__(self, sizes):
        super().__init__(sizes)
        self.lock = threading.Lock()


def test_settings_that_do_not_fit_are_refused():
    """Before the first batch, or at it; the error says what to type."""
    with pytest.raises(ConfigError, match="num_shards must be an integer of 1 or more, got 0"):
        source_of(Stream([3]), num_shards=0)
    with pytest.raises(ConfigError, match=r"num_shards is for an IterableDataset.*a list"):
        source_of([1, 2], num_shards=2)
    with pytest.raises(ConfigError, match=r"Shuffle in its __iter__"):
        Loader(Stream([3]), batch_size=2, shuffle=True)
    with pytest.raises(ConfigError, match=r"cannot be copied: .*lock.*num_shards=1"):
        read(source_of(Uncopyable([3]), num_shards=2).open(0))
    assert len(read(source_of(Uncopyable([3])).open(0))) == 2
    with pytest.raises(ConfigError, match=r"2 ranks share the shards of data.*got 3. Set num_shards=4"):
        source_of(Stream([3]), num_shards=3, ranks=(1, 2))


def test_shards_are_for_whichever_data_is_iterable():
    """Validation data is split if it is iterable, and left alone if it has samples with numbers."""
    pairs = [(torch.zeros(6), 0)] * 5
    run(Stream([4, 4]), "inline", batch_size=2, num_shards=2, val_data=pairs)
    run(Stream([4, 4]), "inline", batch_size=2, num_shards=2, val_data=Stream([3, 2]))
    run(pairs, "inline", batch_size=2, num_shards=2, val_data=Stream([3, 2]))
    with pytest.raises(ConfigError, match=r"num_shards is for"):
        run(pairs, "inline", batch_size=2, num_shards=2, val_data=pairs)


def test_evaluate_and_predict_read_every_shard():
    """Both take the number of shards, and see each sample once."""
    trainer, model = Trainer(run_dir=None, enable_progress_bar=False), build_model("linear")
    data = Stream([3, 5, 1])
    found = trainer.predict(model, data, batch_size=2, num_shards=3)
    batches = judge(data, -1, num_shards=3, batch_size=2)
    inputs, target = torch.cat([batch[0] for batch in batches]), torch.cat([batch[1] for batch in batches])
    assert found.shape == (9, 3)
    assert torch.allclose(found, model(inputs))
    loss = trainer.evaluate(model, data, loss_fn=F.cross_entropy, batch_size=2, num_shards=3)["loss"]
    assert loss == pytest.approx(F.cross_entropy(model(inputs), target).item())


def test_ranks_share_the_shards():
    """Shard s goes to rank s modulo their number; together they have every batch once."""
    whole = judge(Stream([4, 2, 6, 3]), 0, num_shards=4, batch_size=2)
    parts = []
    for rank in range(2):
        reader = source_of(Stream([4, 2, 6, 3]), num_shards=4, ranks=(rank, 2)).open(0)
        parts.append(read(reader))
        assert set(reader.lengths) == {rank, rank + 2}
    order = lambda batches: sorted(batch[0].sum().item() for batch in batches)  # noqa: E731
    assert order(parts[0] + parts[1]) == order(whole)


class Asking(Stream):
    """Tells what it was told."""

    def __init__(self):
        super().__init__([4, 4])
        self.weights = torch.ones(3)

    def __iter__(self):
        found = []
        thread = threading.Thread(target=lambda: found.append(get_worker_info()))
        thread.start()
        thread.join()
        info = get_worker_info()
        for _ in range(4):
            yield [info.id, info.num_workers, info.seed, info.dataset is self, found[0] is None,
                   info.dataset.weights.data_ptr()]  # fmt: skip


def test_a_shard_is_told_of_itself_and_nobody_else_is():
    """As in a worker; another thread, which may iterate over other data, and this one afterwards are not."""
    data = Asking()
    first, second = read(source_of(data, num_shards=2, batch_size=4).open(3))
    for shard, batch in enumerate((first, second)):
        found = [values[0].item() for values in batch]
        assert found == [shard, 2, sample_seed(0, 3, shard), True, True, data.weights.data_ptr()]
    assert get_worker_info() is None


def test_a_shard_stays_with_its_worker(tmp_path):
    """Nothing is read twice but the first batch of all, which the trainer makes."""
    data = Logged([8, 5, 7], log=str(tmp_path / "log"))
    with Loader(data, batch_size=2, num_shards=3, placement="process", num_workers=2) as loader:
        assert_same(list(loader), judge(Stream([8, 5, 7]), 0, num_shards=3, batch_size=2))
    lines = [tuple(map(int, line.split())) for line in (tmp_path / "log").read_text().splitlines()]
    by_workers = [line for line in lines if line[0] != os.getpid()]
    assert len(lines) - len(by_workers) == 2
    assert len(by_workers) == len(set(by_workers)) == 20
    assert {len({pid for pid, file, _ in by_workers if file == shard}) for shard in range(3)} == {1}
    assert len({pid for pid, _, _ in by_workers}) == 2


def test_two_loops_over_one_loader_disturb_each_other_in_nothing():
    """A worker that is asked for two epochs in turn begins again each time, and is right."""
    data = Stream([5, 4, 3], draws=("torch", "own"))
    with Loader(data, batch_size=2, num_shards=2, placement="process", num_workers=2) as loader:
        one, other = zip(*zip(loader, loader, strict=True), strict=True)
    assert_same(one, judge(data, 0, num_shards=2, batch_size=2))
    assert_same(other, judge(data, 1, num_shards=2, batch_size=2))


def test_the_position_in_an_epoch_is_known_without_reading():
    """What a checkpoint has says which shard's turn it is; of another number of shards it is refused."""
    data = Stream([5, 0, 2, 9])
    source = source_of(data, num_shards=4)
    reader = source.open(0)
    expected = read(reader)
    state = source.state(6)
    for start in range(len(expected) + 1):
        other = source_of(data, num_shards=4)
        other.load_state(state)
        reader = other.open(0, start=start)
        assert not reader._fetcher._shards  # nothing was read yet
        assert_same(read(reader), expected[start:])
        assert_same(read(source_of(data, num_shards=4).open(0, start=start)), expected[start:])  # and without
    with pytest.raises(ConfigError, match=r"num_shards was 4 and is 2.*Set num_shards=4"):
        source_of(data, num_shards=2).load_state(state)


def test_iterators_end_with_their_epoch():
    """What a generator holds is let go of when the loop is left, and not when the next one begins."""
    ended = []

    class Closing(Stream):
        def __iter__(self):
            try:
                yield from super().__iter__()
            finally:
                ended.append(True)

    for placement in ("inline", "auto"):
        # More samples than the belt holds: a thread that reads ahead cannot come to their end.
        batches = iter(Loader(Closing([999]), batch_size=2, placement=placement))
        next(batches)
        assert not ended
        batches.close()
        assert ended == [True]
        ended.clear()
