"""The small parts: batches, settings, metrics, checkpoints, loggers, seeds, generators."""

from __future__ import annotations

import dataclasses
import io
import json
import random
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline import ConfigError, StageError, Trainer
from pipeline.batch import Row, map_tensors, num_samples
from pipeline.data.collate import collate_samples
from pipeline.data.recycling import RecycledMemory
from pipeline.data.sample_order import BatchPlan
from pipeline.loggers import JsonlLogger, ProgressBar
from pipeline.metrics import Mean, MetricSet, accuracy
from pipeline.randomness.generators import PythonGenerator, TorchGenerator, global_generators
from pipeline.randomness.seeds import sample_seed, shuffle_generator
from pipeline.settings import Settings, setting_names
from pipeline.step.step import clear_gradients


@dataclasses.dataclass
class Open:
    inputs: torch.Tensor
    others: list


@dataclasses.dataclass(frozen=True)
class Frozen:
    inner: Open
    name: str


def test_tensors_are_mapped_at_any_depth():
    """Every tensor is reached, every container keeps its type, the rest is passed on."""
    batch = OrderedDict(a=Frozen(Open(torch.ones(2), [torch.ones(3), "x"]), "n"), b=(None, 3))
    mapped = map_tensors(batch, lambda tensor: tensor * 2)
    assert type(mapped) is OrderedDict
    assert mapped["a"].inner.inputs.tolist() == [2, 2]
    assert mapped["a"].inner.others[0].tolist() == [2, 2, 2]
    assert (mapped["a"].inner.others[1], mapped["a"].name, mapped["b"]) == ("x", "n", (None, 3))
    assert batch["a"].inner.inputs.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (torch.zeros(5, 2), 5),
        ((torch.zeros(4), torch.zeros(9)), 4),
        ({"name": "x", "inputs": torch.zeros(3)}, 3),
        (Frozen(Open(torch.zeros(6), []), "n"), 6),
        ("no tensor", 1),
        (torch.tensor(1.0), 1),
        ([], 1),
    ],
)
def test_samples_are_counted_by_the_first_tensor(batch, count):
    """The first tensor's first dimension is the number of samples."""
    assert num_samples(batch) == count


def test_every_wrong_setting_is_named_at_once():
    """Types first, then ranges; each message has the key, what was found, and what is right."""
    with pytest.raises(ConfigError) as caught:
        Trainer(max_epochs="five", precision="half", prefetch_depth=1.5, enable_progress_bar=1)
    assert caught.value.problems == (
        "max_epochs must be an integer or null (None), got 'five'.",
        "precision must be 32-true, bf16-mixed, 16-mixed, got 'half'.",
        "enable_progress_bar must be true or false, got 1.",
        "prefetch_depth must be an integer, got 1.5.",
    )
    with pytest.raises(ConfigError) as caught:
        Trainer(max_epochs=3, max_steps=7, ema_decay=2.0, num_workers=-1, limit_val_batches=1.5)
    text = str(caught.value)
    assert "num_workers must be 0 or more, got -1" in text
    assert "max_epochs=3 and max_steps=7 contradict" in text
    assert "ema_decay must be between 0 and 1, got 2.0" in text
    assert "limit_val_batches must be a number of batches" in text


def test_a_run_without_limits_is_one_epoch():
    """`Trainer()` is complete as it is."""
    assert Trainer().epoch_limit == 1
    assert Trainer(max_steps=5).epoch_limit is None
    assert setting_names() == [field.name for field in dataclasses.fields(Settings)]


@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1))
def test_a_mean_is_over_samples_not_batches(batches):
    """Batches of different size weigh as many samples as they have."""
    mean, values = Mean(), []
    for size, is_per_sample in batches:
        value = torch.arange(float(size)) + size
        mean = mean.merge(Mean.of(value if is_per_sample else value.mean(), size))
        values += value.tolist()
    assert mean.compute() == pytest.approx(sum(values) / len(values))


def test_counts_are_exact():
    """Right and wrong answers are added up as whole numbers."""
    outputs = torch.eye(4).repeat(10, 1)
    metrics = MetricSet({"accuracy": accuracy})
    for _ in range(3):
        metrics.update(outputs, torch.zeros(40, dtype=torch.long), num_samples=40)
    assert metrics.compute() == {"accuracy": 0.25}


