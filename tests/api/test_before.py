"""What can be known before the first step is said before it."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Sampler, TensorDataset

from pipeline import Callback, ConfigError, Loader, StageError, Trainer

QUIET = {"run_dir": None, "enable_progress_bar": False, "device": "cpu"}
DATA = TensorDataset(torch.randn(16, 3), torch.randn(16, 1))
RAISED = [NotImplementedError, TypeError, AttributeError, RuntimeError]


def fit(train_data=DATA, *, make_optimizer=None, settings=None, steps=None, **arguments):
    """Train a linear model; `steps` gets an entry for each call of the model's loss."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = (make_optimizer or (lambda parameters: torch.optim.SGD(parameters, 0.1)))(model.parameters())
    scheduler = arguments.pop("make_scheduler", lambda optimizer: None)(optimizer)

    def loss_fn(outputs, target):
        (steps if steps is not None else []).append(1)
        return F.mse_loss(outputs, target)

    if isinstance(train_data, TensorDataset):
        arguments.setdefault("batch_size", 4)
    trainer = Trainer(**QUIET, **(settings or {}))
    return trainer.fit(
        model, optimizer, train_data, **{"loss_fn": loss_fn, "scheduler": scheduler, **arguments}
    )


class Stream(IterableDataset):
    """Samples of the data, and a length that raises, or is wrong."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        if isinstance(self.length, int):
            return self.length
        raise self.length("nobody knows")

    def __iter__(self):
        return iter(DATA)


class Batches(Stream):
    """The same as batches."""

    def __iter__(self):
        return iter(DataLoader(DATA, 4))


class Unsized(Sampler):
    def __iter__(self):
        return iter(range(16))


@pytest.mark.parametrize("error", RAISED)
def test_a_length_that_raises_is_unknown(error):
    """In training, validation, evaluation, prediction and the Loader; in any kind of iterable."""
    model = torch.nn.Linear(3, 1)
    expected = fit().losses.tolist()
    for data, batching in (
        (Stream(error), {"batch_size": 4}),
        (DataLoader(Stream(error), 4), {}),
        (Batches(error), {"batch_size": None}),
        (DataLoader(DATA, 4, sampler=Unsized()), {}),
    ):
        assert fit(data, val_data=data, **batching).losses.tolist() == expected
        found = Trainer(**QUIET).evaluate(model, data, loss_fn=F.mse_loss, **batching)
        assert found == pytest.approx(
            Trainer(**QUIET).evaluate(model, DATA, loss_fn=F.mse_loss, batch_size=4)
        )
        assert len(Trainer(**QUIET).predict(model, data, **batching)) == 16
        with Loader(data, **batching) as loader:
            assert len(list(loader)) == 4
            with pytest.raises(TypeError, match="does not say how many"):
                len(loader)


@pytest.mark.parametrize("length", [1, 3, 100])
def test_a_wrong_length_loses_and_invents_nothing(length):
    """A stream has the batches that it yields, whatever it says; and nobody is warned but who asked."""
    for data, batching in (
        (Stream(length), {"batch_size": 4}),
        (DataLoader(Stream(length), 4), {}),
        (Batches(length), {"batch_size": None}),
    ):
        result = fit(data, val_data=data, settings={"max_epochs": 2}, **batching)
        assert result.losses.tolist() == fit(settings={"max_epochs": 2}).losses.tolist()
        assert len(Trainer(**QUIET).predict(torch.nn.Linear(3, 1), data, **batching)) == 16


def test_a_dataset_with_numbers_must_have_a_length():
    """Nobody could say which samples it has."""

    class Numbered(torch.utils.data.Dataset):
        def __len__(self):
            raise NotImplementedError

        def __getitem__(self, index):
            return DATA[index]

    with pytest.raises(ConfigError, match=r"train_data .Numbered. is a dataset whose __len__ raises"):
        fit(Numbered(), batch_size=4)


class Twice(torch.optim.SGD):
    """A user's own that wants a closure."""

    def step(self, closure):
        closure()
        return super().step(closure)


class Offered(torch.optim.SGD):
    """One that takes a closure, and does without."""

    def step(self, closure=None, *rest, **more):
        return super().step(closure)


