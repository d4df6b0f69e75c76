"""What people expect of a trainer from the first day, in both schedules."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pipeline import (
    Callback,
    CheckpointError,
    ConfigError,
    EarlyStopping,
    SimulatedBackend,
    StageError,
    Trainer,
)
from pipeline.checkpoint import load_checkpoint
from pipeline.metrics import accuracy
from pipeline.settings import setting_names
from pipeline.testing import InMemoryLogger
from tests.textbook import assert_same_weights, build_model, textbook, weights

DEVICES = {"textbook": "cpu", "overlap": "cpu", "overlap on a device": "simulated"}


@pytest.fixture(params=DEVICES)
def settings(request):
    """Settings of a quiet trainer, for each schedule."""
    device = SimulatedBackend() if DEVICES[request.param] == "simulated" else "cpu"
    schedule = request.param.removesuffix(" on a device")
    return {"schedule": schedule, "device": device, "run_dir": None, "enable_progress_bar": False}


def data(num_samples=24):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_samples, 6, generator=generator)
    return TensorDataset(inputs, (inputs.sum(1) > 0).long() + (inputs[:, 0] > 0).long())


def start(kind="linear", lr=0.1):
    torch.manual_seed(0)
    model = build_model(kind)
    return model, torch.optim.SGD(model.parameters(), lr)


def fit(settings, *, kind="linear", **arguments):
    model, optimizer = start(kind)
    own = {name: arguments.pop(name) for name in list(arguments) if name in Trainer.__dataclass_fields__}
    if "step" not in arguments:
        arguments.setdefault("loss_fn", F.cross_entropy)
    train_data = arguments.pop("train_data", data())
    if isinstance(train_data, TensorDataset):
        arguments.setdefault("batch_size", 4)
    scheduler = arguments.pop("make_scheduler", lambda optimizer: None)(optimizer)
    result = Trainer(**{**settings, **own}).fit(
        model, optimizer, train_data, scheduler=scheduler, **arguments
    )
    return result, model


@dataclasses.dataclass
class Example:
    inputs: torch.Tensor
    target: torch.Tensor


@pytest.mark.parametrize("form", ["pair", "dict", "dataclass", "tensor", "nested"])
def test_a_batch_may_have_any_form(settings, form):
    """Tensors, tuples, dicts, dataclasses, nested: the step takes what the data gives."""
    pairs = list(DataLoader(data(), 4))
    make = {
        "pair": lambda x, y: (x, y),
        "dict": lambda x, y: {"x": x, "y": y, "name": "n"},
        "dataclass": Example,
        "tensor": lambda x, y: torch.cat([x, y[:, None].float()], 1),
        "nested": lambda x, y: {"in": [Example(x, y)], "none": None},
    }[form]
    take = {
        "pair": lambda b: b,
        "dict": lambda b: (b["x"], b["y"]),
        "dataclass": lambda b: (b.inputs, b.target),
        "tensor": lambda b: (b[:, :6], b[:, 6].long()),
        "nested": lambda b: (b["in"][0].inputs, b["in"][0].target),
    }[form]

    def step(model, batch):
        inputs, target = take(batch)
        return F.cross_entropy(model(inputs), target)

    result, _ = fit(settings, train_data=[make(*pair) for pair in pairs], step=step)
    model, optimizer = start()
    assert result.losses.tolist() == textbook(model, optimizer, [pairs])


def test_a_step_logs_what_it_returns(settings):
    """Scalars of a step's dict become train/…; one that is changed later is logged as it was."""
    count = torch.zeros(())

    def step(model, batch):
        count.add_(1)
        loss = F.cross_entropy(model(batch[0]), batch[1])
        return {"loss": loss, "count": count, "twice": 2 * loss, "fixed": 3}

    logger = InMemoryLogger()
    result, _ = fit(settings, step=step, loggers=[logger])
    rows = [row.values for row in logger.rows if "train/loss" in row.values]
    assert [row["train/count"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["train/loss"] for row in rows] == result.losses.tolist()
    assert all(row["train/twice"] == pytest.approx(2 * row["train/loss"]) for row in rows)
    assert all(row["train/fixed"] == 3 for row in rows)


def test_scalars_are_averaged_over_micro_batches(settings):
    """With accumulation a step's numbers are the means of its micro-batches'."""
    numbers = iter(range(100))

    def step(model, batch):
        return {"loss": F.cross_entropy(model(batch[0]), batch[1]), "number": next(numbers)}

    logger = InMemoryLogger()
    fit(settings, step=step, loggers=[logger], accumulate_grad_batches=4)
    found = [row.values["train/number"] for row in logger.rows if "train/number" in row.values]
    assert found == [1.5, 4.5]  # of 0 to 3, and of the 4 and 5 that were left


def test_loggers_hear_every_nth_step_from_one_thread(settings):
    """Rows come in order, off the loop thread in overlap; every step's loss is in the result."""
    logger = InMemoryLogger()
    result, _ = fit(settings, loggers=[logger], log_every_n_steps=2)
    assert [row.step for row in logger.rows] == [2, 4, 6, 6]
    assert len(result.losses) == 6
    assert logger.is_closed
    assert logger.threads == {"MainThread" if settings["schedule"] == "textbook" else "writer"}


def test_steps_and_epochs_end_a_run(settings):
    """max_steps may end in the middle of an epoch, and passes over epoch ends."""
    for max_steps, num_epochs in ((1, 1), (6, 1), (7, 2), (13, 3)):
        result, _ = fit(settings, max_steps=max_steps)
        assert (result.num_steps, result.num_epochs, result.stop_reason) == (
            max_steps,
            num_epochs,
            "max_steps",
        )
    result, _ = fit(settings, max_epochs=2)
    assert (result.num_steps, result.num_epochs, result.stop_reason) == (12, 2, "max_epochs")


def test_no_more_batches_are_taken_than_are_used(settings):
    """The belt does not read past the last step of a run."""
    taken = []

    def batches():
        for pair in DataLoader(data(), 4):
            taken.append(1)
            yield pair

    fit(settings, train_data=batches(), max_steps=3)
    assert len(taken) == 3


@pytest.mark.parametrize(("limit", "num_steps"), [(2, 2), (0.5, 3), (100, 6)])
def test_train_batches_may_be_limited(settings, limit, num_steps):
    """A number of batches, or a share of them."""
    assert fit(settings, limit_train_batches=limit)[0].num_steps == num_steps


def test_fast_dev_run_touches_nothing(tmp_path):
    """One step, one validation batch, no file."""
    result, _ = fit({"fast_dev_run": True, "enable_progress_bar": False}, val_data=data())
    assert (result.num_steps, result.run_dir, list(tmp_path.iterdir())) == (1, None, [])
    assert "val/loss" in result.metrics


def test_validation_comes_when_it_is_due(settings):
    """Every n epochs, every n steps, and at the end; never twice at one step."""

    def steps(**arguments):
        result, _ = fit(settings, val_data=data(8), **arguments)
        return [row.step for row in result.history if "val/loss" in row.values]

    assert steps(max_epochs=3) == [6, 12, 18]
    assert steps(max_epochs=5, check_val_every_n_epoch=2) == [12, 24, 30]
    assert steps(max_epochs=1, val_check_interval=2) == [2, 4, 6]
    assert steps(max_epochs=2, check_val_every_n_epoch=None, val_check_interval=5) == [5, 10]
    assert steps(max_steps=8) == [6, 8]


def test_validation_leaves_the_training_as_it_was(settings):
    """Losses are the same with and without it; modules keep their modes, frozen ones too."""
    with_it, model = fit(settings, kind="conv", val_data=data(), max_epochs=2, val_check_interval=2)
    without, _ = fit(settings, kind="conv", max_epochs=2)
    assert with_it.losses == without.losses
    model[2].eval()
    Trainer(**settings).evaluate(model, data(), loss_fn=F.cross_entropy, batch_size=4)
    assert (model.training, model[1].training, model[2].training) == (True, True, False)


def test_metrics_are_what_a_plain_loop_computes(settings):
    """Loss and accuracy over all samples, with a last batch that is smaller."""
    result, model = fit(settings, val_data=data(23), metrics={"accuracy": accuracy}, batch_size=5)
    inputs, target = data(23).tensors
    model.eval()
    outputs = model(inputs).detach()
    assert result.metrics["val/loss"] == pytest.approx(F.cross_entropy(outputs, target).item(), rel=1e-5)
    assert result.metrics["val/accuracy"] == (outputs.argmax(1) == target).double().mean().item()


def test_evaluate_and_predict_work_on_a_checkpoint(settings, tmp_path):
    """Weights come from the file, the averaged ones if there are any; a model works as it is."""
    result, model = fit(settings, val_data=data(), run_dir=tmp_path, ema_decay=0.5, metrics={"acc": accuracy})
    trainer, other = Trainer(**settings), build_model("linear")
    found = trainer.evaluate(
        other, data(), loss_fn=F.cross_entropy, batch_size=4, metrics={"acc": accuracy},
        checkpoint=result.best_checkpoint,
    )  # fmt: skip
    assert found == {"loss": result.metrics["val/loss"], "acc": result.metrics["val/acc"]}
    assert_same_weights(weights(other), weights(result.ema_model))
    inputs = data().tensors[0]  # a product may round otherwise when it has other rows beside it
    for batch_size in (5, 24):
        expected = torch.cat([other(part).detach() for part in inputs.split(batch_size)])
        for source in (data(), inputs):
            assert torch.equal(trainer.predict(other, source, batch_size=batch_size), expected)
    parts = trainer.predict(other, [{"x": torch.ones(2, 6)}], forward=lambda m, b: {"y": m(b["x"])})
    assert parts[0]["y"].shape == (2, 3)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        trainer.predict(other, data(), batch_size=4, checkpoint=tmp_path / "none.safetensors")


@pytest.mark.parametrize(("algorithm", "clip"), [
    ("norm", torch.nn.utils.clip_grad_norm_), ("value", torch.nn.utils.clip_grad_value_),
])  # fmt: skip
def test_gradients_are_clipped(settings, algorithm, clip):
    """By the norm of all, or by value, as torch does it."""
    _, model = fit(settings, gradient_clip_val=0.01, gradient_clip_algorithm=algorithm)
    expected, optimizer = start()
    for inputs, target in DataLoader(data(), 4):
        F.cross_entropy(expected(inputs), target).backward()
        clip(expected.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
    assert_same_weights(weights(model), weights(expected))


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_scheduler_moves_with_steps_or_epochs(settings, interval):
    """The logged learning rate is the one that the step was made with."""
    logger = InMemoryLogger()
    fit(settings, max_epochs=2, loggers=[logger], scheduler_interval=interval,
        make_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))  # fmt: skip
    rates = [row.values["train/lr"] for row in logger.rows if "train/lr" in row.values]
    times = range(12) if interval == "step" else [0] * 6 + [1] * 6
    assert rates == pytest.approx([0.1 * 0.5**count for count in times])


def test_a_plateau_scheduler_sees_the_monitored_metric(settings):
    """It is stepped by each validation, with what `monitor` names."""
    seen = []

    class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
        def step(self, metrics, epoch=None):
            seen.append(metrics)
            super().step(metrics)

    result, _ = fit(settings, val_data=data(), max_epochs=2, make_scheduler=Plateau)
    assert seen == [row.values["val/loss"] for row in result.history]


def test_the_average_of_the_weights_is_kept(settings):
    """EMA: decay times the old plus the rest times the new; validation uses it, training does not."""
    result, model = fit(settings, ema_decay=0.9, val_data=data())
    expected, optimizer = start()
    average = copy.deepcopy(expected.weight.detach())
    for count, (inputs, target) in enumerate(DataLoader(data(), 4)):
        F.cross_entropy(expected(inputs), target).backward()
        optimizer.step()
        optimizer.zero_grad()
        average = (
            expected.weight.detach().clone() if count == 0 else average.lerp(expected.weight.detach(), 0.1)
        )
    assert_same_weights(weights(model), weights(expected))
    assert torch.allclose(result.ema_model.weight, average, atol=1e-6)
    outputs = result.ema_model(data().tensors[0])
    assert result.metrics["val/loss"] == pytest.approx(
        F.cross_entropy(outputs, data().tensors[1]).item(), rel=1e-5
    )


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_is_torchs_own(settings, precision):
    """Autocast, and with float16 a GradScaler, as in a loop written by hand."""
    result, _ = fit(settings, precision=precision, max_epochs=2, gradient_clip_val=1.0)
    model, optimizer = start()
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float16
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    losses = []
    for inputs, target in [*DataLoader(data(), 4)] * 2:
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(model(inputs), target)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert result.losses.tolist() == losses


def test_early_stopping_stops_and_says_so(settings):
    """Training ends after `patience` validations that were no better."""
    stopping = EarlyStopping(monitor="val/loss", patience=2, min_delta=math.inf)
    result, _ = fit(settings, max_epochs=50, val_data=data(), callbacks=[stopping])
    assert (result.num_epochs, result.stop_reason) == (2, "early_stopping")


def test_callbacks_hear_typed_events_in_order(settings):
    """Each event arrives once, with what its name says."""
    heard = []

    class Listener(Callback):
        def on_fit_started(self, event):
            heard.append(("started", event.run_dir))

        def on_step_finished(self, event):
            heard.append(("step", event.state.step))
            if event.state.step == 3:
                event.stop("enough")

        def on_epoch_finished(self, event):
            heard.append(("epoch", event.state.epoch))

        def on_validated(self, event):
            heard.append(("validated", sorted(event.metrics)))

        def on_fit_finished(self, event):
            heard.append(("finished", event.stop_reason))

    result, _ = fit(settings, val_data=data(), callbacks=[Listener()])
    assert heard == [
        ("started", None), ("step", 1), ("step", 2), ("step", 3), ("epoch", 0),
        ("validated", ["val/loss"]), ("finished", "enough"),
    ]  # fmt: skip
    assert result.stop_reason == "enough"


def test_a_run_folder_holds_what_a_run_leaves(settings, tmp_path):
    """metrics.jsonl has every step and validation; the newest and the best checkpoint can be loaded."""
    result, model = fit(settings, run_dir=tmp_path / "run", val_data=data(), max_epochs=2)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/loss"] for row in rows if "train/loss" in row] == result.losses.tolist()
    assert [row["step"] for row in rows if "val/loss" in row] == [6, 12]
    last = load_checkpoint(result.last_checkpoint)
    assert_same_weights(last["model"], weights(model))
    assert (last["step"], last["epoch"]) == (12, 2)
    assert result.best_checkpoint.parent == result.last_checkpoint.parent == tmp_path / "run" / "checkpoints"
    assert load_checkpoint(result.best_checkpoint)["step"] == int(result.best_checkpoint.stem[-8:])


def test_run_folders_are_named_by_the_time():
    """Two runs in the same second get two folders."""
    quiet = {"enable_progress_bar": False}
    folders = [fit(quiet)[0].run_dir for _ in range(3)]
    assert len(set(folders)) == 3
    assert {folder.parent for folder in folders} == {Path("runs")}


def test_models_and_images_may_be_channels_last(settings):
    """Weights and batches are laid out channels-last, with the same numbers up to rounding."""
    seen = []

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 3, 3)

        def forward(self, images):
            seen.append(images.is_contiguous(memory_format=torch.channels_last))
            return self.conv(images).mean((2, 3))

    model = Net()
    images = TensorDataset(torch.randn(8, 3, 5, 5), torch.randint(0, 3, (8,)))
    trainer = Trainer(channels_last=True, **settings)
    trainer.fit(
        model, torch.optim.SGD(model.parameters(), 0.1), images, loss_fn=F.cross_entropy, batch_size=2
    )
    assert seen == [True] * 4
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)