def test_a_metric_with_update_and_compute_is_used_as_it_is():
    """Objects shaped like those of torchmetrics keep their own state, and are reset before use."""

    class Largest:
        def __init__(self):
            self.seen = [99.0]

        def reset(self):
            self.seen = []

        def update(self, outputs, target):
            self.seen.append(outputs.max().item())

        def compute(self):
            return torch.tensor(max(self.seen))

    metrics = MetricSet({"largest": Largest()})
    metrics.update(torch.tensor([1.0, 5.0]), None, num_samples=2)
    assert metrics.compute() == {"largest": 5.0}


def test_a_metric_of_the_wrong_shape_is_refused():
    """More than one dimension cannot be one value per sample."""
    with pytest.raises(StageError, match=r"shape \(2, 3\)"):
        MetricSet({"m": lambda outputs: outputs}).update(torch.zeros(2, 3), num_samples=2)


@given(st.dictionaries(st.text(min_size=1), st.floats() | st.integers(-(2**60), 2**60)))
def test_a_line_of_json_is_what_json_reads(tmp_path_factory, values):
    """Every number comes back exactly; NaN and infinity as null, whatever the names are."""
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    logger = JsonlLogger(path)
    logger.log(Row(3, 1, values))
    logger.close()
    found = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    finite = {name: float(value) if abs(value) < float("inf") else None for name, value in values.items()}
    assert found == {"step": 3, "epoch": 1, **finite}


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_order_cut_into_blocks_is_the_order(shuffle):
    """Whatever the position that is asked for first, a batch's indices are its part of the permutation."""
    plan = BatchPlan(1501, batch_size=2, shuffle=shuffle, drop_last=False, seed=3, epoch=1)
    order = torch.randperm(1501, generator=shuffle_generator(3, 1)) if shuffle else torch.arange(1501)
    for position in [750, *range(751), 255, 256, 255]:
        assert torch.equal(plan.indices(position), order[2 * position : 2 * position + 2])


def test_lines_that_wait_for_their_burst_are_written(tmp_path):
    """A flush makes every row readable, and so does closing, in order and once each."""
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path)
    for step in range(100):
        logger.log(Row(step, 0, {"train/loss": 0.5}))
    logger.flush()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(100))
    logger.log(Row(100, 0, {"train/loss": 0.5}))
    logger.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(101))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_shows_where_a_run_is():
    """A terminal gets a bar with steps, epoch and loss, and above it a line for each validation."""
    stream = Terminal()
    bar = ProgressBar(10, stream)
    for step in range(1, 11):
        bar.log(Row(step, 0, {"train/loss": 0.5}))
    bar.log(Row(10, 0, {"val/loss": 0.25, "val/accuracy": 0.9}))
    bar.close()
    shown = stream.getvalue()
    assert "10/10" in shown
    assert "epoch 0, loss 0.5" in shown
    assert "epoch 0 step 10 val/loss 0.25 val/accuracy 0.9\n" in shown


def test_a_pipe_gets_a_line_for_each_validation():
    """Where there is no terminal, nothing is redrawn."""
    stream = io.StringIO()
    bar = ProgressBar(None, stream)
    bar.log(Row(1, 0, {"train/loss": 0.5}))
    bar.log(Row(1, 0, {"train/epoch_loss": 0.5, "val/loss": 0.25}))
    bar.close()
    assert stream.getvalue() == "epoch 0 step 1 train/epoch_loss 0.5 val/loss 0.25\n"


@given(st.integers(0, 2**63), st.integers(-1, 9), st.integers(0, 2**40))
def test_seeds_differ(seed, epoch, index):
    """Neighbours in any of the three have unrelated seeds of 63 bits."""
    seeds = [
        sample_seed(seed, epoch, index), sample_seed(seed + 1, epoch, index),
        sample_seed(seed, epoch + 1, index), sample_seed(seed, epoch, index + 1),
    ]  # fmt: skip
    assert len(set(seeds)) == 4
    assert all(0 <= each < 2**63 for each in seeds)


