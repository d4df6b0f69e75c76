"""What a user seeds decides: `torch.manual_seed(n)` alone makes another run of n, and the same one twice."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset

from pipeline import Loader, StageError, Trainer, prefetch
from pipeline.randomness.seeds import sample_seed
from pipeline.report.record import load
from tests.workers import Augmented, Stream


class Endless(IterableDataset):
    """Rows that are drawn."""

    def __init__(self, count=24):
        self.count = count

    def __iter__(self):
        for _ in range(self.count):
            yield torch.rand(6), torch.randint(3, ())


def drawn():
    """Yield batches; the first thing drawn is an order, as by a loop over shuffled files."""
    order = torch.randperm(6)
    for number in order:
        yield torch.rand(4, 6) + number, torch.randint(3, (4,))


def dropped():
    """Yield batches of a draw that takes no generator."""
    for _ in range(6):
        yield F.dropout(torch.ones(4, 6)), torch.randint(3, (4,))


class Ordered:
    """An iterable that draws its order when it is asked for its iterator, and not at the first batch."""

    def __iter__(self):
        order = torch.randperm(24).split(4)
        return iter([(torch.stack([numbers / 24] * 6, 1), numbers % 3) for numbers in order])


MAPPED = {"batch_size": 4, "shuffle": True}
DATA = {
    "dataset": lambda: (Augmented(24), MAPPED),
    "shards": lambda: (Stream([8, 8, 8], draws=("torch",)), {"batch_size": 4, "num_shards": 3}),
    "iterable dataset": lambda: (Endless(), {"batch_size": 4}),
    "loader": lambda: (DataLoader(Augmented(24), 4, shuffle=True), {}),
    "loader as it is": lambda: (DataLoader(Augmented(24), 4, shuffle=True, worker_init_fn=print), {}),
    "loader of an iterable dataset": lambda: (DataLoader(Endless(), 4), {}),
    "generator": lambda: (drawn(), {}),
    "generator of unhookable draws": lambda: (dropped(), {}),
    "iterable": lambda: (Ordered(), {}),
}
PLACES = {
    "textbook": {"schedule": "textbook"},
    "auto": {},
    "inline": {"placement": "inline"},
    "thread": {"placement": "thread", "num_workers": 2},
}


def fit(data, batching, model=None, **settings):
    """Train a small model with dropout; return what it gave, and what its batches were."""
    model = model or torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(0.4), torch.nn.Linear(8, 3))
    seen = []

    def step(model, batch):
        seen.append(batch[0].clone())
        return F.cross_entropy(model(batch[0]), batch[1])

    settings = {"max_epochs": 1, "run_dir": None, "device": "cpu", **settings}
    trainer = Trainer(enable_progress_bar=False, **settings)
    return trainer.fit(model, torch.optim.SGD(model.parameters(), 0.1), data, step=step, **batching), seen


def run(name, manual_seed, **settings):
    torch.manual_seed(manual_seed)
    result, seen = fit(*DATA[name](), **settings)
    return result.losses.tolist(), seen, torch.get_rng_state()


@pytest.mark.filterwarnings("ignore:random numbers were drawn")
@pytest.mark.parametrize("name", DATA)
def test_torchs_seed_decides_the_data(name):
    """In each place the same run for one seed, and not one batch of it with another seed."""
    losses, seen, left = run(name, 3, **PLACES["textbook"])
    assert len(seen) == 6
    for place in PLACES.values():
        found_losses, found, found_left = run(name, 3, **place)
        assert found_losses == losses
        assert all(map(torch.equal, found, seen))
        assert torch.equal(found_left, left), "the model's generator moved otherwise"
    other = run(name, 4, **PLACES["textbook"])[1]
    assert len(other) == len(seen)
    assert not any(map(torch.equal, other, seen))


@pytest.mark.filterwarnings("ignore:random numbers were drawn")
@pytest.mark.parametrize("name", set(DATA) - {"loader", "loader as it is", "loader of an iterable dataset"})
def test_data_moves_no_generator_of_the_models(name):
    """After a run it stands where it would stand if the data had drawn nothing, the first batch included."""
    left = run(name, 3)[2]
    torch.manual_seed(3)
    fit([(torch.ones(4, 6), torch.zeros(4, dtype=torch.int64))] * 6, {})
    assert torch.equal(torch.get_rng_state(), left)


@pytest.mark.parametrize("make", [drawn, dropped, lambda: Ordered()], ids=["drawn", "dropped", "ordered"])
@pytest.mark.filterwarnings("ignore:random numbers were drawn")
def test_what_yields_batches_draws_from_one_stream(make):
    """All of an epoch are what a plain loop gives right after torch was seeded with ``(seed, epoch, 0)``."""
    torch.manual_seed(sample_seed(5, 0, 0))
    expected = [inputs for inputs, _ in make()]
    for place in PLACES.values():
        torch.manual_seed(5)
        assert all(map(torch.equal, fit(make(), {}, **place)[1], expected))


@pytest.mark.parametrize("worker_init_fn", [None, print], ids=["taken apart", "as it is"])
def test_a_loaders_order_is_that_of_a_plain_loop(worker_init_fn):
    """Drawn from the global generator as the epoch begins, whatever its dataset draws."""
    torch.manual_seed(5)
    model = torch.nn.Linear(6, 3)
    loader = DataLoader(Augmented(24, draws=()), 4, shuffle=True)
    expected = [[batch[:, 0].tolist() for batch, _ in loader] for _ in range(2)]
    torch.manual_seed(5)
    model = torch.nn.Linear(6, 3)
    loader = DataLoader(Augmented(24), 4, shuffle=True, worker_init_fn=worker_init_fn)
    seen = fit(loader, {}, model, max_epochs=2)[1]
    found = [batch[:, 0].floor().tolist() for batch in seen]
    assert [found[:6], found[6:]] == expected


def test_a_seed_that_is_given_decides():
    """Whatever torch was seeded with; and torch's goes on to decide the model's numbers."""
    seen = [run("dataset", seed, seed=7) for seed in (1, 2)]
    assert all(map(torch.equal, seen[0][1], seen[1][1]))
    assert seen[0][0] != seen[1][0]


@pytest.mark.parametrize("seed", [3, -1, 2**63 + 5, None])
def test_a_run_says_by_which_seed_it_can_be_had_again(tmp_path, seed):
    """In its result, its report, its text and page, and its checkpoint; one that torch drew itself, too."""
    torch.seed() if seed is None else torch.manual_seed(seed)
    used = torch.initial_seed()
    result, seen = fit(Augmented(24), MAPPED, run_dir=tmp_path / "run")
    report = load(tmp_path / "run")
    assert (result.seed, report.settings["seed"], report.facts["seed"]) == (used, used, str(used))
    assert f"torch's seed {used}" in str(result.report).splitlines()[0]
    assert f'"seed": "{used}"' in (tmp_path / "run" / "report.html").read_text()
    assert Trainer().seed is None
    again, found = fit(Augmented(24), MAPPED, seed=result.seed)
    assert again.seed == used
    assert f", seed {used}" in str(again.report).splitlines()[0]
    assert all(map(torch.equal, found, seen))


def test_evaluation_follows_torchs_seed():
    """`evaluate` and `predict` take it when they begin, as `fit` does."""
    trainer = Trainer(enable_progress_bar=False, device="cpu")
    model, found = torch.nn.Linear(6, 3), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        loss = trainer.evaluate(model, Augmented(8), loss_fn=F.cross_entropy, batch_size=4)["loss"]
        found.append((loss, trainer.predict(model, Augmented(8), batch_size=4).tolist()))
    assert found[0] == found[1]
    assert found[0][0] != found[2][0]
    assert found[0][1] != found[2][1]


@pytest.mark.parametrize("settings", [
    {"placement": "inline"}, {"placement": "process", "num_workers": 1},
], ids=lambda each: each["placement"])  # fmt: skip
def test_a_loader_follows_torchs_seed_from_epoch_to_epoch(settings):
    """Seeded anew between two epochs; worker processes need not be started again for that."""
    expected = {}
    for seed in (1, 2):
        with Loader(Augmented(24), **MAPPED, seed=seed) as plain:
            expected[seed] = [batch for batch, _ in plain]
    with Loader(Augmented(24), **MAPPED, **settings) as loader:
        if settings["placement"] == "process":
            loader._inbound.start_processes(1)
            assert loader._inbound._processes.wait_until_ready()
        for seed in (1, 2, 1):
            processes = loader._inbound._processes
            torch.manual_seed(seed)
            loader.epoch = 0
            assert all(map(torch.equal, (batch for batch, _ in loader), expected[seed]))
            assert loader._inbound._processes is processes


def test_two_epochs_of_one_loader_keep_their_seeds():
    """Seeded anew while an epoch is under way, that one goes on as it began."""
    with Loader(Augmented(24), **MAPPED, seed=1) as plain:
        expected = [batch for batch, _ in plain]
    with Loader(Augmented(24), **MAPPED) as loader:
        torch.manual_seed(1)
        batches = iter(loader)
        first = next(batches)[0]
        torch.manual_seed(2)
        next(iter(loader))
        assert all(map(torch.equal, [first, *(batch for batch, _ in batches)], expected))


def test_a_loader_within_an_iterable_follows_the_users_seed():
    """Passed to `fit` itself, or opened while an iterable's own draws are set apart, under another seed."""
    with Loader(Augmented(24), **MAPPED, seed=3) as plain:
        expected = [batch for batch, _ in plain]
    torch.manual_seed(3)
    with Loader(Augmented(24), **MAPPED) as loader:
        assert all(map(torch.equal, fit(loader, {}, **PLACES["textbook"])[1], expected))
        assert loader.epoch == 1

    class Within:
        def __iter__(self):
            self.loader = Loader(Augmented(24, draws=()), **MAPPED)
            return iter(self.loader)

    with Loader(Augmented(24, draws=()), **MAPPED, seed=3) as plain:
        expected = [batch for batch, _ in plain]
    torch.manual_seed(3)
    assert all(map(torch.equal, (batch for batch, _ in prefetch(Within(), device="cpu")), expected))


