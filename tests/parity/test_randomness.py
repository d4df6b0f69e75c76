"""Random draws of a dataset: the same in either schedule, and never seen by the model."""

from __future__ import annotations

import os
import random
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2

from pipeline import Loader, SimulatedBackend, Trainer
from pipeline.randomness import numpy_memory
from pipeline.randomness.draws import SampleRandomness, ThreadRandomness
from pipeline.randomness.generator_mode import _HOOKABLE, _UNHOOKABLE, GeneratorMode, UnhookableDrawError
from pipeline.randomness.generators import NumpyGenerator
from pipeline.randomness.seeds import sample_seed
from tests.textbook import assert_same_weights, build_model, seeded_batches, textbook, weights


class Drawing(Dataset):
    """Adds what `draw` gives to each sample."""

    def __init__(self, draw, num_samples=20):
        self.draw, self.num_samples = draw, num_samples

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index):
        return torch.full((6,), index / 10) + self.draw(index), index % 3


AUGMENT = v2.Compose(
    [
        v2.RandomHorizontalFlip(),
        v2.RandomAffine(10, (0.1, 0.1)),
        v2.ColorJitter(0.2, 0.2, 0.2),
        v2.RandomErasing(),
        v2.RandomApply([v2.GaussianBlur(3)], p=0.3),
        v2.RandomResizedCrop(6),
    ]
)


def augmented(index):
    image = torch.arange(3 * 8 * 8, dtype=torch.float32).reshape(3, 8, 8) / 192
    return AUGMENT(image)[0, 0]


def sometimes(draw):
    """Draw only for a sample in the middle of the data, so that the first batch does not show it."""
    return lambda index: draw(index) if index == 13 else 0.0


def reseeding(index):
    torch.manual_seed(index)
    return torch.rand(6)


def forking(index):
    with torch.random.fork_rng():
        torch.manual_seed(index)
        return torch.rand(6)


DRAWS = {
    "nothing": lambda index: 0.0,
    "torch": lambda index: torch.rand(6) + torch.randperm(6) + torch.multinomial(torch.ones(6), 6),
    "torchvision": augmented,
    "python": lambda index: random.random(),
    "python gauss": lambda index: random.gauss(0, 1),
    "numpy": lambda index: float(np.random.rand()),
    "all three": lambda index: torch.rand(6) + random.random() + float(np.random.randn()),
    "dropout": lambda index: F.dropout(torch.ones(6)),
    "torch and dropout": lambda index: torch.rand(6) + F.dropout(torch.ones(6)),
    "reseeds torch": reseeding,
    "forks torch": forking,
    "names torch's generator": lambda index: torch.rand(6, generator=torch.default_generator),
    "numpy gauss": lambda index: float(np.random.randn()),
    "python, seldom": sometimes(lambda index: random.random()),
    "numpy, seldom": sometimes(lambda index: float(np.random.rand())),
    "dropout, seldom": sometimes(lambda index: F.dropout(torch.ones(6))),
}
IN_LINE = {
    name for name in DRAWS if name not in ("nothing", "torch", "torchvision", "names torch's generator")
}


def run(draw, schedule, device="cpu"):
    torch.manual_seed(3)
    model = build_model("dropout")
    trainer = Trainer(
        max_epochs=2, schedule=schedule, run_dir=None, enable_progress_bar=False, device=device,
        prefetch_depth=3,
    )  # fmt: skip
    result = trainer.fit(
        model, torch.optim.SGD(model.parameters(), 0.05), Drawing(draw), loss_fn=F.cross_entropy,
        batch_size=4, shuffle=True,
    )  # fmt: skip
    return result.losses.tolist(), weights(model)


@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_the_same_in_either_schedule(name):
    """Whatever a dataset draws from, overlap and textbook make the same samples."""
    losses, learned = run(DRAWS[name], "textbook")
    for device in ("cpu", SimulatedBackend()):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found_losses, found = run(DRAWS[name], "overlap", device)
        assert found_losses == losses
        assert_same_weights(found, learned)
        in_line = [each for each in caught if "so the loop thread makes the batches" in str(each.message)]
        assert bool(in_line) == (name in IN_LINE)


