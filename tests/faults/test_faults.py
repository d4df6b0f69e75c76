"""Whatever fails, wherever: the caller gets it, with a note that says where, and no thread is left."""

from __future__ import annotations

import json
import threading
import traceback

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pipeline import (
    Callback,
    ConfigError,
    EarlyStopping,
    NonFiniteError,
    SimulatedBackend,
    StageError,
    Trainer,
)
from pipeline.testing import Gate, InMemoryLogger

SCHEDULES = ["textbook", "overlap"]


class UserError(Exception):
    """What only the user's own code raises."""


def data(num_samples=20):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(num_samples, 4, generator=generator), torch.arange(num_samples) % 2)


class Samples(Dataset):
    """A dataset that fails at one sample."""

    def __init__(self, bad=None):
        self.bad, self.data = bad, data()

    def __len__(self):
        return 20

    def __getitem__(self, index):
        if index == self.bad:
            raise UserError("mine")
        return self.data[index]


def fail(*arguments, **keywords):
    raise UserError("mine")


def fail_at_third(function):
    """Return the function, failing at its third call."""
    calls = []

    def call(*arguments, **keywords):
        calls.append(1)
        return fail() if len(calls) == 3 else function(*arguments, **keywords)

    return call


class FailingLogger(InMemoryLogger):
    def log(self, row):
        super().log(row)
        if len(self.rows) == 3:
            fail()


class FailingModel(torch.nn.Linear):
    def __init__(self):
        super().__init__(4, 2)
        self.forward = fail_at_third(super().forward)


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value

    @staticmethod
    def backward(ctx, gradient):
        raise UserError("mine")


def fit(schedule="textbook", *, model=None, train_data=None, optimizer=None, device="cpu", **arguments):
    settings = {name: arguments.pop(name) for name in list(arguments) if name in Trainer.__dataclass_fields__}
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2) if model is None else model
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1)
    trainer = Trainer(
        **{"run_dir": None, "schedule": schedule, "device": device, "enable_progress_bar": False, **settings}
    )
    if "step" not in arguments:
        arguments.setdefault("loss_fn", F.cross_entropy)
    train_data = data() if train_data is None else train_data
    if not isinstance(train_data, (DataLoader, IterableDataset, list)) and hasattr(train_data, "__len__"):
        arguments.setdefault("batch_size", 2)
    return trainer.fit(model, optimizer, train_data, **arguments)


