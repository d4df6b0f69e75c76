"""What is NaN before the first step, or becomes it by settings alone: said as it is, and kept clean."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from pipeline import Callback, NonFiniteError, SimulatedBackend, Trainer
from pipeline.checkpoint import load_checkpoint
from tests.textbook import weights

NAN = float("nan")
DEVICES = ["cpu", "simulated"]


def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
    )


def fit(model, optimizer, device="cpu", *, loss_fn=F.cross_entropy, callbacks=(), **settings):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(40, 6, generator=generator), torch.arange(40) % 3)
    backend = SimulatedBackend() if device == "simulated" else device
    trainer = Trainer(**{"run_dir": None, "enable_progress_bar": False, "device": backend, **settings})
    return trainer.fit(model, optimizer, data, loss_fn=loss_fn, batch_size=4, callbacks=callbacks)


def numbers(model, optimizer):
    of_state = [torch.as_tensor(each) for state in optimizer.state.values() for each in state.values()]
    return [*weights(model).values(), *of_state]


def spoil_weight(model):
    model[0].weight.data[0, 0] = NAN


def spoil_frozen(model):
    model[0].weight.requires_grad_(False)[0, 0] = NAN


def spoil_buffer(model):
    model[1].running_var[0] = NAN
    model[1].eval()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (spoil_weight, r"The weights held NaN or infinity before the first step \(0\.weight\)"),
        (spoil_frozen, r"The weights held NaN or infinity before the first step \(0\.weight\)"),
        (spoil_buffer, r"The buffers held NaN or infinity before the first step \(1\.running_var\)"),
    ],
)
def test_what_was_nan_before_the_first_step_is_named(spoil, found, device):
    """Not the learning rate, and no checkpoint that is not there."""
    model = make()
    spoil(model)
    with pytest.raises(NonFiniteError, match=found) as caught:
        fit(model, torch.optim.Adam(model.parameters()), device)
    assert "learning rate" not in str(caught.value)
    assert "checkpoint" not in str(caught.value)


def prepared(spoils):
    """Return a model and an optimizer that has made a step; its state is spoiled if it is to be."""
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    F.cross_entropy(model(torch.randn(4, 6)), torch.arange(4) % 3).backward()
    optimizer.step()
    optimizer.zero_grad()
    if spoils:
        optimizer.state[model[0].weight]["exp_avg"].fill_(NAN)
    return model, optimizer


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_a_state_that_comes_with_nan_spoils_no_weight(mode, device):
    """torch's own optimizers are looked at once, before they are trusted."""
    model, optimizer = prepared(spoils=True)
    before = {name: each.clone() for name, each in model.named_parameters()}
    with pytest.raises(NonFiniteError, match="optimizer's state held NaN or infinity before"):
        fit(model, optimizer, device, on_nonfinite=mode, max_epochs=3)
    assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())


def test_a_state_that_comes_clean_costs_no_copy(capsys):
    """It is an optimizer that was used before, in another loop."""
    fit(*prepared(spoils=False))
    assert "on_nonfinite" not in capsys.readouterr().err


def directions(outputs, target):
    """Return a loss whose gradient becomes smaller as the weights grow."""
    return F.cross_entropy(F.normalize(outputs.double(), dim=-1), target)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("settings", [{"momentum": 3e7}, {"weight_decay": 3e7}])
def test_settings_that_overflow_by_themselves_spoil_nothing(tmp_path, settings, device):
    """With moderate gradients and a finite loss: weights, state and each checkpoint are finite."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 1.0, **settings)
    with pytest.raises(NonFiniteError):
        fit(model, optimizer, device, loss_fn=directions, run_dir=tmp_path, checkpoint_every_n_steps=1)
    assert all(each.isfinite().all() for each in numbers(model, optimizer))
    for path in (tmp_path / "checkpoints").iterdir():
        assert all(each.isfinite().all() for each in load_checkpoint(path)["model"].values())


class Spoiler(Callback):
    """Writes NaN into the optimizer's state behind a step, as a surgery on it may."""

    def on_step_finished(self, event):
        if event.state.step == 10:
            next(iter(event.state.optimizer.state.values()))["exp_avg"].fill_(NAN)


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_whose_every_step_would_be_left_out_ends(device):
    """Its losses are finite, its weights too, and nothing is learned any more: the error says why."""
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), 0.01, weight_decay=101.0)  # looked at in each step
    with pytest.raises(NonFiniteError, match="optimizer's state held NaN or infinity before that step"):
        fit(model, optimizer, device, on_nonfinite="skip", max_epochs=4, callbacks=[Spoiler()])
    assert all(each.isfinite().all() for each in model.parameters())