# Python 3.13.0 alone: torch advises the next patch release.
@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")
def test_a_compiled_model_trains_the_users_module(settings):
    """`compile` takes torch.compile's keywords; the parameters stay those of the module passed in."""
    compiled, _ = fit(settings, compile={"backend": "eager"}, val_data=data())
    plain, _ = fit(settings, val_data=data())
    assert compiled.losses == plain.losses


def test_deterministic_is_on_for_the_run_and_off_after_it(settings):
    """The global switch is put back as it was."""
    seen = []

    def loss_fn(outputs, target):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return F.cross_entropy(outputs, target)

    fit(settings, deterministic=True, loss_fn=loss_fn)
    assert all(seen)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_loss_with_weights_of_its_own_is_used(settings):
    """A loss may be a module."""
    loss_fn = torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    result, _ = fit(settings, loss_fn=loss_fn)
    model, optimizer = start()
    expected = textbook(model, optimizer, [list(DataLoader(data(), 4))], loss_fn=loss_fn)
    assert result.losses.tolist() == expected


class Stream(IterableDataset):
    def __iter__(self):
        return iter(data())


def test_an_iterable_dataset_is_batched(settings):
    """With a batch size, samples of an iterable dataset are put together as a DataLoader would."""
    result, _ = fit(settings, train_data=Stream(), batch_size=4)
    model, optimizer = start()
    assert result.losses.tolist() == textbook(model, optimizer, [list(DataLoader(data(), 4))])


