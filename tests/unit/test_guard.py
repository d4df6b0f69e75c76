"""Steps that are not finite: the weights stay clean, whoever learns of it when."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from pipeline import Callback, NonFiniteError, SimulatedBackend, Trainer
from pipeline.checkpoint import load_checkpoint
from pipeline.testing import InMemoryLogger
from tests.textbook import assert_same_weights, build_model, weights

BAD = (3, 7)


def data():
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(40, 6, generator=generator), torch.arange(40) % 3)


class Spoiled(torch.nn.Module):
    """A model whose input, or whose gradient, is spoiled at some steps."""

    def __init__(self, spoil):
        super().__init__()
        self.inner, self.spoil, self.step = build_model("conv"), spoil, -1

    def forward(self, inputs):
        self.step += self.training
        if self.training and self.step in BAD:
            if self.spoil == "gradient":
                outputs = self.inner(inputs)
                return outputs + (outputs.detach() * 0 + 1).requires_grad_() * 0 + Infinite.apply(outputs) * 0
            inputs = inputs * float("nan")
        return self.inner(inputs)


class Infinite(torch.autograd.Function):
    """Passes its value on, and an infinite gradient back."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 0 + float("inf")


def run(mode, *, spoil="input", device="cpu", fused=False, optimizer=torch.optim.AdamW, **settings):
    torch.manual_seed(0)
    model = Spoiled(spoil)
    keywords = {"fused": True} if fused else {}
    trainer = Trainer(
        on_nonfinite=mode, device=device, enable_progress_bar=False, **{"run_dir": None, **settings}
    )
    schedule = optimizer(model.parameters(), 0.05, **keywords)
    return model, trainer, lambda: trainer.fit(model, schedule, data(), loss_fn=F.cross_entropy, batch_size=4)