def stepwise(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1)


@pytest.mark.parametrize("make_scheduler", [lambda optimizer: None, stepwise])
@pytest.mark.parametrize("kind", [torch.optim.LBFGS, Twice])
def test_an_optimizer_that_wants_a_closure_is_refused(kind, make_scheduler, tmp_path):
    """Before the first step and before any file, with what to write; also if a scheduler wraps its step."""
    steps = []
    with pytest.raises(ConfigError, match=r"step\(\) must be given closure.*optimizer\.step\(closure\)"):
        fit(make_optimizer=lambda each: kind(each, lr=0.1), make_scheduler=make_scheduler, steps=steps)
    assert not steps
    assert len(fit(make_optimizer=lambda each: Offered(each, lr=0.1), make_scheduler=stepwise).losses) == 4


LOADER = DataLoader(DATA, 4)
SEVERAL = {
    "list of loaders": ([LOADER, LOADER], None, r"one data set, got a list of 2 \(DataLoader\)"),
    "dict of loaders": ({"night": LOADER, "day": LOADER}, None, r"a dict of 2 \(DataLoader\).*on_validated"),
    "tuple of datasets": ((DATA, DATA), 4, r"got a tuple of 2 \(TensorDataset\).*ConcatDataset"),
    "dict of datasets": ({"day": DATA}, 4, r"got a dict of 1 \(TensorDataset\)"),
    "loader of ours": ([Loader(DATA, batch_size=4)], None, r"got a list of 1 \(Loader\)"),
    "dict of lists": ({"day": list(LOADER)}, None, "yields its keys"),
    "list of iterables": ([Batches(4), 3], None, r"got a list of 2 \(Batches\)"),
    "list of other things": ([iter(LOADER), 3], None, r"pair \(inputs, target\), but val_data\[0\] is a"),
}  # fmt: skip


@pytest.mark.parametrize("name", SEVERAL)
def test_several_validation_sets_are_refused(name):
    """With what to do: they look like batches, and would fail after the first epoch."""
    val_data, batch_size, message = SEVERAL[name]
    steps, train_data = [], DATA if batch_size else LOADER
    with pytest.raises(ConfigError, match=message):
        fit(train_data, val_data=val_data, batch_size=batch_size, steps=steps)
    assert not steps


def test_several_sets_are_refused_elsewhere_too():
    """As training data, and to evaluate and predict on."""
    with pytest.raises(ConfigError, match=r"train_data must be one data set, got a list of 2"):
        fit([LOADER, LOADER])
    for call in (Trainer(**QUIET).predict, Trainer(**QUIET).evaluate):
        with pytest.raises(ConfigError, match=r"data must be one data set.*make one call for each"):
            call(torch.nn.Linear(3, 1), [DATA, DATA], batch_size=4)


class Others(Callback):
    """What the refusal says to write."""

    def on_validated(self, event):
        self.found = Trainer(**QUIET).evaluate(event.state.model, DATA, loss_fn=F.mse_loss, batch_size=4)


def test_what_the_refusal_says_works():
    """One set put together of two, and further ones evaluated in a callback."""
    others = Others()
    result = fit(val_data=ConcatDataset([DATA, DATA]), callbacks=[others])
    assert others.found["loss"] == pytest.approx(result.metrics["val/loss"])


def test_an_iterator_is_no_validation_data_for_several_epochs():
    """It is empty at the second validation, which is said before the first step; one epoch is fine."""
    steps = []
    with pytest.raises(ConfigError, match=r"val_data is an iterator .*read only once"):
        fit(LOADER, val_data=iter(list(LOADER)), settings={"max_epochs": 2}, steps=steps)
    assert not steps
    for settings in (
        {},
        {"max_epochs": 2, "check_val_every_n_epoch": 2},
        {"max_epochs": 2, "limit_val_batches": 1},
    ):
        assert "val/loss" in fit(LOADER, val_data=iter(list(LOADER)), settings=settings).metrics
    with pytest.warns(UserWarning, match="read only once"), pytest.raises(StageError, match="gave no batch"):
        fit(LOADER, val_data=iter(list(LOADER)), settings={"val_check_interval": 2})


