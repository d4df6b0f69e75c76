"""The soul of the project: the Trainer against the textbook loop, bit for bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from pipeline import SimulatedBackend, Trainer
from tests.textbook import assert_same_weights, build_model, seeded_batches, textbook, weights

SHAPES = {
    "kind": st.sampled_from(["linear", "dropout", "conv"]),
    "num_samples": st.integers(2, 40),
    "batch_size": st.integers(2, 9),
    "accumulate": st.integers(1, 4),
    "shuffle": st.booleans(),
    "drop_last": st.booleans(),
    "clip": st.sampled_from([None, 0.1]),
    "optimizer": st.sampled_from([torch.optim.SGD, torch.optim.AdamW]),
    "seed": st.integers(0, 3),
}
BELTS = {
    "depth": st.integers(1, 9),
    "max_steps_in_flight": st.integers(1, 6),
    "is_simulated": st.booleans(),
}


class SlowToDraw(torch.utils.data.Dataset):
    """Draws noise for each sample, as augmentation does."""

    def __init__(self, num_samples):
        self.inputs = torch.randn(num_samples, 6, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        noise = torch.randn(6) * 0.1 + torch.empty(6).uniform_(-0.1, 0.1)
        return self.inputs[index] + noise, int(torch.randint(0, 3, ()))


def run_textbook(dataset, *, kind, batch_size, accumulate, shuffle, drop_last, clip, optimizer, seed):
    torch.manual_seed(seed)
    model = build_model(kind)
    batches = seeded_batches(
        dataset, epochs=2, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, seed=seed
    )
    losses = textbook(
        model, optimizer(model.parameters(), lr=0.05), batches, accumulate=accumulate, clip=clip
    )
    return losses, weights(model)


def run_trainer(
    dataset, *, kind, batch_size, accumulate, shuffle, drop_last, clip, optimizer, seed, **settings
):
    torch.manual_seed(seed)
    model = build_model(kind)
    trainer = Trainer(
        max_epochs=2, accumulate_grad_batches=accumulate, gradient_clip_val=clip, seed=seed,
        run_dir=None, enable_progress_bar=False, **{"device": "cpu", **settings},
    )  # fmt: skip
    result = trainer.fit(
        model, optimizer(model.parameters(), lr=0.05), dataset, loss_fn=F.cross_entropy,
        batch_size=batch_size, shuffle=shuffle, drop_last=drop_last,
    )  # fmt: skip
    return result.losses.tolist(), weights(model)


def check(dataset, shape, **settings):
    losses, learned = run_textbook(dataset, **shape)
    found_losses, found = run_trainer(dataset, **shape, **settings)
    assert found_losses == losses
    assert_same_weights(found, learned)


@given(st.fixed_dictionaries(SHAPES))
def test_textbook_schedule_equals_the_textbook_loop(shape):
    """The textbook schedule gives the losses and weights of the loop that everybody writes."""
    num_samples = max(shape.pop("num_samples"), 2 * shape["batch_size"])
    check(SlowToDraw(num_samples), shape, schedule="textbook")


@given(st.fixed_dictionaries(SHAPES), st.fixed_dictionaries(BELTS))
def test_overlap_equals_the_textbook_loop(shape, belts):
    """Overlap gives them too, at any depth and read lag, on the CPU and on a device that runs ahead."""
    num_samples = max(shape.pop("num_samples"), 2 * shape["batch_size"])
    backend = SimulatedBackend() if belts["is_simulated"] else "cpu"
    check(
        SlowToDraw(num_samples), shape, schedule="overlap", device=backend,
        prefetch_depth=belts["depth"], max_steps_in_flight=belts["max_steps_in_flight"],
    )  # fmt: skip
    if belts["is_simulated"]:
        assert backend.violations == []


@pytest.mark.parametrize("schedule", ["textbook", "overlap"])
@pytest.mark.parametrize("with_dropout", [False, True])
def test_data_loader_gives_what_a_plain_loop_over_it_gives(schedule, with_dropout):
    """A shuffling DataLoader yields the order that it would have in the user's own loop."""
    dataset = TensorDataset(torch.randn(50, 6), torch.randint(0, 3, (50,)))

    def start():
        torch.manual_seed(7)
        model = build_model("dropout" if with_dropout else "linear")
        return model, torch.optim.SGD(model.parameters(), 0.1), DataLoader(dataset, 8, shuffle=True)

    model, optimizer, loader = start()
    losses = textbook(model, optimizer, [loader, loader, loader])
    found_model, optimizer, loader = start()
    trainer = Trainer(max_epochs=3, schedule=schedule, run_dir=None, enable_progress_bar=False)
    result = trainer.fit(found_model, optimizer, loader, loss_fn=F.cross_entropy)
    assert result.losses.tolist() == losses
    assert_same_weights(weights(found_model), weights(model))


