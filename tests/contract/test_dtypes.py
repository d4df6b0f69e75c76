"""An optimizer's state is resumed in the dtype that it had, which need not be that of its parameter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from pipeline import Trainer

DATA = TensorDataset(torch.randn(24, 4), torch.randn(24, 2))


class Exact(torch.optim.Optimizer):
    """SGD for weights of few digits, which keeps all of them in its state."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for each in group["params"]:
                state = self.state[each]
                exact = state.setdefault("exact", each.float())
                each.copy_(exact.sub_(each.grad.float(), alpha=group["lr"]))


class Model(torch.nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs.bfloat16()).float()


def train(run_dir, **settings):
    torch.manual_seed(0)
    model = Model(4, 2).bfloat16()
    trainer = Trainer(run_dir=run_dir, enable_progress_bar=False, device="cpu", **settings)
    return trainer.fit(model, Exact(model.parameters()), DATA, loss_fn=F.mse_loss, batch_size=4)


def test_a_state_of_more_digits_than_its_weights_is_resumed(tmp_path):
    """torch's `load_state_dict` rounds it to those of the weights."""
    whole = train(tmp_path / "whole", max_epochs=4)
    train(tmp_path / "part", max_epochs=2)
    assert train(tmp_path / "part", max_epochs=4, resume="auto").losses.tolist() == whole.losses.tolist()