@pytest.mark.parametrize("device", ["cpu", "simulated"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("spoil", ["input", "gradient"])
def test_a_step_that_is_skipped_leaves_no_trace_of_nan(device, fused, spoil):
    """Weights, batch norm's statistics and the optimizer's state are finite, and the run goes to its end."""
    backend = SimulatedBackend() if device == "simulated" else "cpu"
    model, trainer, fit = run("skip", spoil=spoil, device=backend, fused=fused)
    result = fit()
    assert result.num_steps == 10
    assert all(value.isfinite().all() for value in weights(model).values())
    assert sum(loss != loss for loss in result.losses) == (2 if spoil == "input" else 0)


@pytest.mark.parametrize("fused", [False, True])
def test_the_device_skips_what_the_host_would(fused):
    """Selected on the device or not made at all: the same weights, with plain SGD."""
    found = []
    for device in ("cpu", SimulatedBackend()):
        model, _, fit = run("skip", device=device, fused=fused, optimizer=torch.optim.SGD)
        fit()
        found.append(weights(model))
    assert_same_weights(*found)


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_a_run_that_stops_has_the_weights_before_the_bad_step(tmp_path, device):
    """However late the host learns of it: those of a run of three steps, batch norm's statistics too."""
    backend = SimulatedBackend() if device == "simulated" else "cpu"
    model, _, fit = run("stop", device=backend, schedule="overlap", run_dir=tmp_path)
    with pytest.raises(NonFiniteError, match="weights are those before step 3") as caught:
        fit()
    assert caught.value.first_step == 3
    torch.manual_seed(0)
    other = Spoiled("input")
    Trainer(max_steps=3, run_dir=None, enable_progress_bar=False, device="cpu").fit(
        other, torch.optim.AdamW(other.parameters(), 0.05), data(), loss_fn=F.cross_entropy, batch_size=4
    )
    expected = weights(other)
    for name, value in weights(model).items():
        if "num_batches_tracked" not in name:  # a count, which is never NaN
            assert torch.equal(value, expected[name]), name
    line = json.loads((tmp_path / "nonfinite.jsonl").read_text().splitlines()[0])
    assert (line["step"], line["samples"]) == (3, [[12, 13, 14, 15]])


def test_gradients_alone_are_found_where_the_device_runs_ahead():
    """A finite loss with infinite gradients ends the run, and says that it was the gradients."""
    model, _, fit = run("stop", spoil="gradient", device=SimulatedBackend())
    with pytest.raises(NonFiniteError, match="the gradients became NaN or infinite"):
        fit()
    assert all(value.isfinite().all() for value in weights(model).values())


def test_without_the_guard_the_weights_are_spoiled():
    """The tests above can fail."""
    model, _, fit = run("ignore")
    fit()
    assert not all(value.isfinite().all() for value in weights(model).values())


def test_a_skipped_step_is_in_its_row():
    """`train/skipped` stands in the rows of such steps and in no other."""
    torch.manual_seed(0)
    logger, model = InMemoryLogger(), Spoiled("input")
    Trainer(on_nonfinite="skip", run_dir=None, enable_progress_bar=False, device=SimulatedBackend()).fit(
        model, torch.optim.SGD(model.parameters(), 0.05), data(), loss_fn=F.cross_entropy, batch_size=4,
        loggers=[logger],
    )  # fmt: skip
    assert [row.step - 1 for row in logger.rows if "train/skipped" in row.values] == list(BAD)


DEVICES = ["cpu", "simulated"]


class Scaled(torch.autograd.Function):
    """Passes its value on, and its gradient times a factor back."""

    @staticmethod
    def forward(ctx, value, factor):
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


class Scaling(torch.nn.Module):
    """A model whose loss or gradients are multiplied at some steps; its loss stays as it is for gradients."""

    def __init__(self, *, gradient=1.0, loss=1.0, bad=BAD):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.gradient, self.loss, self.bad, self.step = (
            build_model("conv"),
            gradient,
            loss,
            bad,
            -1,
        )

    def forward(self, inputs):
        self.step += 1
        outputs = self.inner(inputs)
        if self.step not in self.bad:
            return outputs
        return Scaled.apply(outputs, self.gradient) * self.loss


def train(model, optimizer, device="cpu", mode="stop", *, scheduler=None, **settings):
    callbacks, loggers = settings.pop("callbacks", ()), settings.pop("loggers", ())
    backend = SimulatedBackend() if device == "simulated" else "cpu"
    trainer = Trainer(
        **{"run_dir": None, "enable_progress_bar": False, "device": backend, "on_nonfinite": mode, **settings}
    )
    return trainer.fit(
        model, optimizer, data(), loss_fn=F.cross_entropy, batch_size=4, scheduler=scheduler,
        scheduler_interval="step" if scheduler else "epoch", callbacks=callbacks, loggers=loggers,
    )  # fmt: skip


def all_finite(model, optimizer):
    of_state = [torch.as_tensor(each) for state in optimizer.state.values() for each in state.values()]
    return all(each.isfinite().all() for each in [*weights(model).values(), *of_state])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("schedule", ["auto", "overlap"])
def test_gradients_alone_end_a_run(tmp_path, schedule, fused, device):
    """A NaN gradient under a finite loss: the run ends at that step, and its newest checkpoint is clean."""
    model = Scaling(gradient=float("nan"))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=fused)
    with pytest.raises(NonFiniteError, match="the gradients became NaN or infinite") as caught:
        train(
            model, optimizer, device, schedule=schedule, run_dir=tmp_path / "run", checkpoint_every_n_steps=1
        )
    assert (caught.value.first_step, caught.value.cause) == (3, "gradients")
    assert "The weights are those before step 3. " in str(caught.value)
    assert all_finite(model, optimizer)
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*.safetensors"))
    found = load_checkpoint(newest)
    assert found["step"] == 3
    assert all(each.isfinite().all() for each in found["model"].values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [False, True])
def test_huge_gradients_that_are_finite_are_used(fused, device):
    """Their norm overflows, they do not: plain SGD makes its update as the textbook loop does."""
    found = []
    for mode in ("ignore", "stop"):
        model = Scaling(gradient=1e25)
        train(model, torch.optim.SGD(model.parameters(), 1e-24, fused=fused), device, mode)
        found.append(weights(model))
    assert_same_weights(*found)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [False, True])
def test_an_update_that_overflows_is_taken_back(fused, device):
    """Adam squares finite gradients to infinity: weights and state are those of before, and it is said."""
    model = Scaling(gradient=1e25)
    optimizer = torch.optim.Adam(model.parameters(), 0.01, fused=fused)
    logger = InMemoryLogger()
    train(model, optimizer, device, "skip", loggers=[logger])
    assert all_finite(model, optimizer)
    assert [row.step - 1 for row in logger.rows if "train/skipped" in row.values] == list(BAD)
    assert {row.values["train/skipped"] for row in logger.rows if "train/skipped" in row.values} == {1.0}
    model = Scaling(gradient=1e25)
    is_flagged = fused and device == "simulated"
    said = "too large for the optimizer" if is_flagged else "the optimizer made weights or its own state NaN"
    with pytest.raises(NonFiniteError, match=said):
        train(model, torch.optim.Adam(model.parameters(), 0.01, fused=fused), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [False, True])
def test_a_learning_rate_that_is_nan_spoils_nothing(fused, device):
    """The update is taken back, or not made."""
    model = Scaling()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=fused)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float("nan") if step == 4 else 1.0)
    with pytest.raises(NonFiniteError, match="the optimizer made weights") as caught:
        train(model, optimizer, device, scheduler=scheduler)
    assert caught.value.first_step == 4
    assert all_finite(model, optimizer)


