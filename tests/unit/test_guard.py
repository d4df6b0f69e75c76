"""Steps that are not finite: the weights stay clean, whoever learns of it when."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from pipeline import NonFiniteError, SimulatedBackend, Trainer
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
    from pipeline.testing import InMemoryLogger

    torch.manual_seed(0)
    logger, model = InMemoryLogger(), Spoiled("input")
    Trainer(on_nonfinite="skip", run_dir=None, enable_progress_bar=False, device=SimulatedBackend()).fit(
        model, torch.optim.SGD(model.parameters(), 0.05), data(), loss_fn=F.cross_entropy, batch_size=4,
        loggers=[logger],
    )  # fmt: skip
    assert [row.step - 1 for row in logger.rows if "train/skipped" in row.values] == list(BAD)
