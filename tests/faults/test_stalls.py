"""Whatever hangs is named: stage, sample, stack; and the run ends where it can."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, default_collate

from pipeline import StallError, Trainer
from pipeline.testing import Gate


class Hanging(Dataset):
    """Waits at one sample until its gate is opened."""

    def __init__(self, at):
        self.at, self.gate = at, Gate()

    def __len__(self):
        return 20

    def __getitem__(self, index):
        if index == self.at:
            self.gate.pass_through()
        return torch.full((4,), float(index)), index % 2


def fit(dataset, patience_s=2, **arguments):
    """Train with a time-out that no batch reaches on a busy machine, but for one that waits at a gate."""
    model = torch.nn.Linear(4, 2)
    trainer = Trainer(
        schedule="overlap", stall_timeout_s=patience_s, run_dir=None, enable_progress_bar=False, device="cpu"
    )
    return trainer.fit(
        model, torch.optim.SGD(model.parameters(), 0.1), dataset, loss_fn=F.cross_entropy, batch_size=2,
        **arguments,
    )  # fmt: skip


def end(gate):
    """Let the thread that was left behind go, and wait for it."""
    gate.open()
    for thread in threading.enumerate():
        if thread.name == "prefetch":
            thread.join()


def test_a_dataset_that_hangs_is_named_with_its_sample():
    """The error has the stage, the sample, the channel's statistics and the stack; `fit` ends."""
    dataset = Hanging(at=7)
    with pytest.warns(RuntimeWarning, match="thread 'prefetch' hangs"), pytest.raises(StallError) as caught:
        fit(dataset)
    error = caught.value
    assert (error.stage, error.index) == ("fetch", 7)
    assert str(error).startswith("stage 'fetch', sample 7: no batch for 2 s")
    assert "__getitem__" in error.stack
    assert error.statistics.num_items == 2
    end(dataset.gate)


def test_a_collate_function_that_hangs_is_named():
    """No sample is to blame then."""
    gate = Gate()

    def collate(samples):  # that counted its calls would be called by the loop, in its turn
        if any(inputs[0] == 7 for inputs, _ in samples):
            gate.pass_through()
        return default_collate(samples)

    with pytest.warns(RuntimeWarning, match="thread 'prefetch' hangs"), pytest.raises(StallError) as caught:
        fit(Hanging(at=None), collate_fn=collate)
    assert (caught.value.stage, caught.value.index) == ("collate", None)
    end(gate)


def test_a_slow_dataset_is_no_hang():
    """Each batch within the time-out: nothing is said."""
    assert fit(Hanging(at=None), patience_s=60).num_steps == 10