@pytest.mark.parametrize("name", ["dataset", "loader", "iterable"])
def test_a_resumed_run_keeps_its_seed(tmp_path, name):
    """Seeded otherwise by torch alone, it says so and goes on as if it had not been stopped."""
    whole = run(name, 3, max_epochs=3)[1]
    part = run(name, 3, max_epochs=3, max_time=1e-9, run_dir=tmp_path)[1]
    with pytest.warns(
        UserWarning, match=r"seeded with 4, .* seed of its checkpoint, 3,.* Pass seed=4 to have"
    ):
        rest = run(name, 4, max_epochs=3, run_dir=tmp_path, resume="auto")[1]
    assert len(part) == 1
    assert all(map(torch.equal, [*part, *rest], whole))


@pytest.mark.parametrize(("settings", "said"), [({}, 0), ({"seed": 4}, 1), ({"seed": 3}, 0)])
def test_a_resumed_run_warns_only_of_what_the_user_has_seeded(tmp_path, settings, said):
    """Not of the number that torch itself has drawn in the new process; an explicit seed decides."""
    run("dataset", 3, max_epochs=3, max_time=1e-9, run_dir=tmp_path)
    torch.manual_seed(2**63 + 11)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result, _ = fit(*DATA["dataset"](), max_epochs=3, run_dir=tmp_path, resume="auto", **settings)
    assert result.seed == settings.get("seed", 3)
    assert ["seed was 3, is 4" in str(each.message) for each in caught] == [True] * said


