"""Transfers and deferred reads on the simulated accelerator, which poisons whatever is read too early."""

from __future__ import annotations

import dataclasses
import threading
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F

from pipeline import DeferredReads, SimulatedBackend, Trainer, prefetch
from pipeline.device import StepLimiter, make_transfer, select_backend
from pipeline.device.readback import Pending, Readback
from pipeline.device.transfer import SlotPool, StreamTransfer
from pipeline.errors import ConfigError
from tests.textbook import build_model

Pair = namedtuple("Pair", "inputs target")


@dataclasses.dataclass(frozen=True)
class FrozenBatch:
    inputs: torch.Tensor
    name: str


def nested_batch(value):
    tensor = torch.full((3,), float(value))
    return {
        "plain": tensor.clone(),
        "pair": Pair(tensor.clone(), [tensor.clone().long(), "text", None]),
        "frozen": FrozenBatch(tensor.clone(), "name"),
    }


@pytest.mark.parametrize(("lacking", "named"), [("ages_s", "streams.ages_s"), ("read", "read")])
def test_a_backend_that_lacks_something_is_refused_when_it_is_given(lacking, named):
    """And not where it is first called, which may be at the end of the run."""
    parts = {name: part for name, part in vars(SimulatedBackend).items() if name != lacking}
    backend = type("Mine", (), {name: part for name, part in parts.items() if name not in _OF_EVERY_CLASS})()
    with pytest.raises(ConfigError, match=rf"device is a Mine that lacks {named}:"):
        select_backend(backend)


_OF_EVERY_CLASS = ("__dict__", "__weakref__")


def tensors_of(batch):
    return [batch["plain"], batch["pair"].inputs, batch["pair"].target[0], batch["frozen"].inputs]


def small_data(num_samples=24):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_samples, 6, generator=generator)
    return torch.utils.data.TensorDataset(inputs, torch.arange(num_samples) % 3)