def test_a_loader_and_a_dataset_may_be_mixed(settings):
    """The batch size goes with whichever is a dataset."""
    result, _ = fit(settings, train_data=DataLoader(data(), 4), val_data=data(10), batch_size=3)
    assert (result.num_steps, "val/loss" in result.metrics) == (6, True)
    result, _ = fit(settings, val_data=DataLoader(data(), 4), batch_size=3)
    assert result.num_steps == 8


def test_fits_follow_each_other(settings):
    """A trainer has no state: a second fit goes on from the weights of the first."""
    trainer = Trainer(**settings)
    model, optimizer = start()
    losses = []
    for _ in range(2):
        result = trainer.fit(model, optimizer, data(), loss_fn=F.cross_entropy, batch_size=4)
        losses += result.losses.tolist()
    expected, optimizer = start()
    assert losses == textbook(expected, optimizer, [list(DataLoader(data(), 4))] * 2)


def test_an_unknown_setting_is_refused_with_the_one_that_was_meant():
    """As a wrong value is, all of them at once; the signature is that of the fields."""
    with pytest.raises(ConfigError) as caught:
        Trainer(max_epoch=1, seed="a", colour=2)
    assert caught.value.problems[:2] == (
        "max_epoch is not a setting. Did you mean max_epochs?",
        "seed must be an integer or null (None), got 'a'.",
    )
    assert caught.value.problems[2].startswith("colour is not a setting. There are: ")
    assert list(inspect.signature(Trainer).parameters) == setting_names()
    assert dataclasses.replace(Trainer(seed=3), max_steps=2) == Trainer(seed=3, max_steps=2)