# A process that has threads is forked, which Python 3.12 and newer warn of.
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("schedule", ["textbook", "overlap"])
def test_a_loader_with_a_worker_process_is_run_as_it_is(schedule):
    """Its batches are those of the user's own loop, and its process ends with the epoch."""

    def start():
        torch.manual_seed(7)
        model = build_model("dropout")
        loader = DataLoader(SlowToDraw(12), 4, shuffle=True, num_workers=1)
        return model, torch.optim.SGD(model.parameters(), 0.1), loader

    model, optimizer, loader = start()
    losses = textbook(model, optimizer, [loader, loader])
    model, optimizer, loader = start()
    trainer = Trainer(max_epochs=2, schedule=schedule, run_dir=None, enable_progress_bar=False)
    assert trainer.fit(model, optimizer, loader, loss_fn=F.cross_entropy).losses.tolist() == losses


@pytest.mark.parametrize("is_simulated", [False, True])
def test_validation_in_the_middle_of_an_epoch_changes_nothing(is_simulated):
    """Two prefetch threads at once share the transfer, and the losses stay the same."""
    found = []
    for schedule in ("textbook", "overlap"):
        torch.manual_seed(0)
        model = build_model("dropout")
        trainer = Trainer(
            max_epochs=2, val_check_interval=3, schedule=schedule, run_dir=None, enable_progress_bar=False,
            device=SimulatedBackend(is_virtual=False) if is_simulated else "cpu",
        )  # fmt: skip
        result = trainer.fit(
            model, torch.optim.SGD(model.parameters(), 0.1), SlowToDraw(60), loss_fn=F.cross_entropy,
            batch_size=4, shuffle=True, val_data=SlowToDraw(40),
        )  # fmt: skip
        found.append((result.losses, [row.values.get("val/loss") for row in result.history]))
    assert found[0] == found[1]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_intra_op_threads_are_the_same_on_the_prefetch_thread(num_threads):
    """A sum in the dataset, which differs between one and two threads, is the same in either schedule."""

    class Summing(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            values = torch.randn(300_000, generator=torch.Generator().manual_seed(index))
            return values[:6] + values.sum() * 1e-3, index % 3

    torch.set_num_threads(num_threads)
    shape = {"kind": "linear", "batch_size": 2, "accumulate": 1, "shuffle": False, "drop_last": False,
             "clip": None, "optimizer": torch.optim.SGD, "seed": 0}  # fmt: skip
    for schedule in ("textbook", "overlap"):
        check(Summing(), shape, schedule=schedule)


def test_a_wrong_order_is_noticed():
    """The comparison can fail: another seed for the data gives other losses."""
    shape = {"kind": "linear", "batch_size": 4, "accumulate": 1, "shuffle": True, "drop_last": False,
             "clip": None, "optimizer": torch.optim.SGD}  # fmt: skip
    losses, _ = run_textbook(SlowToDraw(20), seed=0, **shape)
    torch.manual_seed(0)
    model = build_model("linear")
    other = textbook(
        model, torch.optim.SGD(model.parameters(), 0.05),
        seeded_batches(SlowToDraw(20), epochs=2, batch_size=4, shuffle=True, seed=1),
    )  # fmt: skip
    assert losses != other
