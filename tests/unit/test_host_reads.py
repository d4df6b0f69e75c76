"""The sync budget: in steady state the loop thread of `overlap` reads nothing, and who does is named."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from pipeline import Callback, SimulatedBackend, Trainer
from pipeline.device.host_reads import HostReads, _cuda_sync_debug
from pipeline.loggers import CsvLogger, TensorBoardLogger
from pipeline.metrics import accuracy
from pipeline.testing import InMemoryLogger
from tests.textbook import build_model

FEATURES = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 3},
    "clipping": {"gradient_clip_val": 0.1},
    "clipping by value": {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    "bf16": {"precision": "bf16-mixed", "gradient_clip_val": 0.1},
    "fp16": {"precision": "16-mixed", "gradient_clip_val": 0.1},
    "EMA": {"ema_decay": 0.9},
    "validation": {"val_check_interval": 2},
    "all": {
        "accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "precision": "16-mixed", "ema_decay": 0.9,
        "val_check_interval": 3,
    },
}  # fmt: skip


class Listener(Callback):
    """Hears every step, and keeps to the host's numbers."""

    def on_step_finished(self, event):
        self.step = event.state.step


def fit(*, optimizer=torch.optim.AdamW, loss_fn=F.cross_entropy, callbacks=(), kind="conv", **settings):
    torch.manual_seed(0)
    model = build_model(kind)
    own = {"fused": True} if settings.get("precision") == "16-mixed" else {}
    own = {**own, **settings.pop("optimizer_arguments", {})}
    optimizer = optimizer(model.parameters(), lr=0.01, **own)
    data = TensorDataset(torch.randn(48, 6), torch.arange(48) % 3)
    trainer = Trainer(**{
        "max_epochs": 2, "schedule": "overlap", "device": SimulatedBackend(), "detect_host_reads": True,
        "max_steps_in_flight": 100, **settings,
    })  # fmt: skip
    return trainer.fit(
        model, optimizer, data, loss_fn=loss_fn, batch_size=4, shuffle=True, val_data=data,
        metrics={"accuracy": accuracy}, callbacks=[Listener(), *callbacks], train_metrics={"a": accuracy},
        loggers=[InMemoryLogger(), CsvLogger(), TensorBoardLogger()],
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100), scheduler_interval="step",
    ).outbound  # fmt: skip


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("feature", FEATURES)
def test_the_budget_is_zero(feature, optimizer):
    """Between log points nothing is read, with loggers, bar, callbacks, scheduler and checkpoints on."""
    found = fit(optimizer=optimizer, **FEATURES[feature])
    assert found.host_reads == ()
    assert "no line made the loop thread wait" in str(found)


def reading_loss(outputs, target):
    loss = F.cross_entropy(outputs, target)
    loss.item()  # planted
    return loss


def line_of(text):
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.endswith(text))


@pytest.mark.parametrize("device", ["simulated", "cpu"])
def test_a_planted_read_is_counted_and_named(device):
    """Every `.item()` after the first step is counted, under the user's own file, line and function."""
    backend = SimulatedBackend() if device == "simulated" else "cpu"
    found = fit(loss_fn=reading_loss, device=backend)
    (read,) = found.host_reads
    assert (read.file, read.line) == (__file__, line_of("loss.item()  # planted"))
    assert (read.function, read.operation, read.num_reads) == ("reading_loss", "item", 23)
    assert f"{__file__}:{read.line} in reading_loss: item, 23 times, first after step 1" in str(found)


def test_a_read_in_a_callback_is_named():
    """What a callback does on the loop thread counts too."""

    class Reader(Callback):
        def on_step_finished(self, event):
            float(event.scalars["train/loss"])

    (read,) = fit(callbacks=[Reader()]).host_reads
    assert (read.file, read.function, read.num_reads) == (__file__, "on_step_finished", 24)


def test_a_read_in_a_backward_hook_is_named():
    """A hook runs inside torch's backward, and is the user's all the same."""

    def watch(gradient):
        return gradient * float(gradient.abs().max() >= 0)

    def loss_fn(outputs, target):
        if outputs.requires_grad:  # not in validation
            outputs.register_hook(watch)
        return F.cross_entropy(outputs, target)

    (read,) = fit(loss_fn=loss_fn).host_reads
    assert (read.file, read.function) == (__file__, "watch")