class Remembering(torch.optim.Optimizer):
    """An optimizer whose state begins as a copy of the weights, in lists and dicts, and counts for itself."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1, "count": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] += 1
            for each in group["params"]:
                state = self.state[each]
                if not state:
                    state["best"], state["parts"] = torch.tensor(float("inf")), [{"slow": each.clone()}]
                state["parts"][0]["slow"] -= group["lr"] * each.grad
                each.copy_(state["parts"][0]["slow"])


class Replacing(torch.optim.Optimizer):
    """An optimizer that makes its state anew at each step."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for each in self.param_groups[0]["params"]:
            before = self.state[each].get("moments", (torch.ones_like(each),))[0]
            self.state[each] = {"moments": (0.9 * before + each.grad,)}
            each -= 0.1 * self.state[each]["moments"][0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [(0,), (3,), (0, 1, 4)])
@pytest.mark.parametrize("kind", [Remembering, Replacing])
def test_an_optimizer_of_ones_own_is_guarded(kind, bad, device):
    """Whatever its state is made of, and whenever: as if the bad steps had not been made."""
    model = Scaling(gradient=float("nan"), bad=bad)
    model.inner = torch.nn.Linear(6, 3)
    expected = torch.nn.Linear(6, 3)
    expected.load_state_dict(model.inner.state_dict())
    train(model, kind(model.parameters()), device, "skip")
    optimizer = kind(expected.parameters())
    for step, (inputs, target) in enumerate(zip(*(each.split(4) for each in data().tensors), strict=True)):
        if step not in bad:
            F.cross_entropy(expected(inputs), target).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_weights(weights(model.inner), weights(expected))


def test_an_optimizer_whose_update_goes_wrong_is_named_with_the_cost(capsys):
    """Each update of an optimizer that is not torch's is made from a copy, which is said once."""
    model = Scaling()
    train(model, Remembering(model.parameters()), mode="skip")
    said = [line for line in capsys.readouterr().err.splitlines() if "on_nonfinite" in line]
    assert len(said) == 1
    assert "Remembering is none of torch's usual ones" in said[0]
    assert "MB more memory" in said[0]
    usual = Scaling()
    train(usual, torch.optim.AdamW(usual.parameters(), 0.01), mode="skip")
    assert "on_nonfinite" not in capsys.readouterr().err


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_weights_that_are_spoiled_from_elsewhere_are_not_called_clean(mode, device):
    """A callback writes NaN into a weight: the error says so, and does not praise the weights."""

    class Spoiler(Callback):
        def on_step_finished(self, event):
            if event.state.step == 4:
                next(event.state.model.parameters()).data.fill_(float("nan"))

    model = Scaling()
    with pytest.raises(NonFiniteError) as caught:
        train(model, torch.optim.SGD(model.parameters(), 0.01), device, mode, callbacks=[Spoiler()])
    assert "The weights held NaN or infinity before that step" in str(caught.value)
    assert "are those before" not in str(caught.value)


def test_an_error_claims_only_what_was_looked_at(tmp_path):
    """Without a look it says nothing of the weights, without a run folder nothing of a file."""
    assert "weights" not in str(NonFiniteError(3, 5, float("nan")))
    said = []
    for run_dir in (None, tmp_path / "run"):
        model = Scaling(loss=float("nan"))
        with pytest.raises(NonFiniteError) as caught:
            train(model, torch.optim.SGD(model.parameters(), 0.01), run_dir=run_dir)
        said.append(str(caught.value))
    assert "has its samples" not in said[0]
    assert f"{tmp_path / 'run' / 'nonfinite.jsonl'} has its samples." in said[1]


def test_the_error_can_be_pickled():
    """A launcher may send it to another process."""
    error = NonFiniteError(3, 5, 1.5, cause="gradients")
    error.spoiled_part, error.was_left_out = "", True
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_norm_that_the_user_returns_is_not_taken_for_the_gradients():
    """`grad_norm` among a step's own numbers is a number to log."""
    model = Scaling()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def step(model, batch):
        return {"loss": F.cross_entropy(model(batch[0]), batch[1]), "grad_norm": float("nan")}

    Trainer(run_dir=None, enable_progress_bar=False, device="cpu", on_nonfinite="skip").fit(
        model, optimizer, data(), step=step, batch_size=4
    )
    assert model.inner[2].num_batches_tracked == 10


def test_a_first_step_that_is_left_out_makes_no_warning():
    """torch warns of a scheduler that moves before its optimizer, which here it rightly does."""
    model = Scaling(loss=float("nan"), bad=(0,))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    train(model, optimizer, mode="skip", scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))