class Stateful:
    """Yields drawn batches, and knows how many it has yielded."""

    def __init__(self):
        self.count = 0

    def __iter__(self):
        while self.count < 6:
            self.count += 1
            yield torch.rand(4, 6), torch.randint(3, (4,))
        self.count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


@pytest.mark.parametrize("place", ["textbook", "inline"])
def test_a_stateful_iterable_goes_on_drawing_where_it_was(tmp_path, place):
    """It is given its state, and not read again; the stream that it draws from stands where it stood, too."""
    torch.manual_seed(3)
    whole = fit(Stateful(), {}, max_epochs=2)[1]
    torch.manual_seed(3)
    part = fit(Stateful(), {}, max_epochs=2, max_time=1e-9, run_dir=tmp_path, **PLACES[place])[1]
    rest = fit(Stateful(), {}, max_epochs=2, run_dir=tmp_path, resume="auto", **PLACES[place])[1]
    assert len(part) == 1
    assert all(map(torch.equal, [*part, *rest], whole))


def test_a_seed_may_be_one_of_numpys(tmp_path):
    """It is taken as the number that it is, in the checkpoint too."""
    whole = run("dataset", 3, max_epochs=3, seed=5)[1]
    part = run("dataset", 3, max_epochs=3, seed=np.int64(5), max_time=1e-9, run_dir=tmp_path)[1]
    rest = run("dataset", 3, max_epochs=3, seed=5, run_dir=tmp_path, resume="auto")[1]
    assert all(map(torch.equal, [*part, *rest], whole))