@pytest.mark.parametrize(
    "make",
    [lambda: (batch for batch in LOADER), lambda: zip(*[list(LOADER)] * 2, strict=True),
     lambda: map(list, LOADER), lambda: itertools.chain(LOADER, LOADER), lambda: iter(LOADER)],
    ids=["generator", "zip", "map", "chain", "a loader's iterator"],
)  # fmt: skip
def test_an_iterator_is_no_training_data_for_several_epochs(make):
    """It is empty in the second one, which is said before the first; with a limit it is read on."""
    steps = []
    with pytest.raises(ConfigError, match=r"train_data is an iterator \(.*read only once: the second epoch"):
        fit(make(), settings={"max_epochs": 2}, steps=steps)
    assert not steps
    fit(map(list, LOADER), settings={"max_epochs": 1})
    assert fit(map(list, LOADER), settings={"max_epochs": 2, "limit_train_batches": 2}).num_steps == 4


class Restarting:
    """An iterator that begins anew when it is asked for its iterator."""

    def __iter__(self):
        self.batches = iter(list(LOADER))
        return self

    def __next__(self):
        return next(self.batches)


def test_an_iterator_that_starts_anew_is_data_for_several_epochs():
    """Of a class of the user's own nobody can know before; what never ends needs a limit."""
    result = fit(Restarting(), val_data=Restarting(), settings={"max_epochs": 3})
    assert (result.num_steps, result.num_epochs) == (12, 3)
    assert fit(itertools.cycle(LOADER), settings={"max_epochs": 3, "limit_train_batches": 3}).num_steps == 9
    with pytest.raises(ConfigError, match="never ends: set limit_val_batches"):
        fit(LOADER, val_data=itertools.cycle(LOADER))


class HuggingFaces:
    """A map-style dataset that is no subclass of torch's."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"x": index}

    def __getitems__(self, indices):
        return [self[index] for index in indices]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (lambda: iter(LOADER), r"got function. Call it: pass <lambda>\(\)"),
        ("data/train", "got str.$"),
        (HuggingFaces(), "dataset of samples .* batch_size=64"),
    ],
    ids=["function", "path", "samples"],
)
def test_what_yields_no_batches_is_refused_by_name(data, said):
    """As training data, and by a loader of one's own."""
    for use in (fit, Loader):
        with pytest.raises(ConfigError, match=said):
            use(data)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_cannot_be_is_refused(seed):
    """torch has 64 bits for it, and would take another."""
    for make in (Trainer, lambda seed: Loader(DATA, batch_size=4, seed=seed)):
        with pytest.raises(ConfigError, match=rf"^seed must be between 0 and 2\*\*64 - 1, got {seed}"):
            make(seed=seed)
        make(seed=2**64 - 1)


class Inputs(torch.nn.Module):
    """Notes what it is called with."""

    def forward(self, found):
        self.found = found
        return torch.zeros(4, 1)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ([torch.ones(4, 3)], torch.Tensor),
        ((torch.ones(4, 3),), torch.Tensor),
        ((torch.ones(4, 3), torch.ones(4)), torch.Tensor),
        (torch.ones(4, 3), torch.Tensor),
        ({"x": torch.ones(4, 3)}, dict),
        ((torch.ones(4, 3),) * 3, tuple),
        ([{"x": torch.ones(4, 3)}], dict),
        (torch.nn.utils.rnn.pack_sequence([torch.ones(3)]), torch.nn.utils.rnn.PackedSequence),
    ],
)
def test_what_a_model_is_given_to_predict_on(batch, expected):
    """The first of a pair, the one of a tuple of one, all of anything else."""
    model = Inputs()
    Trainer(**QUIET).predict(model, [batch])
    assert type(model.found) is expected


def test_predicting_on_inputs_alone():
    """A TensorDataset without targets yields tuples of one."""
    model = torch.nn.Linear(3, 1)
    found = Trainer(**QUIET).predict(model, TensorDataset(DATA.tensors[0]), batch_size=4)
    assert torch.equal(found, Trainer(**QUIET).predict(model, DATA, batch_size=4))