@pytest.mark.parametrize("generator", global_generators(), ids=lambda each: each.name)
def test_a_global_generator_is_watched_seeded_and_put_back(generator):
    """A draw moves the fingerprint, nothing else does; a restored generator goes on as before."""
    draw = {"torch": lambda: torch.rand(1).item(), "random": random.random, "numpy.random": np.random.rand}
    draw = draw[generator.name]
    generator.seed(2**62 + 5)
    state, before = generator.state(), generator.fingerprint()
    assert generator.fingerprint() == before
    first = draw()
    assert generator.fingerprint() != before
    generator.restore(state)
    assert draw() == first
    generator.seed(2**62 + 5)
    assert draw() == first


@pytest.mark.parametrize("draw", [
    lambda: torch.randn(1), lambda: torch.randn(1, dtype=torch.float64), lambda: torch.rand(624),
    lambda: torch.randperm(3), lambda: torch.nn.functional.dropout(torch.ones(3)),
    lambda: torch.manual_seed(5), lambda: torch.bernoulli(torch.ones(1) / 2),
])  # fmt: skip
@pytest.mark.parametrize("is_layout_known", [True, False])
def test_every_draw_of_torch_is_seen(draw, is_layout_known, monkeypatch):
    """The second normal number of a pair as well, which moves nothing but what was in store."""
    if not is_layout_known:
        monkeypatch.setattr("pipeline.randomness.generators._looks_at_torch", lambda generator: None)
    generator = TorchGenerator()
    assert (generator._looks is not None) == is_layout_known
    seen = [generator.fingerprint()]
    for _ in range(1 if draw.__code__.co_names[-1] == "manual_seed" else 4):
        draw()
        seen.append(generator.fingerprint())
    assert len(set(seen)) == len(seen)


def test_the_layout_of_pythons_generator_is_checked(monkeypatch):
    """Where the memory does not look as assumed, the public and slower way is taken."""
    monkeypatch.setattr("pipeline.randomness.generators.random._inst", object())
    generator = PythonGenerator()
    assert generator._look is None
    before = generator.fingerprint()
    random.random()
    assert generator.fingerprint() != before


@pytest.mark.parametrize("samples", [
    [(torch.ones(2), 1), (torch.zeros(2), 2)], [(1.5, "a", b"b"), (2.5, "c", b"d")], [(np.ones(2), True)] * 2,
    [((1, torch.ones(1)), {"x": 2})] * 3, [(None, 1)], [(1, 2), (1,)], [(1, 2), iter((1, 2))],
    [(1, 2), [1, 2]],
    [(torch.ones(2),), (torch.ones(3),)], [()], [[1, 2], [3, 4]],
])  # fmt: skip
def test_a_batch_is_that_of_default_collate(samples):
    """In value, type and failure."""
    found = []
    mine = partial(collate_samples, memory=RecycledMemory())
    for collate in (mine, torch.utils.data.default_collate):
        try:
            found.append(repr(collate(list(samples))))
        except Exception as error:
            found.append(repr(error))
    assert found[0] == found[1]


class OwnZeroGrad(torch.optim.SGD):
    """An optimizer that clears gradients in a way of its own."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.num_cleared = getattr(self, "num_cleared", 0) + 1
        super().zero_grad(set_to_none)


@pytest.mark.parametrize("is_patched", [False, True])
def test_an_optimizers_own_zero_grad_is_called(is_patched):
    """Of its class, or put on the object after it was made; torch's own is only imitated."""
    model = torch.nn.Linear(2, 1)
    kind = torch.optim.SGD if is_patched else OwnZeroGrad
    optimizer, calls = kind(model.parameters(), 0.1), []
    model(torch.ones(1, 2)).sum().backward()
    if is_patched:
        optimizer.zero_grad = lambda: calls.append("patched")
    clear_gradients(optimizer)
    assert calls == ["patched"] * is_patched
    assert getattr(optimizer, "num_cleared", 0) == (not is_patched)
    del optimizer.__dict__["zero_grad" if is_patched else "num_cleared"]
    clear_gradients(optimizer)
    assert all(each.grad is None for each in model.parameters())
