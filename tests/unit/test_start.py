"""Data opened in the middle of an epoch: the batches that were left, and none other."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.data import END, as_source

OPTIONS = {"name": "data", "drop_last": False, "collate_fn": None, "seed": 3}


class Noisy(Dataset):
    """Draws from torch's generator."""

    def __len__(self):
        return 11

    def __getitem__(self, index):
        return torch.randn(2) + index


def sources():
    """Return data of each kind, by name."""
    return {
        "dataset": as_source(Noisy(), batch_size=2, shuffle=True, **OPTIONS),
        "loader": as_source(DataLoader(Noisy(), 2, shuffle=True), batch_size=None, shuffle=False, **OPTIONS),
        "list": as_source([torch.ones(2) * n for n in range(6)], batch_size=None, shuffle=False, **OPTIONS),
    }


def read(source, **where):
    torch.manual_seed(5)
    reader = source.open(1, **where)
    found = []
    while (batch := reader.first() if not found else reader.read()) is not END:
        found.append(batch)
    return found, reader.position


@pytest.mark.parametrize("start", range(7))
@pytest.mark.parametrize("kind", ["dataset", "loader", "list"])
def test_an_epoch_can_be_opened_at_any_batch(kind, start):
    """What is left is what an epoch read from its beginning gives there, random numbers included."""
    source = sources()[kind]
    whole, end = read(source)
    rest, position = read(source, start=start)
    assert len(whole) == end == 6
    assert position == 6
    assert len(rest) == 6 - min(start, 6)
    assert all(torch.equal(left, right) for left, right in zip(rest, whole[start:], strict=True))


@pytest.mark.parametrize("kind", ["dataset", "loader", "list"])
def test_a_limit_counts_from_the_epochs_beginning(kind):
    """Four batches at most, two of them used before: two are left."""
    rest, position = read(sources()[kind], start=2, max_batches=4)
    assert (len(rest), position) == (2, 4)