def losses_of(backend, schedule="overlap", **settings):
    torch.manual_seed(0)
    model = build_model("linear")
    trainer = Trainer(
        max_epochs=2, schedule=schedule, device=backend, run_dir=None, enable_progress_bar=False,
        on_nonfinite="ignore", **settings,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    result = trainer.fit(model, optimizer, small_data(), loss_fn=F.cross_entropy, batch_size=4, shuffle=True)
    return result.losses.tolist()


class NoWait(SimulatedBackend):
    """A planted race: the compute stream does not wait for the copies."""

    def wait_for_copies(self, copied):
        pass


class EarlyReuse(SimulatedBackend):
    """A planted race: a pinned slot counts as free although its copy is still queued."""

    def record_copies(self):
        event = super().record_copies()
        event.query = lambda: True
        return event


class EarlyRead(SimulatedBackend):
    """A planted race: the numbers are read before their copy has landed."""

    def record_compute(self):
        event = super().record_compute()
        event.synchronize = lambda: None
        return event


class NotLent(SimulatedBackend):
    """A planted race: memory of the copy stream is freed under the kernels."""

    def lend_to_compute(self, tensor):
        pass


@pytest.mark.parametrize("race", [NoWait, EarlyReuse, EarlyRead])
def test_a_planted_race_gives_wrong_numbers(race):
    """The simulated accelerator catches code that does not wait: the losses differ."""
    expected = losses_of("cpu", "textbook")
    assert losses_of(SimulatedBackend()) == expected
    try:
        found = losses_of(race())
    except IndexError as error:
        found = str(error)
    assert found != expected
    assert isinstance(found, list) or "Target -9223372036854775808" in found  # a poisoned label


def test_memory_freed_under_the_kernels_is_a_violation():
    """Side-stream memory that was not lent to the compute stream is reported when it dies."""
    backend = NotLent()
    losses_of(backend)
    assert backend.violations
    honest = SimulatedBackend()
    losses_of(honest)
    assert honest.violations == []


@pytest.mark.parametrize("backend", ["cpu", SimulatedBackend()], ids=["cpu", "simulated"])
def test_batches_that_the_user_keeps_stay_valid(backend):
    """Kept batches, nested ones too, hold their values after every slot was used again."""
    sent = [nested_batch(value) for value in range(40)]
    kept = list(prefetch(sent, device=backend, depth=3))
    for value, batch in enumerate(kept):
        for tensor in tensors_of(batch):
            assert tensor.tolist() == [value] * 3
        assert isinstance(batch["pair"], Pair)
        assert batch["pair"].target[1:] == ["text", None]
        assert batch["frozen"].name == "name"


def test_a_batch_may_be_overwritten_once_it_was_sent():
    """The host batch is copied at once, so an iterable that fills one buffer again and again is safe."""

    def one_buffer():
        buffer = torch.empty(4)
        for value in range(30):
            yield buffer.fill_(value)

    for device in ("cpu", SimulatedBackend()):
        kept = list(prefetch(one_buffer(), device=device))
        assert [batch[0].item() for batch in kept] == list(range(30))


def test_slots_are_used_again_and_kept_within_bounds():
    """A slot returns when its event has passed; beyond the bound free slots are let go."""
    backend = SimulatedBackend(launch_us=0)
    pool = SlotPool(backend, max_free_bytes=64)
    batch = torch.zeros(8)  # 32 bytes
    slots = [pool.lease(batch) for _ in range(4)]
    backend.copy_in(slots[0].tensor)
    copied = backend.record_copies()
    pool.give_back_after(copied, slots)
    assert pool.lease(batch) not in slots
    copied.synchronize()
    again = [pool.lease(batch) for _ in range(3)]
    assert [any(slot is each for each in slots) for slot in again] == [True, True, False]
    assert pool.lease(torch.zeros(8, dtype=torch.float64)) not in slots


def test_a_transposed_tensor_keeps_its_layout():
    """A slot has the strides of what it carries, so channels-last images arrive channels-last."""
    backend = SimulatedBackend()
    transfer = make_transfer(backend, overlaps=True, prepare=None)
    assert isinstance(transfer, StreamTransfer)
    images = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    received = transfer.receive(transfer.send(images))
    assert received.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(received, images)


def test_overlap_reads_nothing_on_the_loop_thread():
    """Between log points the loop thread waits for the run-ahead bound alone, and reads nothing."""

    class Counting(SimulatedBackend):
        reads = 0

        def read(self, tensor):
            Counting.reads += 1
            return super().read(tensor)

    backend = Counting()
    losses_of(backend, max_steps_in_flight=100)
    assert Counting.reads == 0
    assert threading.current_thread().name not in backend.waits
    losses_of(backend, "textbook")
    assert Counting.reads == 12  # the check can fail: textbook reads at every step


def test_run_ahead_is_bounded():
    """No more steps are queued than allowed; the loop waits for the one so many before."""
    backend = SimulatedBackend()
    limiter = StepLimiter(backend, 2)
    for count in range(1, 6):
        backend.launch(1.0)
        limiter.step_queued()
        assert backend.now_s() >= count - 2


def test_deferred_reads_come_back_in_order_and_exact():
    """Every scalar read later is what `.item()` would have said, whatever its type."""
    backend = SimulatedBackend()
    readback = Readback(backend, block_size=2)
    values = [torch.tensor(0.1), torch.tensor(2**40), torch.tensor(1.5, dtype=torch.bfloat16)]
    pending = []
    for number in range(4):
        backend.launch(1e-3)
        pending.append(readback.start({"a": values[0] + number, "b": values[1], "c": values[2], "d": 7.0}))
    assert not pending[-1].is_ready
    found = [each.resolve() for each in pending]
    assert [each["a"] for each in found] == [(values[0] + number).item() for number in range(4)]
    assert found[0] == {"a": values[0].item(), "b": 2**40, "c": 1.5, "d": 7.0}


def test_a_value_changed_in_place_is_read_as_it_was():
    """The next step may overwrite a scalar: the number read is the one of its own step."""
    for backend in (SimulatedBackend(), select_backend("cpu")):
        readback, value = Readback(backend), torch.tensor(1.0)
        pending = readback.start({"value": value})
        value.fill_(2.0)
        assert pending.resolve() == {"value": 1.0}


def test_more_scalars_than_before_get_wider_slots():
    """A step that logs more than the steps before loses nothing."""
    readback = Readback(SimulatedBackend(), block_size=1)
    first = readback.start({"a": torch.tensor(1.0)})
    second = readback.start({"a": torch.tensor(2.0), "b": torch.tensor(3.0)})
    assert (first.resolve(), second.resolve()) == ({"a": 1.0}, {"a": 2.0, "b": 3.0})


def test_host_numbers_need_no_device():
    """A step that logs floats only waits for nothing."""
    pending = Readback(SimulatedBackend()).start({"a": 1.0})
    assert isinstance(pending, Pending)
    assert pending.is_ready
    assert pending.resolve() == {"a": 1.0}


def test_an_unknown_device_is_a_clear_error():
    """The message names what was found and what to type."""
    for device in ("cuda:99", "nonsense"):
        with pytest.raises(ConfigError, match=f"got '{device}'.*device=auto"):
            select_backend(device)


def test_the_clock_adds_up():
    """Copies and kernels are first in, first out, and a plain loop pays the sum of its parts."""
    backend = SimulatedBackend(launch_us=10, copy_bytes_per_s=4e6)
    for _ in prefetch([torch.zeros(1000)], device=backend):
        backend.launch(1e-3, num_launches=100)  # 1 ms of launches, 1 ms of kernels
    backend.record_compute().synchronize()
    assert backend.now_s() == pytest.approx(2e-3)  # the copy of 1 ms hides behind the launches


def test_a_loop_of_ones_own_reads_every_step_in_order():
    """`ready` gives what has arrived and never waits; `flush` gives the rest; none is lost."""
    backend = SimulatedBackend(launch_us=0)
    reads, value, found = DeferredReads(backend, max_pending=3), torch.zeros(()), []
    for step in range(10):
        value.add_(1)
        backend.launch(1.0)
        reads.put(step, {"value": value})
        if step == 0:
            assert list(reads.ready()) == []  # the device is still at it
        found += reads.ready()
    assert 0 < len(found) < 10
    found += reads.flush()
    assert found == [(step, {"value": step + 1}) for step in range(10)]
    with pytest.raises(ConfigError, match="max_pending must be 1 or more"):
        DeferredReads(backend, max_pending=0)
    with pytest.raises(ConfigError, match=r"loss must be a scalar, got shape \(2,\)"):
        reads.put(0, {"loss": torch.zeros(2)})


def test_prefetch_begins_anew_with_each_epoch():
    """It can be iterated as often as what it wraps, has its length, and may be left early."""
    batches = prefetch([torch.tensor([float(number)]) for number in range(20)], device="cpu", depth=2)
    assert len(batches) == 20
    for batch in batches:
        if batch.item() == 3:
            break
    del batch
    assert [batch.item() for batch in batches] == [batch.item() for batch in batches] == list(range(20))
    with pytest.raises(TypeError, match="do not say how many"):
        len(prefetch(iter([]), device="cpu"))