@pytest.mark.parametrize("name", ["torch", "torchvision", "dropout", "torch and dropout"])
def test_samples_are_those_of_a_seeded_plain_loop(name):
    """Each sample is what it would be right after ``torch.manual_seed`` with its own seed."""
    torch.manual_seed(3)
    model = build_model("dropout")
    batches = seeded_batches(Drawing(DRAWS[name]), epochs=2, batch_size=4, shuffle=True)
    losses = textbook(model, torch.optim.SGD(model.parameters(), 0.05), batches)
    assert run(DRAWS[name], "textbook")[0] == losses


@pytest.mark.parametrize("is_seen", [True, False])
@pytest.mark.parametrize("has_one_in_store", [True, False])
def test_numpys_generator_is_seen_and_put_back_wherever_it_lies(is_seen, has_one_in_store, monkeypatch):
    """In its memory, and by NumPy's own functions where nobody knows where that is."""
    if not is_seen:
        monkeypatch.setattr(numpy_memory, "_STORED_AT", None)
    generator, before = NumpyGenerator(), np.random.get_state()
    assert (generator.state()[0] is not None) == is_seen
    try:
        if has_one_in_store:
            np.random.randn()
        looked, state = generator.fingerprint(), generator.state()
        expected = [np.random.randn(3).tolist(), np.random.rand(700).tolist()]
        assert generator.fingerprint() != looked
        for _ in range(2):
            generator.restore(state)
            assert generator.fingerprint() == looked
            assert [np.random.randn(3).tolist(), np.random.rand(700).tolist()] == expected
    finally:
        np.random.set_state(before)


@pytest.mark.parametrize("schedule", ["textbook", "overlap"])
@pytest.mark.filterwarnings("ignore:random numbers were drawn")
def test_global_generators_are_left_alone(schedule):
    """A dataset's draws move no global generator: not for the model, nor for the user's script."""
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    model = build_model("linear")
    state = torch.get_rng_state()
    trainer = Trainer(schedule=schedule, run_dir=None, enable_progress_bar=False)
    trainer.fit(
        model, torch.optim.SGD(model.parameters(), 0.05), Drawing(DRAWS["all three"]),
        loss_fn=F.cross_entropy, batch_size=4,
    )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state)
    assert (random.random(), np.random.rand()) == expected


def test_what_cannot_be_seeded_is_not_the_same():
    """The comparison can fail: a draw from the operating system differs between two runs."""

    def unseeded(index):
        return int.from_bytes(os.urandom(4)) / 2**32

    assert run(unseeded, "textbook")[0] != run(unseeded, "textbook")[0]


def test_a_subset_keeps_its_samples_apart():
    """A sample of a Subset does not depend on its neighbours in the batch."""
    seen = {}

    def draw(index):
        value = torch.rand(6)
        seen.setdefault(index, []).append(value)
        return value

    subset = Subset(Drawing(draw), range(10))
    for batch_size in (2, 5):
        model = build_model("linear")
        trainer = Trainer(schedule="overlap", run_dir=None, enable_progress_bar=False)
        trainer.fit(model, torch.optim.SGD(model.parameters(), 0.05), subset,
                    loss_fn=F.cross_entropy, batch_size=batch_size)  # fmt: skip
    assert all(torch.equal(values[0], value) for values in seen.values() for value in values)


def test_every_torch_function_that_takes_a_generator_is_hooked():
    """The table of draws is complete for this version of torch."""
    schemas = [each for each in torch._C._jit_get_all_schemas() if each.name.startswith("aten::")]
    takes = {
        each.name.removeprefix("aten::")
        for each in schemas
        if any("Generator" in str(argument.type) for argument in each.arguments)
    }
    known = {func.__name__ for func in _HOOKABLE | _UNHOOKABLE}
    internal = {"initial_seed", "manual_seed", "seed", "_fused_dropout"}
    public = {name for name in takes if hasattr(torch, name) or hasattr(torch.Tensor, name)}
    assert public - internal - {"random"} <= known


