"""Metrics as values, of training and validation; rates; torchmetrics as it is; two real ranks."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch.utils.data import DataLoader, TensorDataset

from pipeline import ConfigError, Every, SimulatedBackend, StageError, Trainer
from pipeline.metrics import Mean, MetricSet, accuracy, merge_over_ranks, top_k_accuracy
from pipeline.outbound.rates import Rates, StepDone, memory_in_use
from pipeline.testing import InMemoryLogger
from tests.textbook import build_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["textbook", "overlap"])
def settings(request):
    """Settings of a quiet trainer on the simulated accelerator, for each schedule."""
    return {"schedule": request.param, "device": SimulatedBackend(), "run_dir": None,
            "enable_progress_bar": False}  # fmt: skip


def data(num_samples=20):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_samples, 6, generator=generator)
    return TensorDataset(inputs, (inputs.sum(1) > 0).long() + (inputs[:, 0] > 0).long())


def fit(settings, *, kind="linear", batch_size=8, **arguments):
    torch.manual_seed(0)
    model = build_model(kind)
    own = {name: arguments.pop(name) for name in list(arguments) if name in Trainer.__dataclass_fields__}
    logger = InMemoryLogger()
    result = Trainer(**{**settings, **own}).fit(
        model, torch.optim.SGD(model.parameters(), 0.1), data(), loss_fn=F.cross_entropy,
        batch_size=batch_size, loggers=[logger], **arguments,
    )  # fmt: skip
    steps = [row.values for row in logger.rows if "train/loss" in row.values]
    return steps, result


def by_hand(batch_size=8):
    """Return outputs, targets and gradients' norm of each step of the same run."""
    torch.manual_seed(0)
    model = build_model("linear")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for inputs, target in DataLoader(data(), batch_size):
        outputs = model(inputs)
        F.cross_entropy(outputs, target).backward()
        norm = torch.cat([each.grad.flatten() for each in model.parameters()]).norm().item()
        optimizer.step()
        optimizer.zero_grad()
        yield outputs.detach(), target, norm


def test_means_of_parts_merge_to_the_mean_of_all():
    """In any order and grouping; a value stays what it was when it is merged."""
    parts = [Mean.of(torch.tensor([1.0, 2.0]), 2), Mean.of(5.0, 3), Mean(), Mean.of(torch.tensor([True]), 1)]
    forward = Mean()
    for part in parts:
        forward = forward.merge(part)
    backward = parts[3].merge(parts[2]).merge(parts[1].merge(parts[0]))
    assert forward.compute() == backward.compute() == pytest.approx((1 + 2 + 15 + 1) / 6)
    assert (parts[0].compute(), parts[0].count) == (1.5, 2)
    assert math.isnan(Mean().compute())


def test_top_k_is_right_if_any_of_k_guesses_is():
    """With k=1 it is accuracy; with all classes it is always right."""
    outputs = torch.tensor([[0.1, 0.5, 0.4], [0.9, 0.0, 0.1], [0.2, 0.3, 0.5]])
    target = torch.tensor([2, 1, 2])
    assert top_k_accuracy(outputs, target, k=1).tolist() == accuracy(outputs, target).tolist()
    assert top_k_accuracy(outputs, target, k=2).tolist() == [True, False, True]
    assert top_k_accuracy(outputs, target, k=3).all()


def test_training_metrics_stand_in_every_row(settings):
    """Each step's in its row, the epoch's over all of its samples, as by hand."""
    metrics = {"accuracy": accuracy, "top2": partial(top_k_accuracy, k=2)}
    steps, result = fit(settings, train_metrics=metrics, max_epochs=1)
    rights = [(outputs.argmax(1) == target).float() for outputs, target, _ in by_hand()]
    assert [row["train/accuracy"] for row in steps] == pytest.approx([each.mean().item() for each in rights])
    assert result.metrics["train/epoch_accuracy"] == pytest.approx(torch.cat(rights).mean().item())
    assert all(row["train/top2"] >= row["train/accuracy"] for row in steps)


def test_training_metrics_begin_anew_with_each_epoch(settings):
    """The second epoch's number is over its own samples; accumulation changes nothing about it."""
    _, result = fit(settings, train_metrics={"count": lambda o, t: torch.ones(len(t))}, max_epochs=2,
                    accumulate_grad_batches=2)  # fmt: skip
    assert [row.values["train/epoch_count"] for row in result.history] == [1.0, 1.0]
    _, result = fit(settings, train_metrics={"seen": Counting()}, max_epochs=2)
    assert [row.values["train/epoch_seen"] for row in result.history] == [20.0, 20.0]


class Counting:
    """A metric with a state: how many samples it has seen since the last reset."""

    def __init__(self):
        self.seen = 0

    def reset(self):
        self.seen = 0

    def update(self, outputs, target):
        assert not outputs.requires_grad
        self.seen += len(target)

    def compute(self):
        return self.seen