def optimizer_that_fails(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.step = fail_at_third(optimizer.step)
    return optimizer


def failing_iterable():
    yield from DataLoader(data(), 2)
    fail()


MODEL = torch.nn.Linear(4, 2)
SGD = torch.optim.SGD(MODEL.parameters(), 0.1)


def failing_scheduler():
    scheduler = torch.optim.lr_scheduler.ConstantLR(SGD)
    scheduler.step = fail_at_third(scheduler.step)
    return scheduler


CASES = {
    "scheduler": (
        {"model": MODEL, "optimizer": SGD, "scheduler_interval": "step", "scheduler": failing_scheduler},
        "stage 'optimizer', step 2",
    ),
    "dataset": ({"train_data": Samples(bad=9)}, "stage 'fetch', sample 9, batch 4 of epoch 0, step 4"),
    "dataset, first batch": (
        {"train_data": Samples(bad=0)},
        "stage 'fetch', sample 0, batch 0 of epoch 0, step 0",
    ),
    "collate": (
        {"train_data": Samples(), "collate_fn": fail_at_third(torch.utils.data.default_collate)},
        "stage 'collate', batch 2 of epoch 0, step 2",
    ),
    "iterable": ({"train_data": failing_iterable}, "stage 'fetch', batch 10 of epoch 0, step 10"),
    "forward": ({"model": FailingModel}, "stage 'step', step 2"),
    "loss_fn": ({"loss_fn": lambda: fail_at_third(F.cross_entropy)}, "stage 'step', step 2"),
    "backward": (
        {"loss_fn": lambda: lambda outputs, target: FailingBackward.apply(outputs.sum())},
        "stage 'step', step 0",
    ),
    "optimizer": (
        {"model": MODEL, "optimizer": lambda: optimizer_that_fails(MODEL)},
        "stage 'optimizer', step 2",
    ),
    "logger": ({"loggers": lambda: [FailingLogger()]}, "stage 'log (FailingLogger)', step 3"),
    "validation": (
        {"val_data": Samples(bad=5)},
        "stage 'fetch', sample 5, batch 2 of the evaluation, step 10",
    ),
    "metric": ({"val_data": data(), "metrics": {"m": fail}}, "stage 'validate', step 10"),
    "callback": (
        {"callbacks": lambda: [type("C", (Callback,), {"on_epoch_finished": fail})()]},
        "stage 'callback (C)', step 10",
    ),
}


def fresh(value):
    """Make what a case needs anew for each schedule."""
    is_maker = callable(value) and not isinstance(value, (torch.nn.Module, Dataset)) and value is not fail
    return value() if is_maker else value


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", CASES)
def test_the_users_exception_arrives_as_itself(name, schedule):
    """It keeps its type, gains one note with stage, sample and step, and every thread has ended."""
    arguments, note = CASES[name]
    arguments = {
        key: value if key in ("collate_fn", "metrics") else fresh(value) for key, value in arguments.items()
    }
    if name == "collate":
        arguments["collate_fn"] = fail_at_third(torch.utils.data.default_collate)
    with pytest.raises(UserError, match="mine") as caught:
        fit(schedule, **arguments)
    assert caught.value.__notes__ == [note]
    assert threading.active_count() == 1


@pytest.mark.parametrize("stage", ["copy_in", "copy_out"])
def test_a_device_that_fails_is_reported(stage):
    """An error of the transfer or of the read-back reaches the caller too."""
    backend = SimulatedBackend()
    setattr(backend, stage, fail_at_third(getattr(backend, stage)))
    with pytest.raises(UserError):
        fit("overlap", device=backend)


class SlowToFail(InMemoryLogger):
    """Holds the writer up until many more steps are pending, then fails."""

    def __init__(self):
        super().__init__()
        self.gate = Gate()

    def log(self, row):
        self.gate.pass_through()
        fail()


def test_a_writer_that_fails_with_the_belt_full_stops_the_loop():
    """The loop waits for the belt, not for slots that will never come back."""
    logger, calls = SlowToFail(), []

    def loss_fn(outputs, target):
        calls.append(1)
        if len(calls) == 60:  # the writer holds some, the belt is nearly full
            logger.gate.open()
        return F.cross_entropy(outputs, target)

    with pytest.raises(UserError):
        fit(
            "overlap",
            device=SimulatedBackend(),
            train_data=data(800),
            loss_fn=loss_fn,
            loggers=[logger],
            max_log_lag=128,
        )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_was_logged_before_a_failure_is_on_disk(schedule, tmp_path):
    """Every step before the one that failed stands in metrics.jsonl, in order."""
    with pytest.raises(UserError):
        fit(schedule, model=FailingModel(), run_dir=tmp_path)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_a_loss_that_is_not_finite_ends_the_run(schedule, device):
    """The error names the step; with on_nonfinite=ignore the run goes on."""
    calls = []

    def explode(outputs, target):
        calls.append(1)
        loss = F.cross_entropy(outputs, target)
        return loss * float("nan") if len(calls) == 4 else loss

    backend = SimulatedBackend() if device == "simulated" else "cpu"
    with pytest.raises(NonFiniteError, match="became nan at step 3") as caught:
        fit(schedule, loss_fn=explode, device=backend)
    assert caught.value.first_step == 3 <= caught.value.last_step < 10
    calls.clear()
    assert fit(schedule, loss_fn=explode, device=backend, on_nonfinite="ignore").num_steps == 10


def one_pass():
    return iter(list(DataLoader(data(), 2)))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_iterable_that_ends_early_loses_nothing(schedule, tmp_path):
    """The error says how far it came; the log and the last checkpoint are there."""
    with pytest.raises(StageError, match="ended early: it gave no batch in epoch 1, after 10 of 25 steps"):
        fit(schedule, train_data=one_pass(), max_steps=25, run_dir=tmp_path)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 11
    assert (tmp_path / "checkpoints" / "step-00000010.safetensors").exists()


class Pairs(IterableDataset):
    def __iter__(self):
        return iter(data())


def wrong_scheduler():
    other = torch.optim.SGD(MODEL.parameters(), 0.1)
    return torch.optim.lr_scheduler.ConstantLR(other)


REFUSED = {
    "no objective": ({"loss_fn": None}, ConfigError, "either loss_fn=.*got neither"),
    "both objectives": ({"step": fail, "loss_fn": fail}, ConfigError, "got both"),
    "empty dataset": ({"train_data": data(0)}, ConfigError, "train_data .* is empty: it has no sample"),
    "empty list": ({"train_data": []}, ConfigError, "is empty: it yields no batch"),
    "empty iterable": ({"train_data": iter(())}, StageError, "ended early"),
    "no batch size": ({"train_data": data(), "batch_size": None}, ConfigError, "batch_size=64"),
    "batch size twice": ({"train_data": DataLoader(data(), 2), "batch_size": 2}, ConfigError, "leave out"),
    "bad batch size": ({"batch_size": 0}, ConfigError, "batch_size must be an integer of 1 or more, got 0"),
    "shuffled list": ({"train_data": [1], "shuffle": True}, ConfigError, "shuffle, drop_last and collate_fn"),
    "all dropped": ({"train_data": data(1), "drop_last": True}, ConfigError, "drop_last leaves none"),
    "a number": ({"train_data": 5}, ConfigError, "must be a dataset .* got int"),
    "a dict of samples": ({"train_data": fail, "batch_size": 2}, ConfigError, "__getitem__ and __len__"),
    "wrong batch": ({"train_data": [torch.zeros(2, 4)]}, StageError, "pair .* got a tensor of shape"),
    "dict for a pair": ({"train_data": [{"x": 1}]}, StageError, r"got a dict with keys \['x'\]"),
    "loss not scalar": ({"loss_fn": lambda o, t: o}, StageError, r"must be a scalar, got shape \(2, 2\)"),
    "loss a float": ({"loss_fn": lambda o, t: 1.0}, StageError, "scalar tensor, got a float"),
    "loss has no graph": ({"loss_fn": lambda o, t: o.sum().detach()}, StageError, "no graph"),
    "dict without loss": ({"step": lambda m, b: {"x": 1}}, StageError, r"key 'loss', got \['x'\]"),
    "frozen model": ({"model": torch.nn.Linear(4, 2).requires_grad_(False), "optimizer":
                      torch.optim.SGD([torch.zeros(1)])}, ConfigError, "no trainable parameters"),
    "other model's optimizer": ({"optimizer": torch.optim.SGD([torch.zeros(1)])}, ConfigError, "holds none"),
    "other scheduler": ({"scheduler": wrong_scheduler()}, ConfigError, "made for another optimizer"),
    "two optimizers": ({"optimizer": [1]}, ConfigError, "one torch.optim.Optimizer, got Linear and list"),
    "callback": ({"callbacks": [print]}, ConfigError, "subclass of pipeline.Callback, got <built-in"),
    "logger": ({"loggers": [print]}, ConfigError, "log, flush and close, got <built-in"),
    "stopping": ({"callbacks": [EarlyStopping()]}, ConfigError, "pass val_data="),
    "interval": ({"scheduler_interval": "day"}, ConfigError, "step or epoch, got 'day'"),
    "monitor": ({"monitor": "val/f1", "val_data": data()}, ConfigError, "one of val/loss, got 'val/f1'"),
    "share of unknown": ({"train_data": DataLoader(Pairs(), 2), "limit_train_batches": 0.5}, ConfigError,
                         "does not say how many"),
}  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_clearly(name, schedule):
    """Each mistake is named with what was found and what to do."""
    arguments, error, message = REFUSED[name]
    with pytest.raises(error, match=f"(?s){message}"):
        fit(schedule, **arguments)


def test_a_stage_error_knows_where_it_happened():
    """Stage and step are attributes and stand in the message."""
    with pytest.raises(StageError) as caught:
        fit("overlap", loss_fn=lambda outputs, target: outputs)
    assert (caught.value.stage, caught.value.step) == ("step", 0)
    assert str(caught.value).startswith("stage 'step', step 0: the loss must be a scalar")


def test_the_traceback_reaches_into_the_dataset():
    """An exception from the prefetch thread shows the user's own line."""
    with pytest.raises(UserError) as caught:
        fit("overlap", train_data=Samples(bad=13))
    assert "__getitem__" in "".join(traceback.format_exception(caught.value))


def test_an_earlier_nan_is_the_cause_in_either_schedule():
    """A model that fails on the NaN of the step before: the NaN is reported, as a plain loop would."""

    def loss_fn(outputs, target):
        if outputs.isnan().any():
            raise UserError("mine")
        return F.cross_entropy(outputs, target) * (float("nan") if len(calls) == 2 else 1.0)

    for schedule in SCHEDULES:
        calls = []

        class Counting(torch.nn.Linear):
            def forward(self, inputs, calls=calls):
                calls.append(1)
                return super().forward(inputs)

        with pytest.raises(NonFiniteError) as caught:
            fit(schedule, model=Counting(4, 2), loss_fn=loss_fn)
        assert caught.value.first_step == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_failure_on_the_way_out_does_not_hide_the_first_one(schedule):
    """What a logger's close or a callback raises then becomes a note."""

    class Bad(Callback):
        def on_fit_failed(self, event):
            raise KeyError("callback")

    logger = InMemoryLogger()
    logger.close = lambda: {}["close"]
    with pytest.raises(UserError) as caught:
        fit(schedule, model=FailingModel(), callbacks=[Bad()], loggers=[logger])
    assert len([note for note in caught.value.__notes__ if "while this error was handled" in note]) == 2
    with pytest.raises(KeyError, match="close"):
        fit(schedule, loggers=[logger])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_dataset_that_raises_stop_iteration_is_named(schedule):
    """It would end the epoch without a word."""

    class Stopping(Samples):
        def __getitem__(self, index):
            return next(iter([])) if index == 9 else super().__getitem__(index)

    with pytest.raises(StageError, match="sample 9, step 4: the dataset raised StopIteration"):
        fit(schedule, train_data=Stopping())