def test_auto_is_textbook_on_the_cpu_and_overlap_on_a_device_that_runs_ahead():
    """The stated rule of `schedule=auto`."""
    quiet = {"run_dir": None, "enable_progress_bar": False}
    assert fit({**quiet, "device": "cpu"})[0].schedule == "textbook"
    assert fit({**quiet, "device": SimulatedBackend()})[0].schedule == "overlap"


def test_a_model_in_evaluation_mode_is_put_in_training_mode(settings):
    """A model that was evaluated before trains with its dropout on; frozen modules stay frozen."""
    seen = []

    def step(model, batch):
        seen.append((model.training, model[2].training))
        return F.cross_entropy(model(batch[0]), batch[1])

    model, optimizer = start("dropout")
    model.eval()
    Trainer(**settings).fit(model, optimizer, data(), step=step, batch_size=12)
    model[2].eval()
    Trainer(**settings).fit(model, optimizer, data(), step=step, batch_size=12)
    assert seen == [(True, True)] * 2 + [(True, False)] * 2


def test_a_module_that_acts_on_its_mode_is_told_of_both(settings):
    """Validation calls `train()` again, for modules that merge and unmerge weights in it."""

    class Merging(torch.nn.Linear):
        is_merged = False

        def train(self, mode=True):
            self.is_merged = not mode
            return super().train(mode)

    model = Merging(6, 3)
    seen = []

    def step(model, batch):
        seen.append((model.training, model.is_merged))
        return F.cross_entropy(model(batch[0]), batch[1])

    trainer = Trainer(max_epochs=2, **settings)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer.fit(model, optimizer, data(), step=step, batch_size=24, val_data=data())
    assert seen == [(True, False), (False, True)] * 2


