"""Buffers that are no part of a model's state decide its next step too: a checkpoint has them as they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from pipeline import Trainer
from pipeline.checkpoint import load_checkpoint

DATA = TensorDataset(torch.randn(24, 4), torch.randn(24, 2))


class Remembers(torch.nn.Module):
    """Keeps what it has seen last in a buffer that grows, or is None before its first batch."""

    def __init__(self, is_there):
        super().__init__()
        self.linear = torch.nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(0, 2) if is_there else None, persistent=False)

    def forward(self, inputs):
        outputs = self.linear(inputs)
        seen = outputs.detach()[:0] if self.seen is None else self.seen
        self.seen = torch.cat([seen, outputs.detach()])[-7:]
        return outputs + 0.1 * self.seen.mean(0)


def train(run_dir, make, **settings):
    torch.manual_seed(0)
    model = make()
    trainer = Trainer(run_dir=run_dir, enable_progress_bar=False, device="cpu", **settings)
    return trainer.fit(
        model, torch.optim.Adam(model.parameters(), 0.1), DATA, loss_fn=F.mse_loss, batch_size=4
    )


@pytest.mark.parametrize("schedule", ["textbook", "overlap"])
@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_buffer_that_grows_is_resumed(tmp_path, is_there, is_compiled, schedule):
    """With the shape that it had, in a wrapped model too."""

    def make():
        model = Remembers(is_there)
        return torch.compile(model, backend="eager") if is_compiled else model

    whole = train(tmp_path / "whole", make, max_epochs=2, schedule=schedule)
    train(tmp_path / "part", make, max_steps=8, schedule=schedule)
    rest = train(tmp_path / "part", make, max_epochs=2, schedule=schedule, resume="auto")
    assert rest.losses.tolist() == whole.losses.tolist()


def test_a_buffer_that_many_modules_share_is_held_once(tmp_path):
    """Such as a table of positions, which each layer has."""
    table = torch.arange(4.0)

    class Layer(torch.nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.register_buffer("table", table, persistent=False)

        def forward(self, inputs):
            return super().forward(inputs + self.table)

    result = train(tmp_path, lambda: torch.nn.Sequential(Layer(), Layer(), torch.nn.Linear(4, 2)))
    assert list(load_checkpoint(result.last_checkpoint)["buffers"]) == ["0.table"]