def test_training_metrics_change_no_loss(settings):
    """Losses with and without them are the same bit for bit."""
    with_them, without = (
        fit(settings, kind="dropout", train_metrics=metrics)[1].losses for metrics in ({"a": accuracy}, None)
    )
    assert with_them == without


@pytest.mark.parametrize("clipping", [{}, {"gradient_clip_val": 1e9}, {"gradient_clip_val": 1e9,
                                      "gradient_clip_algorithm": "value"}])  # fmt: skip
def test_the_gradients_norm_is_logged(settings, clipping):
    """With and without clipping: the norm before it, as by hand."""
    steps, _ = fit(settings, log_grad_norm=True, **clipping)
    assert [row["train/grad_norm"] for row in steps] == pytest.approx([norm for *_, norm in by_hand()])


def test_the_gradients_norm_under_a_scaler_is_unscaled(settings):
    """In float16 the norm is that of the true gradients, clipped by value or not."""
    for clipping in ({}, {"gradient_clip_val": 1e9, "gradient_clip_algorithm": "value"}):
        steps, _ = fit(settings, log_grad_norm=True, precision="16-mixed", **clipping)
        expected = [norm for *_, norm in by_hand()]
        assert [row["train/grad_norm"] for row in steps] == pytest.approx(expected, rel=0.02)


def test_rates_are_of_the_step(settings):
    """Samples and tokens per second are the step's own counts over its own time."""
    steps, _ = fit(settings, count_tokens=lambda batch: batch[0].numel(), accumulate_grad_batches=2)
    assert [row["rate/samples_per_s"] * row["time/step_ms"] / 1e3 for row in steps] == pytest.approx([16, 4])
    assert [row["rate/tokens_per_s"] * row["time/step_ms"] / 1e3 for row in steps] == pytest.approx([96, 24])
    assert steps[0]["memory/host_bytes"] > 1 << 20


def test_utilisation_is_flops_over_the_peak(settings):
    """Of a linear layer: two FLOPs a weight forward, two for the weights' gradient; none for the inputs'."""
    steps, _ = fit(settings, peak_tflops=1e-6)
    for row in steps:
        flops = row["rate/samples_per_s"] * 6 * 3 * 4
        assert row["rate/mfu_ratio"] == pytest.approx(flops / 1e6)
    assert all("rate/mfu_ratio" not in row for row in fit(settings)[0])


def test_rates_survive_a_clock_that_stands_still():
    """No time, no rate."""
    values, rates = {}, Rates(torch.device("cpu"), None, lambda: None)
    rates.add_to(values, StepDone(1, 0, 0, 0, 1.0, 8, 0))
    assert values.keys() == {"time/step_ms", "time/data_wait_ms"}
    rates.add_to(values, StepDone(2, 0, 2 * 10**9, 0, 3.0, 16, 0))
    assert values["rate/samples_per_s"] == 8.0


def test_memory_is_told_now_and_then():
    """In the first row, and then once a second: reading it takes as long as ten rows."""
    rates, found = Rates(torch.device("cpu"), None, lambda: None), []
    for ended_s in (10.0, 10.4, 10.9, 11.0, 11.5):
        values = {}
        rates.add_to(values, StepDone(1, 0, 10**9, 0, ended_s, 1, 0))
        found.append("memory/host_bytes" in values)
    assert found == [True, False, False, True, False]


def test_memory_of_this_process_is_known():
    """More than a megabyte, less than the machine has."""
    found = memory_in_use(torch.device("cpu"))
    assert 1 << 20 < found["memory/host_bytes"] < 1 << 44
    assert "memory/device_bytes" not in found


def torch_metrics():
    arguments = {"task": "multiclass", "num_classes": 3, "validate_args": False}
    return {
        "accuracy": torchmetrics.Accuracy(average="micro", **arguments),
        "each": torchmetrics.Recall(average=None, **arguments),
        "all": torchmetrics.MetricCollection({"f1": torchmetrics.F1Score(**arguments)}),
    }


@pytest.mark.parametrize("part", ["metrics", "train_metrics"])
def test_torchmetrics_are_used_as_they_are(settings, part):
    """One number, a vector and a collection, in training and validation, equal to its own on all samples."""
    arguments = {part: torch_metrics()}
    if part == "metrics":
        arguments["val_data"] = data()
    _, result = fit(settings, **arguments)
    if part == "metrics":
        torch.manual_seed(0)
        model = build_model("linear")
        Trainer(**{**settings, "schedule": "textbook"}).fit(
            model, torch.optim.SGD(model.parameters(), 0.1), data(), loss_fn=F.cross_entropy, batch_size=8
        )
        outputs, target = model(data().tensors[0]), data().tensors[1]
    else:
        outputs, target, _ = zip(*by_hand(), strict=True)
        outputs, target = torch.cat(outputs), torch.cat(target)
    prefix = "val/" if part == "metrics" else "train/epoch_"
    for name, metric in torch_metrics().items():
        expected = metric(outputs, target)
        expected = {"/f1": expected["f1"]} if name == "all" else {"": expected}
        for suffix, value in expected.items():
            names = [f"{prefix}{name}{suffix}"]
            if value.ndim:
                names = [f"{names[0]}/{place}" for place in range(len(value))]
            assert [result.metrics[each] for each in names] == pytest.approx(value.reshape(-1).tolist())


