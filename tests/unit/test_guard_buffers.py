"""Buffers that a bad step has changed: filled, replaced, registered, made of None, taken away."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from pipeline import ConfigError, NonFiniteError, SimulatedBackend, Trainer
from pipeline.testing import InMemoryLogger

BAD = 3
NAN = float("nan")
DEVICES = ["cpu", "simulated"]


def data():
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(40, 6, generator=generator), torch.arange(40) % 3)


def fit(model, device="cpu", mode="skip", *, loss_fn=F.cross_entropy, loggers=(), **settings):
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    backend = SimulatedBackend() if device == "simulated" else "cpu"
    trainer = Trainer(run_dir=None, enable_progress_bar=False, device=backend, on_nonfinite=mode, **settings)
    return trainer.fit(model, optimizer, data(), loss_fn=loss_fn, batch_size=4, loggers=loggers)


class Model(nn.Module):
    """A linear model that does something to its buffers at each call; told which call is bad."""

    def __init__(self, change, *, bad=BAD, spoils_loss=False, **buffers):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.change, self.bad, self.spoils_loss = nn.Linear(6, 3), change, bad, spoils_loss
        self.call = -1
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, inputs):
        self.call += 1
        is_bad = self.call == self.bad
        self.change(self, inputs.detach() * (NAN if is_bad else 1.0))
        return self.linear(inputs) * (NAN if is_bad and self.spoils_loss else 1.0)


def replaced(model, inputs):
    model.mean = 0.9 * model.mean + 0.1 * inputs.mean(0)


def filled(model, inputs):
    model.mean.mul_(0.9).add_(inputs.mean(0), alpha=0.1)


def filled_unseen(model, inputs):
    model.mean.data.mul_(0.9).add_(inputs.mean(0), alpha=0.1)


def filled_and_replaced(model, inputs):
    model.mean += inputs.mean(0)
    model.mean = model.mean.clone()


def counted(model, inputs):
    model.mean = 0.9 * model.mean + 0.1 * inputs.mean(0)
    model.count += len(inputs)
    model.seen = model.seen | (inputs > 1).any()


def made_of_none(model, inputs):
    model.mean = inputs.mean(0) if model.mean is None else 0.9 * model.mean + 0.1 * inputs.mean(0)


def registered(model, inputs):
    if not hasattr(model, "late"):
        if model.call >= BAD:
            model.register_buffer("late", inputs.mean(0), persistent=False)
    else:
        model.late += inputs.mean(0)


def taken_away(model, inputs):
    if model.call == BAD:
        del model.mean
        model.register_buffer("other", inputs.mean(0))


def grown(model, inputs):
    model.mean = torch.cat([model.mean, inputs.mean(0)])


def complex_numbers(model, inputs):
    model.mean = model.mean + 1j * inputs.mean(0)


def shared_memory(model, inputs):
    model.mean = (model.mean[:1] + inputs.mean()).expand(6)


def of_inference(model, inputs):
    with torch.inference_mode():
        model.mean = model.mean + inputs.mean(0)


CHANGES = {
    "replaced": (replaced, {"mean": torch.zeros(6)}),
    "filled": (filled, {"mean": torch.zeros(6)}),
    "filled unseen": (filled_unseen, {"mean": torch.zeros(6)}),
    "filled and replaced": (filled_and_replaced, {"mean": torch.zeros(6)}),
    "counted": (counted, {"mean": torch.zeros(6), "count": torch.tensor(0), "seen": torch.tensor(False)}),
    "made of None": (made_of_none, {"mean": None}),
    "registered": (registered, {}),
    "taken away": (taken_away, {"mean": torch.zeros(6), "last": torch.ones(2)}),
    "grown": (grown, {"mean": torch.zeros(1)}),
    "complex": (complex_numbers, {"mean": torch.zeros(6, dtype=torch.complex64)}),
    "of shared memory": (shared_memory, {"mean": torch.zeros(1).expand(6)}),
    "of inference mode": (of_inference, {"mean": torch.zeros(6)}),
    "large": (lambda model, inputs: model.bank.add_(inputs.mean()), {"bank": torch.zeros(300, 300)}),
}  # fmt: skip


EACH_STEP = [name for name in CHANGES if name not in ("registered", "taken away")]


def expected(change, buffers, *, bad=BAD, num_steps=10):
    """Return the buffers of a loop by hand that never calls the model in the bad step."""
    model = Model(change, bad=-1, **{name: clone(each) for name, each in buffers.items()})
    inputs = data().tensors[0].split(4)
    for step in range(num_steps):
        model.call = step - 1
        if step != bad:
            model(inputs[step])
    return dict(model.named_buffers())


def clone(value):
    if value is None:
        return None
    return value.clone() if torch._debug_has_internal_overlap(value) != 1 else value[:1].clone().expand(6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spoils_loss", [False, True])
@pytest.mark.parametrize(
    ("name", "bad"), [(name, BAD) for name in CHANGES] + [(name, 0) for name in EACH_STEP]
)
def test_a_buffer_is_as_it_was_before_the_bad_step(name, device, spoils_loss, bad):
    """Whatever the forward pass does to it; though loss and gradients are finite, a NaN in it is seen."""
    change, buffers = CHANGES[name]
    model = Model(
        change, bad=bad, spoils_loss=spoils_loss, **{name: clone(each) for name, each in buffers.items()}
    )
    result = fit(model, device)
    found, wanted = dict(model.named_buffers()), expected(change, buffers, bad=bad)
    assert found.keys() == wanted.keys()
    assert list(found) == list(wanted)
    for key in found:
        assert torch.equal(found[key], wanted[key]), key
    assert model._non_persistent_buffers_set <= set(model._buffers)
    assert sum(loss != loss for loss in result.losses) == int(spoils_loss)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CHANGES)
def test_a_run_that_stops_has_the_buffers_before_the_bad_step(name, device):
    """`stop` names the step and says what was spoiled; the buffers are as they were before it."""
    change, buffers = CHANGES[name]
    model = Model(change, **{name: clone(each) for name, each in buffers.items()})
    with pytest.raises(NonFiniteError, match="a buffer of the model became NaN") as caught:
        fit(model, device, "stop")
    assert (caught.value.first_step, caught.value.cause) == (BAD, "buffers")
    wanted = expected(change, buffers, num_steps=BAD)
    assert dict(model.named_buffers()).keys() == wanted.keys()
    for key, each in model.named_buffers():
        assert torch.equal(each, wanted[key]), key


def test_the_tensor_that_was_registered_is_so_again():
    """A replaced buffer is the object of before the step, for whoever holds it."""
    seen = []

    def change(model, inputs):
        seen.append(model.mean)
        replaced(model, inputs)

    model = Model(change, mean=torch.zeros(6))
    fit(model)
    assert seen[BAD + 1] is seen[BAD]
    assert seen[BAD] is not seen[BAD - 1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_infinity_and_nan_that_are_meant_are_no_error(mode, device):
    """A mask of minus infinity, filled or replaced at each step, and a buffer that was NaN from the start."""

    def change(model, inputs):
        model.mask = torch.where(inputs[0] > 0, float("-inf"), 0.0)
        model.other.copy_(model.mask)
        model.unset[model.call % 3] = NAN

    model = Model(change, bad=-1, mask=torch.zeros(6), other=torch.zeros(6), unset=torch.full((3,), NAN))
    logger = InMemoryLogger()
    fit(model, device, mode, loggers=[logger])
    assert [row.step for row in logger.rows if "train/loss" in row.values] == [*range(1, 11)]
    assert not any("train/skipped" in row.values for row in logger.rows)


@pytest.mark.parametrize("device", DEVICES)
def test_statistics_that_overflow_in_a_norm_layer_are_put_back(device):
    """Batch norm of huge inputs has a finite loss and finite gradients, and an infinite variance."""

    class Huge(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.linear, self.call = nn.BatchNorm1d(6), nn.Linear(6, 3), -1

        def forward(self, inputs):
            self.call += 1
            return self.linear(self.norm(inputs * (1e25 if self.call == BAD else 1.0)))

    model = Huge()
    result = fit(model, device)
    assert all(loss == loss for loss in result.losses)
    assert all(each.isfinite().all() for each in model.state_dict().values())
    assert model.norm.num_batches_tracked == 9


@pytest.mark.parametrize("device", DEVICES)
def test_buffers_of_a_loss_are_guarded_too(device):
    """A centre that a loss module moves along is as clean as the model's statistics."""

    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("center", torch.zeros(3))
            self.call = -1

        def forward(self, outputs, target):
            self.call += 1
            self.center = self.center + outputs.detach().mean(0) * (NAN if self.call == BAD else 1.0)
            return F.cross_entropy(outputs, target)

    loss_fn = Centred()
    fit(nn.Linear(6, 3), device, loss_fn=loss_fn)
    assert loss_fn.center.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_module_that_comes_with_a_bad_step_begins_anew(device):
    """Its statistics have nothing to go back to, and are those of a new layer."""

    def change(model, inputs):
        if model.call >= BAD:
            if not hasattr(model, "norm"):
                model.norm = nn.BatchNorm1d(6)
            model.norm(inputs)

    model = Model(change)
    fit(model, device)
    assert model.norm.num_batches_tracked == 6
    assert model.norm.running_mean.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_buffers_of_a_script_are_put_back(device):
    """TorchScript's modules keep their buffers elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        script = torch.jit.script(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)))
    fit(Spoiled(script, BAD), device)
    assert all(each.isfinite().all() for each in script.state_dict().values())
    assert script.state_dict()["1.num_batches_tracked"] == 9


class Spoiled(nn.Module):
    """Another model, whose input is NaN at one call."""

    def __init__(self, inner, bad):
        super().__init__()
        self.inner, self.bad, self.call = inner, bad, -1

    def forward(self, inputs):
        self.call += 1
        return self.inner(inputs * (NAN if self.call == self.bad else 1.0))


def lazy_model(bad):
    torch.manual_seed(0)
    return Spoiled(nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(3)), bad)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [-1, 0, BAD])
@pytest.mark.parametrize("settings", [{}, {"precision": "16-mixed"}, {"accumulate_grad_batches": 2}])
def test_lazy_modules_are_trained_and_guarded(settings, bad, device):
    """The first batch makes their tensors; if it is bad, their statistics begin anew."""
    model = lazy_model(bad)
    fit(model, device, **settings)
    assert all(each.isfinite().all() for each in model.state_dict().values())
    num_left_out = 0 if bad < 0 else settings.get("accumulate_grad_batches", 1)
    assert model.inner[1].num_batches_tracked == 10 - num_left_out


@pytest.mark.parametrize("device", DEVICES)
def test_a_lazy_model_that_stops_at_once_is_clean(device):
    """`stop` at the first step of all."""
    model = lazy_model(0)
    with pytest.raises(NonFiniteError, match="at step 0"):
        fit(model, device, "stop")
    assert all(each.isfinite().all() for each in model.state_dict().values())
    assert model.inner[1].num_batches_tracked == 0


@pytest.mark.parametrize("settings", [{"ema_decay": 0.9}, {"channels_last": True}])
def test_what_needs_tensors_at_once_is_refused_for_a_lazy_model(settings):
    """The setting is named, and what to do first."""
    (name,) = settings
    with pytest.raises(ConfigError, match=rf"{name} needs every tensor .* with torch.no_grad\(\): model"):
        fit(lazy_model(-1), **settings)
