"""The Loader in a loop of one's own: the same batches from every place, and nothing left behind."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from torch.utils.data import DataLoader

from pipeline import Loader
from pipeline.errors import ConfigError
from tests.textbook import seeded_batches
from tests.workers import Augmented

pytestmark = pytest.mark.usefixtures("warm_fork_server")


@pytest.mark.parametrize("placement", ["auto", "inline", "thread", "process"])
def test_batches_are_those_of_a_plain_loop(placement):
    """Two epochs, shuffled and augmented, with a loop left early in between."""
    data = Augmented(21)
    expected = [
        list(batches) for batches in seeded_batches(data, epochs=3, batch_size=4, shuffle=True, seed=5)
    ]
    with Loader(data, batch_size=4, shuffle=True, seed=5, placement=placement, num_workers=2) as loader:
        assert len(loader) == 6
        first = list(loader)
        begun = list(itertools.islice(loader, 2))
        third = list(loader)
    for found, epoch in ((first, 0), (begun, 1), (third, 2)):
        for batch, other in zip(found, expected[epoch], strict=False):
            assert torch.equal(batch[0], other[0])
            assert torch.equal(batch[1], other[1])
    assert [len(first), len(begun), len(third)] == [6, 2, 6]


def test_an_epoch_can_be_chosen():
    """A loop that goes on where another run was sets the epoch."""
    loader = Loader(Augmented(8), batch_size=4, shuffle=True)
    next(iter(loader))
    expected = next(iter(loader))
    again = Loader(Augmented(8), batch_size=4, shuffle=True)
    again.epoch = 1
    assert torch.equal(next(iter(again))[0], expected[0])


def test_workers_end_with_the_loader():
    """Without a `with`, the processes end when nobody has the loader any more."""
    loader = Loader(Augmented(40), batch_size=2, placement="process", num_workers=1)
    while loader._inbound._processes is None or not loader._inbound._processes.is_ready(1):
        list(loader)
    pool = loader._inbound._processes._pool
    assert pool._workers
    del loader
    gc.collect()
    assert not pool._workers


def test_the_place_and_its_reason_can_be_read():
    """Pinned by the user, or found by measurement: it says which."""
    with Loader(Augmented(8), batch_size=4, placement="thread", num_workers=3) as loader:
        assert str(loader.placement) == "thread × 3: by the settings"
    with Loader(DataLoader(Augmented(8), 4)) as loader:
        list(loader)
        assert loader.placement.place == "textbook"
        assert "too short to tell" in str(loader.placement)


def test_wrong_settings_are_refused():
    """The same checks as the Trainer's, before the first batch."""
    with pytest.raises(ConfigError, match="num_workers must be 0 or more"):
        Loader(Augmented(8), batch_size=4, num_workers=-1)
    with pytest.raises(ConfigError, match="say how many make a batch"):
        Loader(Augmented(8))
    with pytest.raises(TypeError, match="does not say how many"):
        len(Loader(iter([torch.zeros(2)])))