def test_a_seed_reaches_the_loggers():
    """In the settings that describe the run."""
    found = []

    class Keeper:
        def open(self, info):
            found.append(info.hparams["trainer"]["seed"])

        def log(self, row): ...
        def flush(self): ...
        def close(self): ...

    torch.manual_seed(11)
    model = torch.nn.Linear(6, 3)
    trainer = Trainer(run_dir=None, enable_progress_bar=False)
    trainer.fit(
        model, torch.optim.SGD(model.parameters(), 0.1), Augmented(8), loss_fn=F.cross_entropy, batch_size=4,
        loggers=[Keeper()],
    )  # fmt: skip
    assert found == [11]


@pytest.mark.parametrize("count", [22, 24])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_generator_of_the_loaders_moves_as_in_a_plain_loop(count, place, drop_last):
    """torch's sampler draws once more behind its last sample, and so from another place in the next epoch."""
    ends, orders = [], []
    for epochs in (0, 3):
        generator = torch.Generator().manual_seed(3)
        loader = DataLoader(
            Augmented(count, draws=()), 4, shuffle=True, drop_last=drop_last, generator=generator
        )
        if epochs:
            seen = fit(loader, {}, max_epochs=epochs, **PLACES[place])[1]
        else:
            seen = [batch for _ in range(3) for batch, _ in loader]
        orders.append([batch[:, 0].tolist() for batch in seen])
        ends.append(generator.get_state())
    assert orders[0] == orders[1]
    assert torch.equal(*ends)


class OfLoaders:
    """Yields what two loaders of ours yield side by side."""

    def __iter__(self):
        loaders = [Loader(Augmented(40, draws=draws), **MAPPED) for draws in (("torch",), ("python",))]
        for (inputs, target), (more, _) in zip(*loaders, strict=True):
            yield inputs + more, target


OURS = {
    "loader": lambda: Loader(Augmented(40), **MAPPED),
    "prefetch": lambda: prefetch(DataLoader(Augmented(40), 4), device="cpu"),
    "of loaders": OfLoaders,
}


@pytest.mark.parametrize("place", sorted(set(PLACES) - {"textbook"}))
@pytest.mark.parametrize("name", OURS)
def test_loaders_of_ours_are_read_by_the_loop_thread(name, place):
    """They draw by the global generators, from which the model draws; and they read ahead themselves."""
    torch.manual_seed(3)
    expected, seen = fit(OURS[name](), {}, **PLACES["textbook"])
    torch.manual_seed(3)
    result, found = fit(OURS[name](), {}, **PLACES[place])
    assert all(map(torch.equal, found, seen))
    assert result.losses.tolist() == expected.losses.tolist()
    assert result.placement.place == "textbook"
    assert "which reads ahead itself" in (result.placement.limit or str(result.placement))
    assert "placement='inline' reads it ahead" not in str(result.placement)


def test_a_loader_that_a_thread_begins_is_refused():
    """It would draw beside the model; that it comes was not to be seen by the first batch."""

    def late():
        yield torch.rand(4, 6), torch.randint(3, (4,))
        yield from Loader(Augmented(24), **MAPPED)

    with pytest.raises(StageError, match=r"a pipeline.Loader .* was begun by a thread"):
        fit(late(), {}, **PLACES["inline"])