class ReadOnce:
    """Says not that it can be iterated only once."""

    def __init__(self, batches):
        self._iterator = iter(batches)

    def __iter__(self):
        return self._iterator


def test_data_that_runs_dry_is_an_error_in_validation_too(settings):
    """No number is made up of no sample."""
    batches = list(DataLoader(data(), 4))
    with pytest.raises(StageError, match="the data gave no batch"):
        fit(settings, val_data=ReadOnce(batches), batch_size=None, max_epochs=2, train_data=batches)
    with pytest.raises(StageError, match="the data gave no batch"):
        Trainer(**settings).evaluate(build_model("linear"), iter([]), loss_fn=F.cross_entropy)


def test_a_learning_rate_that_is_a_tensor_is_logged_as_it_was(settings):
    """A scheduler changes it in place; the row has the one that the step was made with."""
    logger = InMemoryLogger()
    model = build_model("linear")
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1), foreach=False, capturable=False)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    trainer = Trainer(max_steps=3, **settings)
    trainer.fit(model, optimizer, data(), loss_fn=F.cross_entropy, batch_size=4, scheduler=scheduler,
                scheduler_interval="step", loggers=[logger])  # fmt: skip
    rates = [row.values["train/lr"] for row in logger.rows if "train/lr" in row.values]
    assert rates == pytest.approx([0.1, 0.05, 0.025])


