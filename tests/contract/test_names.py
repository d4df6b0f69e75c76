"""Names in our files are those of the plain model, however it is wrapped; files from before are read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from pipeline import Trainer
from pipeline.checkpoint import __main__ as command
from pipeline.checkpoint import load_checkpoint, load_model, load_weights, save_checkpoint
from pipeline.state import TrainState

DATA = TensorDataset(torch.randn(16, 3), torch.randn(16, 1))
QUIET = {"enable_progress_bar": False, "device": "cpu"}


class Inner(torch.nn.Module):
    """A wrapper of the user's own, with an attribute that is called as DDP calls its own."""

    def __init__(self):
        super().__init__()
        self.module = torch.nn.Linear(3, 4)
        self.register_buffer("module_scale", torch.ones(()), persistent=False)

    def forward(self, inputs):
        return self.module(inputs) * self.module_scale


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = Inner(), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)

    def forward(self, inputs):
        return self.head(self.norm(self.body(inputs)).relu())


def compiled(model):
    return torch.compile(model, backend="eager")


def in_parts(model):
    model.body.module = compiled(model.body.module)
    model.head = compiled(model.head)
    return model


class Ddp(torch.nn.parallel.DistributedDataParallel):
    """torch's, in its names and its type, without a process group."""

    def __init__(self, module):
        torch.nn.Module.__init__(self)
        self.module = module

    def forward(self, inputs):
        return self.module(inputs)


WRAPPERS = {
    "plain": lambda net: net,
    "compiled": compiled,
    "compiled twice": lambda net: compiled(torch.nn.DataParallel(compiled(net))),
    "parts": in_parts,
    "parallel": torch.nn.DataParallel,
    "compiled parts of a compiled parallel one": lambda net: torch.nn.DataParallel(compiled(in_parts(net))),
    "ddp": Ddp,
    "compiled ddp": lambda net: compiled(Ddp(net)),
}
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
NAMES = sorted(Net().state_dict())


def train(run_dir, wrap, **settings):
    torch.manual_seed(0)
    net = Net()
    model = wrap(net)
    optimizer = torch.optim.AdamW(model.named_parameters(), 0.1)
    trainer = Trainer(run_dir=run_dir, **QUIET, **settings)
    return trainer.fit(model, optimizer, DATA, loss_fn=F.mse_loss, batch_size=4), net


def names_in(found):
    texts = [str(found["optimizer"]["param_groups"][0]["param_names"]), *found["model"], *found["buffers"]]
    return " ".join([*texts, *found.get("ema", {}).get("weights", {}), str(found["trained"])])


@pytest.mark.parametrize("name", WRAPPERS)
def test_files_are_of_the_plain_model(tmp_path, name):
    """A run's checkpoint, its export and its average; evaluated, predicted on and resumed in any wrapping."""
    result, _ = train(tmp_path / "run", WRAPPERS[name])
    expected, expected_net = train(tmp_path / "whole", WRAPPERS["plain"], max_epochs=2)
    found = load_checkpoint(result.last_checkpoint)
    assert sorted(found["model"]) == NAMES
    assert list(found["buffers"]) == ["body.module_scale"]
    assert "_orig_mod" not in names_in(found)
    assert found["optimizer"]["param_groups"][0]["param_names"] == [
        each for each, _ in Net().named_parameters()
    ]
    out = tmp_path / "weights.safetensors"
    assert command.main(["export", str(result.last_checkpoint), str(out)]) == 0
    for wrap in WRAPPERS.values():
        model = wrap(Net())
        load_model(result.last_checkpoint, model)
        assert all(map(torch.equal, model.state_dict().values(), found["model"].values()))
    arguments = {"batch_size": 4, "checkpoint": result.last_checkpoint}
    Trainer(run_dir=None, **QUIET).evaluate(Net(), DATA, loss_fn=F.mse_loss, **arguments)
    Trainer(run_dir=None, **QUIET).predict(Ddp(Net()), DATA, **arguments)
    for other in ("plain", "parts"):
        resumed, net = train(tmp_path / other, WRAPPERS[other], resume=result.last_checkpoint, max_epochs=2)
        assert resumed.losses.tolist() == expected.losses.tolist()
        assert all(map(torch.equal, net.state_dict().values(), expected_net.state_dict().values()))