READS = {
    "item": lambda loss: loss.item(),
    "bool": lambda loss: bool(loss > 0),
    "format": lambda loss: f"{loss:.3f}",
    "tolist": lambda loss: loss.detach().tolist(),
    "cpu": lambda loss: loss.cpu(),
    "numpy": lambda loss: loss.detach().numpy(),
    "print": lambda loss: repr(loss),
    "mask": lambda loss: loss.reshape(1)[loss.reshape(1) > 0],
    "nonzero": lambda loss: torch.nonzero(loss),
    "equal": lambda loss: torch.equal(loss, loss),
    "unique": lambda loss: torch.unique(loss),
}


@pytest.mark.parametrize("name", READS)
def test_every_way_to_read_is_found(name):
    """Whatever makes the host wait: conversions, formatting, shapes that depend on the data."""

    def loss_fn(outputs, target):
        loss = F.cross_entropy(outputs, target)
        READS[name](loss)
        return loss

    (read,) = fit(loss_fn=loss_fn, kind="linear", max_epochs=1).host_reads
    assert read.num_reads == 11


def test_the_hosts_own_numbers_are_not_reads():
    """A tensor that never was on the device may be read: Adam's count of steps, a constant."""
    constant = torch.tensor(2.0)
    found = fit(loss_fn=lambda outputs, target: F.cross_entropy(outputs, target) * constant.item())
    assert found.host_reads == ()


def test_what_float16_reads_without_a_fused_optimizer_is_named():
    """The budget can fail: GradScaler asks at every step whether a gradient overflowed."""
    (read,) = fit(precision="16-mixed", optimizer_arguments={"fused": False}).host_reads
    assert Path(read.file).name == "grad_scaler.py"
    assert read.num_reads == 23


def test_a_read_of_our_own_is_caught():
    """The budget can fail: a belt that reads at once is named, and so is the textbook schedule."""
    (read,) = fit(schedule="textbook").host_reads
    assert (Path(read.file).name, read.function) == ("simulated.py", "read")
    assert read.num_reads >= 23


def test_nobody_looks_unless_asked():
    """Without the setting there is no detector, and the report has no line about it."""
    found = fit(detect_host_reads=False, loss_fn=reading_loss)
    assert found.host_reads is None
    assert "wait" not in str(found)


def test_losses_are_the_same_while_somebody_looks():
    """The detector changes no number."""
    losses = []
    for looks in (False, True):
        torch.manual_seed(0)
        model = build_model("conv")
        data = TensorDataset(torch.randn(24, 6), torch.arange(24) % 3)
        trainer = Trainer(
            detect_host_reads=looks, device=SimulatedBackend(), run_dir=None, enable_progress_bar=False
        )
        optimizer = torch.optim.AdamW(model.parameters())
        losses.append(trainer.fit(model, optimizer, data, loss_fn=F.cross_entropy, batch_size=4).losses)
    assert losses[0] == losses[1]


@dataclasses.dataclass
class FakeCuda:
    """What the detector needs of `torch.cuda`: the mode, and a wait that warns as torch's does."""

    mode: int = 0

    def get_sync_debug_mode(self):
        return self.mode

    def set_sync_debug_mode(self, mode):
        self.mode = mode

    def wait(self):
        if self.mode:
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=2)


def test_torchs_own_warnings_are_counted_by_thread(monkeypatch):
    """On CUDA a wait of the loop thread counts at each time; a belt's does not; all is put back."""
    from pipeline.concurrency import Scope

    cuda = FakeCuda()
    monkeypatch.setattr("pipeline.device.host_reads.torch.cuda", cuda)
    reads = HostReads(step=lambda: 5, ignores_own=False)
    reads.is_counting = True
    shown, filters = warnings.showwarning, list(warnings.filters)
    with _cuda_sync_debug(reads):
        for _ in range(3):
            cuda.wait()
        with Scope() as scope:
            scope.start(cuda.wait, name="prefetch", stop=lambda: None)
        with pytest.raises(UserWarning, match="another"):
            warnings.warn("another", stacklevel=1)
    (read,) = reads.found()
    assert (read.file, read.num_reads, read.first_step) == (__file__, 3, 5)
    assert (cuda.mode, warnings.showwarning, warnings.filters) == (0, shown, filters)
