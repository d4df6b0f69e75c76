"""Batches of worker processes go to the device from where they lie, in memory that was pinned once."""

from __future__ import annotations

import gc
import os
from contextlib import closing

import pytest
import torch

from pipeline import Loader, SimulatedBackend
from pipeline.concurrency import SlotFile
from pipeline.data import as_source
from pipeline.device.transfer import StreamTransfer
from pipeline.workers import Processes
from pipeline.workers.packing import view
from tests.workers import Augmented


class Watched(SimulatedBackend):
    """Knows where copies began, and how often memory was pinned."""

    def __init__(self, *, can_pin=True):
        super().__init__()
        self.can_pin, self.num_asked, self.is_direct = can_pin, 0, []

    def pin(self, address, nbytes):
        self.num_asked += 1
        return self.can_pin and super().pin(address, nbytes)

    def copy_in(self, host):
        self.is_direct.append(self.is_pinned(host))
        return super().copy_in(host)

    @property
    def pinned(self):
        return self._pinned


class EarlyReuse(Watched):
    """A planted race: a copy counts as over although it is still queued."""

    def record_copies(self):
        event = super().record_copies()
        event.query = lambda: True
        return event


def lent(slots, value):
    """Return a slot of 64 bytes, and a tensor in it."""
    slot = slots.acquire(64)
    slots.pin(slot)
    return slot, view(slots.lend(slot), 0, torch.float32, 16).fill_(value)


def test_what_lies_in_pinned_memory_is_not_copied_on_the_way():
    """A batch of a worker starts from its slot; the same elsewhere, or to be written again, does not."""
    device = Watched()
    with closing(SlotFile(device)) as slots:
        transfer = StreamTransfer(device, device, None)
        _, tensor = lent(slots, 1.0)
        for batch, is_leased in ((tensor, True), (tensor.clone(), True), (tensor, False)):
            assert transfer.receive(transfer.send(batch, is_leased=is_leased)).tolist() == [1.0] * 16
    assert device.is_direct == [True, False, False]


@pytest.mark.parametrize("race", [False, True])
def test_a_slot_is_used_again_once_its_copy_is_over(race):
    """Not when its batch was dropped: the next one would be written under the copy. The check can fail."""
    device = EarlyReuse() if race else Watched()
    with closing(SlotFile(device)) as slots:
        transfer = StreamTransfer(device, device, None)
        slot, tensor = lent(slots, 1.0)
        first = transfer.send(tensor, is_leased=True)
        del tensor
        second = transfer.send(lent(slots, 2.0)[1], is_leased=True)
        again, _ = lent(slots, 3.0)  # as a worker would write the next batch there
        assert (again == slot) is race
        assert (transfer.receive(first)[0] == 1.0) is not race
        assert transfer.receive(second)[0] == 2.0
        second.copied.synchronize()
        transfer.send(torch.zeros(1))  # sees that the copies are over
        assert race or slot in (slots.acquire(64), slots.acquire(64))


def test_memory_is_pinned_once_and_let_go_of_with_the_slots():
    """However often a slot is lent; one that became too small, or is still on lease at the end, too."""
    device = Watched()
    with closing(SlotFile(device)) as slots:
        for _ in range(3):
            slot = lent(slots, 1.0)[0]
        assert (device.num_asked, len(device.pinned)) == (1, 1)
        large = slots.acquire(slot.nbytes + 1)  # the small one is dropped
        assert not device.pinned
        slots.pin(large)
        kept = view(slots.lend(large), 0, torch.float32, 16).fill_(3.0)
        lent(slots, 4.0)
        assert len(device.pinned) == 2
        other = slots.acquire(64)
    assert not device.pinned
    assert kept.tolist() == [3.0] * 16
    slots.pin(other)  # of a batch that was answered before, and is asked for now
    assert not device.pinned


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_fork_that_closes_leaves_the_memory_alone():
    """What lies in a free slot may be somebody's batch by then."""
    with closing(SlotFile()) as slots:
        slot, tensor = lent(slots, 1.0)
        del tensor
        if (child := os.fork()) == 0:
            try:
                slots.close()
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert view(slots.lend(slot), 0, torch.float32, 16).tolist() == [1.0] * 16


def test_a_device_that_cannot_pin_is_asked_once():
    """Its batches go through slots of pinned memory, as those of other places do."""
    device = Watched(can_pin=False)
    with closing(SlotFile(device)) as slots:
        transfer = StreamTransfer(device, device, None)
        for value in (1.0, 2.0):
            assert transfer.receive(transfer.send(lent(slots, value)[1], is_leased=True))[0] == value
    assert device.num_asked == 1
    assert device.is_direct == [False, False]


def test_a_loader_hands_its_batches_to_the_device_from_their_slots():
    """All of them once slots have the batch's size; nothing stays pinned afterwards."""
    device = Watched()
    expected = [inputs.tolist() for inputs, _ in Loader(Augmented(64), batch_size=4, placement="inline")]
    with Loader(
        Augmented(64), batch_size=4, device=device, placement="process", num_workers=2, stall_timeout_s=60
    ) as loader:
        while not loader._inbound.is_ready():
            for _ in loader:
                pass
        for _ in loader:
            pass
        device.is_direct.clear()
        loader.epoch = 0
        found = [inputs.tolist() for inputs, _ in loader]
        assert device.pinned
    assert found == expected
    assert all(device.is_direct)
    assert len(device.is_direct) == 32
    gc.collect()
    assert not device.pinned
    assert not device.violations


class Held:
    """A batch of a kind that nobody looks into."""

    def __init__(self, samples):
        self.inputs = torch.stack([inputs for inputs, _ in samples])


def as_object(samples):
    """Return a batch whose tensor only the user can move."""
    return Held(samples)


def as_array(samples):
    """Return one of which a part stays on the host."""
    return torch.stack([inputs for inputs, _ in samples]), torch.stack(
        [inputs for inputs, _ in samples]
    ).numpy()


def as_sparse(samples):
    """Return one whose parts lie in the slot, and it does not."""
    return torch.stack([inputs for inputs, _ in samples]).to_sparse()


@pytest.mark.parametrize("collate_fn", [as_object, as_array, as_sparse, None])
def test_what_the_user_may_copy_does_not_lie_in_pinned_memory(collate_fn):
    """The copy would only be queued when a worker writes the next batch there."""
    device = Watched()
    source = as_source(
        Augmented(64),
        name="data",
        batch_size=4,
        shuffle=False,
        drop_last=False,
        collate_fn=collate_fn,
        seed=0,
    )
    processes = Processes(source, 1, 60, pinning=device)
    try:
        assert processes.wait_until_ready()
        for _ in processes.batches(source.open(0), 4):
            pass
        assert bool(device.pinned) is (collate_fn is None)
    finally:
        processes.close()