@pytest.mark.parametrize("func", sorted(_HOOKABLE, key=lambda func: func.__name__), ids=lambda f: f.__name__)
def test_hooked_functions_leave_the_global_generator_alone(func):
    """Each hooked function draws from the generator it is given, as from the global one."""
    arguments = {
        "randint": (5, (3,)), "randint_like": (torch.ones(3), 5), "randperm": (5,), "rand": (3,),
        "randn": (3,), "normal": (0.0, 1.0, (3,)), "multinomial": (torch.ones(4), 2),
        "binomial": (torch.full((3,), 9.0), torch.full((3,), 0.5)), "geometric_": (torch.ones(3), 0.5),
    }.get(func.__name__, (torch.full((3,), 0.5),))  # fmt: skip

    def call():
        return func(*(each.clone() if isinstance(each, torch.Tensor) else each for each in arguments))

    torch.manual_seed(5)
    expected = call()
    before = torch.get_rng_state()
    with GeneratorMode(torch.Generator().manual_seed(5)):
        found = call()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found, expected)


MODEL_DRAWS = {
    "random": (random.seed, random.random),
    "random.gauss": (random.seed, lambda: random.gauss(0, 1)),
    "numpy": (np.random.seed, np.random.rand),
    "numpy gauss": (np.random.seed, np.random.randn),
}