@pytest.mark.parametrize("name", ["plain", "compiled", "parts"])
def test_the_average_is_of_the_plain_model_too(tmp_path, name):
    """And goes on as it was, in another wrapping."""
    result, _ = train(tmp_path / "run", WRAPPERS[name], ema_decay=0.9)
    assert sorted(load_weights(result.last_checkpoint)) == NAMES
    assert sorted(load_checkpoint(result.last_checkpoint)["ema"]["weights"]) == NAMES
    whole, _ = train(tmp_path / "whole", WRAPPERS["plain"], ema_decay=0.9, max_epochs=2)
    resumed, _ = train(
        tmp_path / "other", compiled, ema_decay=0.9, resume=result.last_checkpoint, max_epochs=2
    )
    average = list(resumed.ema_model.state_dict().values())
    assert all(map(torch.equal, average, whole.ema_model.state_dict().values()))


@pytest.mark.parametrize("name", WRAPPERS)
def test_files_from_before_are_read(tmp_path, name):
    """They have the names of the model as it was wrapped."""
    torch.manual_seed(1)
    model, path = WRAPPERS[name](Net()), tmp_path / "old.safetensors"
    average = torch.optim.swa_utils.AveragedModel(Net())
    state = model.state_dict()
    for wrap in WRAPPERS.values():
        save_checkpoint(path, {"model": state})
        other = wrap(Net())
        load_model(path, other)
        assert all(map(torch.equal, other.state_dict().values(), state.values()))
    assert not any("_orig_mod" in each for each in load_weights(path))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    old = {"model": state, "ema": average.state_dict(), "buffers": {}, "epoch": 1, "step": 2}
    save_checkpoint(path, {**old, "optimizer": optimizer.state_dict()})
    net = compiled(Net())
    now = TrainState(
        net, torch.optim.SGD(net.parameters(), 0.2), ema=torch.optim.swa_utils.AveragedModel(net)
    )
    now.load_state_dict(load_checkpoint(path))
    assert all(map(torch.equal, net.state_dict().values(), state.values()))
    assert all(map(torch.equal, now.ema.module.state_dict().values(), average.module.state_dict().values()))
    assert now.optimizer.param_groups[0]["lr"] == 0.1


def test_names_that_differ_in_a_wrappers_name_alone_stay_apart(tmp_path):
    """An attribute called module, and one of the same name above it."""

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(2))
            self.module = torch.nn.ParameterDict({"weight": torch.nn.Parameter(torch.randn(2))})

    before, after = Both(), compiled(Both())
    save_checkpoint(tmp_path / "a.safetensors", {"model": before.state_dict()})
    load_model(tmp_path / "a.safetensors", after)
    assert all(map(torch.equal, after.state_dict().values(), before.state_dict().values()))


class Versioned(torch.nn.Linear):
    """A module that reads states of its first version as half of what they are."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, notes, *rest):
        if notes.get("version", 1) < 2:
            state[f"{prefix}weight"] = 2 * state[f"{prefix}weight"]
        super()._load_from_state_dict(state, prefix, notes, *rest)


class HasVersion(Net):
    """The model of this file, with such a module in it."""

    def __init__(self):
        super().__init__()
        self.versioned = Versioned(2, 2)


@pytest.mark.parametrize("name", ["plain", "compiled", "parts"])
def test_a_modules_version_is_that_of_its_state(tmp_path, name):
    """As with `state_dict` and `load_state_dict`: what is new is not taken for old, in any wrapping."""
    model = WRAPPERS[name](HasVersion())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    average = torch.optim.swa_utils.AveragedModel(model)
    save_checkpoint(tmp_path / "a.safetensors", TrainState(model, optimizer).state_dict())
    averaged = TrainState(model, optimizer, ema=average).state_dict()
    save_checkpoint(tmp_path / "b.safetensors", averaged)
    for wrap in (WRAPPERS[each] for each in ("plain", "compiled", "parts")):
        for path in ("a.safetensors", "b.safetensors"):
            other = wrap(HasVersion())
            load_model(tmp_path / path, other)
            assert all(map(torch.equal, other.state_dict().values(), model.state_dict().values()))
        other = wrap(HasVersion())
        now = TrainState(
            other, torch.optim.SGD(other.parameters(), 0.1), ema=torch.optim.swa_utils.AveragedModel(other)
        )
        now.load_state_dict(load_checkpoint(tmp_path / "b.safetensors"))
        for found in (other, now.ema.module):
            assert all(map(torch.equal, found.state_dict().values(), model.state_dict().values()))
    plain = HasVersion()
    plain.load_state_dict(load_weights(tmp_path / "a.safetensors"))
    assert all(map(torch.equal, plain.state_dict().values(), model.state_dict().values()))