def test_odd_scalars_of_a_step(settings):
    """NumPy's numbers are logged, the loss cannot be overwritten, a mean is over what was returned."""
    numbers = iter(range(100))

    def step(model, batch):
        number = next(numbers)
        more = {"half": 10.0} if number % 2 else {}
        return {"loss": F.cross_entropy(model(batch[0]), batch[1]), "train/loss": 42.0,
                "numpy": np.float32(0.5), 7: 1, **more}  # fmt: skip

    result, _ = fit(settings, step=step, accumulate_grad_batches=2, log_every_n_steps=100)
    assert all(loss < 42 for loss in result.losses)
    assert (result.metrics["train/numpy"], result.metrics["train/half"], result.metrics["train/7"]) == (
        0.5,
        10,
        1,
    )
    assert result.metrics["train/loss"] == result.losses[-1]  # though no row was due


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: np.cos(step / 10)),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=100),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [2]
        ),
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 3]),
    ],
)
def test_a_checkpoint_can_always_be_read(make, tmp_path):
    """NumPy's numbers in a schedule's state are stored as Python's own."""
    result, _ = fit({"enable_progress_bar": False}, run_dir=tmp_path / "run", make_scheduler=make)
    assert "scheduler" in load_checkpoint(result.last_checkpoint)


def test_a_run_folder_holds_one_run(settings, tmp_path):
    """A second run in the same folder is refused, before anything is written."""
    fit(settings, run_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a run already"):
        fit(settings, run_dir=tmp_path / "run")