class EndedError(Exception):
    """Ends a run in the middle of an accumulation."""


@pytest.mark.parametrize("device", DEVICES)
def test_a_bad_micro_batch_is_remembered_by_a_checkpoint(tmp_path, device):
    """Saved behind it, in the middle of its accumulation, and resumed: the step is left out all the same."""

    def fit(resume, fails):
        model = Scaling(loss=float("nan"), bad=(4,) if fails else ())

        def loss_fn(outputs, target):
            if fails and model.step == 4:
                os.kill(os.getpid(), signal.SIGUSR1)
            if fails and model.step == 5:
                raise EndedError
            return F.cross_entropy(outputs, target)

        backend = SimulatedBackend() if device == "simulated" else "cpu"
        trainer = Trainer(
            run_dir=tmp_path / "run", enable_progress_bar=False, device=backend, on_nonfinite="skip",
            accumulate_grad_batches=3, resume=resume,
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        trainer.fit(model, optimizer, data(), loss_fn=loss_fn, batch_size=4)
        return model, optimizer

    with pytest.raises(EndedError):
        fit(None, True)
    model, optimizer = fit("auto", False)
    assert all_finite(model, optimizer)
    assert model.inner[2].num_batches_tracked == 7  # the second step's three are left out


def mixed(model, device, mode, **settings):
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)
    logger = InMemoryLogger()
    result = train(model, optimizer, device, mode, precision="16-mixed", loggers=[logger], **settings)
    assert all_finite(model, optimizer)
    return result, [row.step - 1 for row in logger.rows if "train/skipped" in row.values]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("settings", [{}, {"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 2}])
def test_float16_keeps_the_statistics_clean_too(device, settings):
    """A NaN loss beside a GradScaler: weights, momentum and batch norm are clean, and the step is marked."""
    every = settings.get("accumulate_grad_batches", 1)
    model = Scaling(loss=float("nan"))
    _, skipped = mixed(model, device, "skip", **settings)
    assert skipped == [each // every for each in BAD]
    assert model.inner[2].num_batches_tracked == 10 - every * len(BAD)
    model = Scaling(loss=float("nan"))
    with pytest.raises(NonFiniteError, match=f"The weights are those before step {3 // every}"):
        mixed(model, device, "stop", **settings)
    assert model.inner[2].num_batches_tracked == 3 // every * every


@pytest.mark.parametrize("device", DEVICES)
def test_scaled_gradients_that_overflow_are_no_error(device):
    """GradScaler leaves such an update out: marked with `skip`, batch norm as in a plain loop."""
    for mode in ("skip", "stop"):
        model = Scaling(gradient=float("inf"), bad=(0, 3))
        result, skipped = mixed(model, device, mode)
        assert result.num_steps == 10
        assert skipped == ([0, 3] if mode == "skip" else [])
        assert model.inner[2].num_batches_tracked == 10


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_that_overflow_at_any_scale_are_an_error(device):
    """With a scale of 1 it is no longer the scale: a run of NaN gradients does not end as if well."""
    model = Scaling(gradient=float("nan"), bad=range(100))
    with pytest.raises(NonFiniteError, match="the gradients became NaN or infinite") as caught:
        mixed(model, device, "stop", max_epochs=3)
    assert caught.value.first_step == 16  # 65536 is halved 16 times


RANK = """
import sys, torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset
from pipeline import NonFiniteError, Trainer

rank, store, mode = int(sys.argv[1]), *sys.argv[2:]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(6, 3))
step = -1

def loss_fn(outputs, target):
    global step
    step += 1
    loss = F.cross_entropy(outputs, target)
    if step == 2 and rank == 1:
        return loss * float("nan")  # the gradients of both ranks
    if step == 4 and rank == 0 and mode == "skip":
        return loss + torch.tensor(float("nan"))  # the loss of one
    return loss

trainer = Trainer(run_dir=None, enable_progress_bar=False, device="cpu", on_nonfinite=mode)
data = TensorDataset(torch.randn(40, 6, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 3)
first = None
try:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    trainer.fit(model, optimizer, data, loss_fn=loss_fn, batch_size=4)
except NonFiniteError as error:
    first = error.first_step
print(first, model.module.weight.detach().flatten().tolist())
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_ranks_leave_out_the_same_steps(tmp_path, mode):
    """Averaged gradients decide: a NaN among them counts on both ranks, a loss of one alone on none."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), tmp_path / "store", mode], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        for rank in range(2)
    ]  # fmt: skip
    found = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert found[0] == found[1]
    assert "nan" not in found[0]
    assert found[0].startswith("2 " if mode == "stop" else "None ")
