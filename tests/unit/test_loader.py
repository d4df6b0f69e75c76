"""The Loader in a loop of one's own: the same batches from every place, and nothing left behind."""

from __future__ import annotations

import gc
import itertools
import os
import sys

import pytest
import torch
from torch.utils.data import DataLoader

from pipeline import Loader
from pipeline.errors import ConfigError, StageError
from pipeline.inbound.decide_placement import SWITCHING
from pipeline.inbound.fixed import Pinned
from tests.textbook import seeded_batches
from tests.workers import Augmented


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
    with Loader(
        Augmented(32), batch_size=4, placement="process", num_workers=1, threads_per_worker=3
    ) as loader:
        while not loader._inbound.is_ready():
            list(loader)
        assert str(loader.placement).startswith("process × 1 (3 threads each): by the settings")
        assert [worker.num_threads for worker in loader._inbound._processes._pool._workers] == [3]
        assert (loader.placement.num_workers, loader.placement.threads_per_worker) == (1, 3)
    with Loader(iter([torch.zeros(2)] * 9), placement="thread", num_workers=3) as loader:
        list(loader)
        assert str(loader.placement) == "thread × 1: by the settings"  # what has an order is read by one
    with Loader(DataLoader(Augmented(8), 4)) as loader:
        list(loader)
        assert loader.placement.place == "textbook"
        assert "not settled" in str(loader.placement)


def test_wrong_settings_are_refused():
    """The same checks as the Trainer's, before the first batch."""
    with pytest.raises(ConfigError, match="num_workers must be 0 or more"):
        Loader(Augmented(8), batch_size=4, num_workers=-1)
    with pytest.raises(ConfigError, match="threads_per_worker must be 1 or more, got 0"):
        Loader(Augmented(8), batch_size=4, threads_per_worker=0)
    with pytest.raises(ConfigError, match=r"^depth must be 1 or more, got 0"):
        Loader(Augmented(8), batch_size=4, depth=0)
    with pytest.raises(ConfigError, match="say how many make a batch"):
        Loader(Augmented(8))
    with pytest.raises(TypeError, match="does not say how many"):
        len(Loader(iter([torch.zeros(2)])))


def with_processes(data, num_workers=1, **arguments):
    """Return a loader whose worker processes are there, and make the same batches as the loop."""
    loader = Loader(data, batch_size=2, placement="process", num_workers=num_workers, **arguments)
    inbound = loader._inbound
    inbound.start_processes(num_workers)
    assert inbound._processes.wait_until_ready()
    assert inbound.start_processes(num_workers)
    for _ in loader:
        pass
    loader.epoch = 0
    return loader


def test_loops_left_early_use_the_same_memory_again():
    """Batches that were answered and never taken give their slots back."""
    with with_processes(Augmented(40), depth=4) as loader:
        processes = loader._inbound._processes
        for _ in range(6):
            batches = iter(loader)
            next(batches)
            for _ in range(3):  # its answers lie ready for the iterator that is closed
                asker = next(iter(processes._tickets.values()))[2]
                processes._collect(asker)
            batches.close()
        assert processes.num_slots <= 9


def test_two_loops_over_one_loader_disturb_each_other_in_nothing():
    """As with a DataLoader, each iteration has its own batches."""
    plain = Loader(Augmented(20), batch_size=2, placement="inline")
    expected = list(zip(plain, plain, strict=True))
    with with_processes(Augmented(20), stall_timeout_s=20) as loader:
        for found, other in zip(zip(loader, loader, strict=True), expected, strict=True):
            assert torch.equal(found[0][0], other[0][0])
            assert torch.equal(found[1][0], other[1][0])


def test_a_loader_lives_as_long_as_its_loop():
    """``for batch in Loader(…)`` names it nowhere else; its processes end with the loop."""
    batches = iter(with_processes(Augmented(20)))
    gc.collect()
    assert len(list(batches)) == 10


def test_closing_in_the_middle_of_an_epoch_is_told():
    """The loop that goes on learns of it at once; a further epoch starts the processes again."""
    with with_processes(Augmented(40)) as loader:
        batches = iter(loader)
        next(batches)
    with pytest.raises(StageError, match="closed in the middle of an epoch"):
        list(batches)
    with loader:
        assert len(list(loader)) == 20


def test_a_great_depth_fills_no_socket():
    """More batches ahead than a socket's buffer takes jobs: nobody blocks."""
    with with_processes(Augmented(4000, draws=()), depth=3000) as loader:
        assert len(list(loader)) == 2000


def test_a_fork_that_ends_leaves_the_workers_alone():
    """A child of the user's own has the same sockets, and closes the loader on its way out."""
    with with_processes(Augmented(40)) as loader:
        batches = iter(loader)
        next(batches)
        if (child := os.fork()) == 0:
            loader.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert len(list(batches)) == 19


def test_what_the_loop_thread_made_meanwhile_is_said():
    """A pinned place that was not there yet is not reported as if it had been."""
    with Loader(Augmented(8), batch_size=4, placement="process", num_workers=1) as loader:
        next(iter(loader))
        assert loader.placement.place == "textbook"
        assert "process × 1, by the settings; all 1 made by the loop thread" in str(loader.placement)


def test_the_switch_interval_is_short_only_while_threads_make_batches(monkeypatch):
    """In that place, until the loop is left."""
    monkeypatch.setattr("pipeline.inbound.belt.Auto", lambda *_: Pinned(SWITCHING))
    before, seen = sys.getswitchinterval(), []
    loader = Loader(Augmented(40), batch_size=2)
    for _ in loader:
        seen.append(sys.getswitchinterval())
        if len(seen) == 6:
            break
    del loader
    gc.collect()
    assert max(seen[3:]) < before  # the loop made the first three
    assert sys.getswitchinterval() == pytest.approx(before)
