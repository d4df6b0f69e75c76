"""The belts on a real accelerator: run with `make test-gpu`; skipped where there is none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from pipeline import DeferredReads, Loader, Trainer, prefetch
from pipeline.concurrency import SlotFile
from pipeline.device import select_backend
from pipeline.device.backend import StreamBackend
from pipeline.testing import InMemoryLogger
from tests.textbook import assert_same_weights, build_model, weights
from tests.workers import Augmented

pytestmark = pytest.mark.gpu


def fit(schedule, **arguments):
    torch.manual_seed(0)
    model = build_model("conv")
    generator = torch.Generator().manual_seed(0)
    dataset = TensorDataset(torch.randn(512, 6, generator=generator), torch.arange(512) % 3)
    trainer = Trainer(
        max_epochs=2, schedule=schedule, device="cuda", run_dir=None, enable_progress_bar=False,
        deterministic=True, **arguments.pop("settings", {}),
    )  # fmt: skip
    result = trainer.fit(
        model, torch.optim.SGD(model.parameters(), 0.1), dataset,
        loss_fn=arguments.pop("loss_fn", F.cross_entropy), batch_size=8, shuffle=True, **arguments,
    )  # fmt: skip
    return result.losses, weights(model)


@pytest.mark.parametrize("depth", [1, 8])
def test_overlap_equals_textbook_on_cuda(depth):
    """Losses and weights are the same bit for bit, with torch's deterministic algorithms."""
    losses, learned = fit("textbook")
    found_losses, found = fit("overlap", settings={"prefetch_depth": depth})
    assert found_losses == losses
    assert_same_weights(found, learned)


def test_the_loop_reads_nothing_from_cuda():
    """With torch's own detector on, no step of overlap waits for the device."""
    calls = []

    def loss_fn(outputs, target):
        calls.append(1)
        if len(calls) == 3:
            torch.cuda.set_sync_debug_mode("error")
        if len(calls) == 60:  # before the end of the epoch, which reads
            torch.cuda.set_sync_debug_mode("default")
        return F.cross_entropy(outputs, target)

    try:
        fit("overlap", loss_fn=loss_fn)
    finally:
        torch.cuda.set_sync_debug_mode("default")


BUDGET = {
    "plain": {},
    "accumulation, clipping and EMA": {
        "accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "ema_decay": 0.9, "val_check_interval": 20,
    },
    "bf16": {"precision": "bf16-mixed"},
    "fp16": {"precision": "16-mixed", "gradient_clip_val": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("feature", BUDGET)
@pytest.mark.parametrize("is_planted", [False, True])
def test_the_sync_budget_is_zero_on_cuda(feature, is_planted):
    """The run's own report names no line, with everything on; a planted `.item()` is named and counted."""

    def loss_fn(outputs, target):
        loss = F.cross_entropy(outputs, target)
        if is_planted:
            loss.item()
        return loss

    model = build_model("conv")
    dataset = TensorDataset(torch.randn(512, 6), torch.arange(512) % 3)
    trainer = Trainer(
        max_epochs=2, schedule="overlap", device="cuda", detect_host_reads=True, **BUDGET[feature]
    )
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    result = trainer.fit(
        model, optimizer, dataset, loss_fn=loss_fn, batch_size=8, val_data=dataset, scheduler=scheduler,
        scheduler_interval="step", loggers=[InMemoryLogger()],
    )  # fmt: skip
    assert [read.file for read in result.outbound.host_reads] == [__file__] * is_planted


def test_batches_of_processes_are_copied_from_where_they_lie(monkeypatch):
    """Their memory is pinned while workers write to it, so they need no slot on the way."""
    copied, pinned_like = [], StreamBackend.pinned_like
    monkeypatch.setattr(
        StreamBackend, "pinned_like", lambda streams, host: copied.append(1) or pinned_like(streams, host)
    )
    expected = [inputs.tolist() for inputs, _ in Loader(Augmented(64), batch_size=4, placement="inline")]
    with Loader(
        Augmented(64), batch_size=4, device="cuda", placement="process", num_workers=2, stall_timeout_s=60
    ) as loader:
        while not loader._inbound.is_ready():
            for _ in loader:
                pass
        for _ in loader:  # finds out how large a slot must be
            pass
        copied.clear()
        loader.epoch = 0
        assert [inputs.tolist() for inputs, _ in loader] == expected
    assert not copied


def test_memory_is_pinned_where_it_lies():
    """Once; a second time fails, leaves the first as it is, and no error behind for the next kernel."""
    streams, slots = select_backend("cuda").streams, SlotFile()
    buffer = slots.lend(slots.acquire(1 << 20))
    host = torch.frombuffer(buffer, dtype=torch.float32)
    try:
        assert not streams.is_pinned(host)
        assert streams.pin(host.data_ptr(), host.nbytes)
        assert streams.is_pinned(host[100:])
        assert not streams.pin(host.data_ptr(), host.nbytes)
        assert torch.ones(3, device="cuda").sum().item() == 3
        assert streams.is_pinned(host)
        streams.unpin(host.data_ptr())
        assert not streams.is_pinned(host)
    finally:
        slots.close()


def test_kept_batches_stay_valid_on_cuda():
    """Batches kept while kernels run and memory is used again hold their values."""
    sent = [{"x": torch.full((1 << 18,), float(value))} for value in range(64)]
    work = torch.randn(1024, 1024, device="cuda")
    kept = []
    for batch in prefetch(sent, device="cuda", depth=4):
        work = (work @ work).tanh()
        kept.append(batch["x"])
    assert [each.mean().item() for each in kept] == [float(value) for value in range(64)]


def test_deferred_reads_are_right_on_cuda():
    """Numbers read later are those of their own step, though the tensor has changed since."""
    reads = DeferredReads("cuda", max_pending=4)
    value = torch.zeros((), device="cuda")
    for step in range(16):
        value.add_(1)
        reads.put(step, {"value": value})
    assert list(reads.flush()) == [(step, {"value": step + 1}) for step in range(16)]


def test_no_device_memory_is_left():
    """After a fit in either schedule the device holds what it held before."""
    for schedule in ("textbook", "overlap", "textbook", "overlap"):
        before = torch.cuda.memory_allocated()
        fit(schedule)
        assert torch.cuda.memory_allocated() - before <= 1 << 16