def test_a_metric_of_torchmetrics_that_reads_is_named():
    """A binary metric looks at the values of every batch, a multi-class one does not; the file is named."""
    quiet = {"schedule": "overlap", "device": SimulatedBackend(), "run_dir": None,
             "enable_progress_bar": False, "detect_host_reads": True, "max_steps_in_flight": 99}  # fmt: skip

    class Positive(torchmetrics.classification.BinaryAccuracy):
        def update(self, outputs, target):
            super().update(outputs[:, 0].sigmoid(), (target > 0).long())

    def files_of(metric):
        _, result = fit(quiet, train_metrics={"accuracy": metric}, batch_size=2)
        return {"torchmetrics" in Path(read.file).parts for read in result.outbound.host_reads}

    assert files_of(torchmetrics.Accuracy(task="multiclass", num_classes=3)) == set()
    assert files_of(Positive()) == {True}


def test_a_metric_that_computes_a_table_is_refused():
    """A confusion matrix is no number; the error says what to do."""
    metrics = MetricSet({"table": torchmetrics.ConfusionMatrix(task="multiclass", num_classes=3)})
    metrics.update(torch.eye(3), torch.arange(3), num_samples=3)
    with pytest.raises(StageError, match=r"'table' computed a tensor of shape \(3, 3\)"):
        metrics.compute()


def test_wrong_metrics_of_training_are_refused():
    """What can be neither called nor updated is named; a rate needs a peak above 0."""
    with pytest.raises(ConfigError, match="metrics must be a dict"):
        fit({}, train_metrics={"a": 5})
    with pytest.raises(ConfigError, match=r"peak_tflops must be above 0, got 0"):
        Trainer(peak_tflops=0.0)


def test_one_rank_merges_with_nobody():
    """Without a process group the means are returned as they are."""
    means = {"a": Mean.of(2.0, 3)}
    assert merge_over_ranks(means) == means


RANK = """
import sys, torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from pipeline import Trainer
from pipeline.metrics import accuracy
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
model = torch.nn.Linear(2, 2)
torch.nn.init.eye_(model.weight); torch.nn.init.zeros_(model.bias)
inputs = torch.eye(2).repeat(5, 1)[: 4 if rank == 0 else 6]
target = torch.arange(2).repeat(5)[: len(inputs)] if rank == 0 else torch.zeros(6).long()
trainer = Trainer(schedule="overlap", max_epochs=1, run_dir=sys.argv[3], enable_progress_bar=True)
share = DataLoader(TensorDataset(inputs, target), 2)
result = trainer.fit(model, torch.optim.SGD(model.parameters(), 0.0), share, loss_fn=F.cross_entropy,
                     val_data=share, metrics={"accuracy": accuracy})
print(result.metrics["val/accuracy"], result.metrics["val/loss"], result.run_dir)
torch.distributed.destroy_process_group()
"""


def test_two_ranks_validate_together_and_one_of_them_logs(tmp_path):
    """Validation is over the samples of both; files and the bar are rank zero's alone."""
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store"), str(tmp_path / "run")], cwd=ROOT,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    said = [each.communicate(timeout=100) for each in ranks]
    assert [each.returncode for each in ranks] == [0, 0], said
    first, second = (out.split() for out, _ in said)
    assert float(first[0]) == float(second[0]) == pytest.approx((4 + 3) / 10)
    assert float(first[1]) == float(second[1])
    assert (first[2], second[2]) == (str(tmp_path / "run"), "None")
    assert "val/accuracy 0.7" in said[0][1]
    assert "val/accuracy" not in said[1][1]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_every_comes_when_it_is_due():
    """By steps, by seconds, or whichever is first; late questions do not shift the steps."""
    now = [0.0]
    every = Every(steps=10, clock=lambda: now[0])
    assert [step for step in range(1, 35) if every.is_due(step)] == [10, 20, 30]
    every.reset()
    assert [step for step in (7, 13, 14, 21) if every.is_due(step)] == [13, 21]
    every = Every(seconds=5, clock=lambda: now[0])
    found = []
    for now[0] in (1.0, 4.9, 5.0, 9.0, 10.5):
        found.append(every.is_due(1))
    assert found == [False, False, True, False, True]
    now[0] = 0.0
    both = Every(steps=10, seconds=5, clock=lambda: now[0])
    assert [both.is_due(3), both.is_due(10)] == [False, True]
    now[0] = 6.0
    assert [both.is_due(11), both.is_due(12)] == [True, False]
    assert repr(both) == "Every(steps=10, seconds=5)"


@pytest.mark.parametrize("arguments", [{}, {"steps": 0}, {"seconds": 0.0}])
def test_every_needs_a_period(arguments):
    """None, or one that is not positive, is refused."""
    with pytest.raises(ConfigError, match="Every needs steps"):
        Every(**arguments)