@pytest.mark.filterwarnings("ignore:random numbers were drawn")
@pytest.mark.parametrize("data", ["nothing", "torch", "python", "numpy"])
@pytest.mark.parametrize("name", MODEL_DRAWS)
def test_a_model_may_draw_from_global_generators(name, data):
    """Draws of the model in the loop thread are neither repeated nor lost by watching the data."""
    seed, draw = MODEL_DRAWS[name]

    class LayerDrop(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(6, 3)
            self.drawn = []

        def forward(self, inputs):
            self.drawn.append(draw())
            return self.layer(inputs) * (0.5 if self.drawn[-1] < 0.3 else 1.0)

    found = []
    for schedule in ("textbook", "overlap"):
        seed(4)
        torch.manual_seed(0)
        model = LayerDrop()
        trainer = Trainer(
            max_epochs=4, schedule=schedule, run_dir=None, enable_progress_bar=False, prefetch_depth=1
        )
        trainer.fit(model, torch.optim.SGD(model.parameters(), 0.05), Drawing(DRAWS[data]),
                    loss_fn=F.cross_entropy, batch_size=4)  # fmt: skip
        found.append(model.drawn)
    seed(4)
    assert found == [[draw() for _ in range(20)]] * 2


def test_a_model_that_draws_does_not_end_the_overlap():
    """Only a dataset that draws is taken to the loop thread: no warning, and a thread makes the batches."""
    makers = set()

    def draw(index):
        makers.add(threading.current_thread().name)
        return 0.0

    def loss_fn(outputs, target):
        return F.cross_entropy(outputs * np.random.rand(), target)

    model = build_model("linear")
    trainer = Trainer(
        max_epochs=2, schedule="overlap", run_dir=None, enable_progress_bar=False, prefetch_depth=1
    )
    data = Drawing(draw, num_samples=400)
    trainer.fit(model, torch.optim.SGD(model.parameters(), 0.05), data, loss_fn=loss_fn, batch_size=2)
    assert "prefetch" in makers


@pytest.mark.filterwarnings("ignore:random numbers were drawn")
def test_a_loader_that_draws_from_numpy_stays_on_the_loop_thread():
    """A DataLoader over such a dataset, and a step that draws too, give the same in either schedule."""
    losses = []
    for schedule in ("textbook", "overlap"):
        np.random.seed(3)
        torch.manual_seed(3)
        model = build_model("linear")
        loader = DataLoader(Drawing(DRAWS["numpy"]), batch_size=2)
        trainer = Trainer(max_epochs=2, schedule=schedule, run_dir=None, enable_progress_bar=False)
        result = trainer.fit(
            model, torch.optim.SGD(model.parameters(), 0.05), loader,
            loss_fn=lambda outputs, target: F.cross_entropy(outputs * np.random.beta(1, 1), target),
        )  # fmt: skip
        losses.append(result.losses)
    assert losses[0] == losses[1]


@pytest.mark.filterwarnings("ignore:random numbers were drawn")
def test_a_loader_whose_draws_cannot_be_hooked_stays_on_the_loop_thread():
    """Dropout in the transform of a DataLoader gives the same numbers in either schedule."""
    losses = []
    for schedule in ("textbook", "overlap"):
        torch.manual_seed(3)
        model = build_model("dropout")
        loader = DataLoader(Drawing(DRAWS["dropout"]), batch_size=4)
        trainer = Trainer(max_epochs=3, schedule=schedule, run_dir=None, enable_progress_bar=False)
        result = trainer.fit(
            model, torch.optim.SGD(model.parameters(), 0.05), loader, loss_fn=F.cross_entropy
        )
        losses.append(result.losses)
    assert losses[0] == losses[1]


class Late(Dataset):
    """Rows of an index and a number that is drawn of some samples only."""

    def __init__(self, draw, drawing, size=40):
        self.draw, self.drawing, self.size = draw, frozenset(drawing), size
        self.has_drawn = threading.Event()

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index not in self.drawing:
            return torch.tensor([float(index), 0.0])
        number = self.draw()
        self.has_drawn.set()
        return torch.tensor([float(index), number])

    def promised(self):
        """Return the rows of epoch 0, every sample made after seeding NumPy."""
        state, rows = np.random.get_state(), []
        for index in range(self.size):
            NumpyGenerator().seed(sample_seed(0, 0, index))
            rows.append(self[index])
        np.random.set_state(state)
        return torch.stack(rows)


@pytest.mark.filterwarnings("ignore:random numbers were drawn")
def test_a_draw_whose_batch_is_never_used_acquits_nobody():
    """The loop was left before the batch came; another one says nothing of it."""
    data = Late(np.random.rand, range(10, 40))
    promised = data.promised()
    data.has_drawn.clear()
    loader = Loader(data, batch_size=2, placement="inline")
    batches = iter(loader)
    for _ in range(4):  # the last one is a thread's
        next(batches)
    assert data.has_drawn.wait()
    batches.close()
    loader.epoch = 0
    assert torch.equal(torch.cat(list(loader)), promised)


def test_a_batch_made_again_acquits_only_itself():
    """Of two threads that saw a generator move, one whose batch draws nothing says nothing of the other."""
    randomness = SampleRandomness()
    one, other = ThreadRandomness(randomness), ThreadRandomness(randomness)
    for thread, batch in ((one, 4), (other, 3)):
        with pytest.raises(UnhookableDrawError):
            thread.make(lambda seed: np.random.rand(), batch)
    randomness.on_loop_thread(lambda seed: None, 3)
    assert randomness.innocent == set()
    assert len(randomness.suspects) == 2
    randomness.on_loop_thread(lambda seed: (seed and seed(lambda: 5)) or np.random.rand(), 4)
    assert randomness.innocent == set()
    assert randomness.drawn == ("numpy.random",)
    assert not randomness.suspects


def test_a_batch_that_draws_nothing_acquits_the_generator_that_the_model_moved():
    """When every suspect's batch has been made, here or on a thread, and none of them drew."""
    randomness = SampleRandomness()
    one, other = ThreadRandomness(randomness), ThreadRandomness(randomness)
    for thread, batch in ((one, 4), (other, 3)):
        with pytest.raises(UnhookableDrawError):
            thread.make(lambda seed: np.random.rand(), batch)
    one.make(lambda seed: None, 4)
    randomness.on_loop_thread(lambda seed: None, 3)
    assert randomness.innocent == {"numpy.random"}


@pytest.mark.filterwarnings("ignore:random numbers were drawn")
@pytest.mark.parametrize("settings", [
    {"placement": "inline"}, {"placement": "thread", "num_workers": 2},
    {"placement": "process", "num_workers": 1, "threads_per_worker": 2},
], ids=lambda each: each["placement"])  # fmt: skip
@pytest.mark.parametrize("has_one_in_store", [True, False])
def test_the_second_normal_number_of_numpys_pair_is_seen(settings, has_one_in_store):
    """It is taken from a store beside the generator, which does not move."""
    data = Late(np.random.randn, range(6, 40))
    promised = data.promised()
    np.random.seed(0)
    if has_one_in_store:
        np.random.randn()
    data.has_drawn = _NoEvent()  # which pickles
    with Loader(data, batch_size=1, **settings) as loader:
        assert torch.equal(torch.cat(list(loader)), promised)


class _NoEvent:
    """Told, and does nothing."""

    def set(self):
        """Do nothing."""
