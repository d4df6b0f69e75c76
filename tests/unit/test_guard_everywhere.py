"""Wherever a NaN arises, and when: what is trained is that of a loop by hand that leaves the update out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from pipeline import Callback, NonFiniteError, SimulatedBackend, Trainer

NUM_STEPS = 5
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own Adagrad


@dataclass(frozen=True)
class Job:
    """A training in which one micro-batch of one step goes wrong."""

    site: str = "loss"
    step: int = 2
    micro: int = 0
    value: float = float("nan")
    accumulate: int = 1
    is_cut_short: bool = False  # the last accumulation
    clip: str = "none"
    logs_norm: bool = False
    has_ema: bool = False
    is_sparse: bool = False
    optimizer: str = "sgd"
    mode: str = "skip"
    device: str = "cpu"
    schedule: str = "auto"
    precision: str = "32-true"

    @property
    def bad_batch(self):
        return self.step * self.accumulate + self.micro % self.accumulate

    @property
    def num_batches(self):
        return NUM_STEPS * self.accumulate - (self.is_cut_short and self.accumulate > 1)

    @property
    def is_possible(self):
        """What torch itself refuses, and what is said not to be looked at, is left out."""
        if self.is_sparse and (self.optimizer not in ("plain", "adagrad", "spoiling") or self.clip != "none"):
            return False
        if self.is_sparse and self.logs_norm:
            return False
        if self.is_cut_short and self.bad_batch >= self.num_batches:
            return False
        return (self.site == "state") == (self.optimizer == "spoiling")


class Backwards(torch.autograd.Function):
    """Passes a value on, and adds to one number of its gradient."""

    @staticmethod
    def forward(ctx, value, added):
        ctx.added = added
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient[(0,) * gradient.ndim] += ctx.added
        return gradient, None


class Spoiled(torch.nn.Module):
    """A model with statistics of all kinds, which goes wrong at one of its calls."""

    def __init__(self, job):
        super().__init__()
        self.embedding = torch.nn.Embedding(7, 4, sparse=job.is_sparse)
        self.norm = torch.nn.BatchNorm1d(4)
        self.linear = torch.nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(4))
        # torch's average cannot follow a buffer that is made later.
        self.register_buffer("largest", torch.zeros(4) if job.has_ema else None)
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64), persistent=False)
        self.job, self.calls = job, 0

    def forward(self, indices):
        job, is_bad = self.job, self.calls == self.job.bad_batch
        self.calls += 1
        hidden = self.embedding(indices)
        if is_bad and job.site == "sparse gradient":
            hidden = Backwards.apply(hidden, job.value)
        weight = self.linear.weight
        if is_bad and job.site == "gradient":
            weight = Backwards.apply(weight, job.value)
        if is_bad and job.site == "input":
            hidden = hidden * job.value
        self.keep(hidden.detach() * job.value if is_bad and job.site == "buffer" else hidden.detach())
        outputs = F.linear(self.norm(hidden), weight, self.linear.bias)
        if is_bad and job.site == "loss":
            outputs = outputs * job.value
        if is_bad and job.site == "loss alone":
            outputs = outputs + torch.full((), job.value)
        return outputs

    def keep(self, hidden):
        self.mean = 0.9 * self.mean + 0.1 * hidden.mean(0)
        self.largest = hidden.amax(0) if self.largest is None else torch.maximum(self.largest, hidden.amax(0))
        self.num_calls += 1


class Spoiling(torch.optim.SGD):
    """An optimizer whose own arithmetic goes wrong in one update."""

    model = None

    def step(self, closure=None):
        super().step(closure)
        job = self.model.job
        if self.model.calls - 1 >= job.bad_batch > self.model.calls - 1 - job.accumulate:
            parameter = self.param_groups[0]["params"][-1]
            self.state[parameter].get("momentum_buffer", parameter.data)[0] = job.value


OPTIMIZERS = {
    "plain": lambda parameters: torch.optim.SGD(parameters, 0.1),
    "sgd": lambda parameters: torch.optim.SGD(
        parameters, 0.1, momentum=0.9, dampening=0.5, weight_decay=0.01
    ),
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.1),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, 0.1, foreach=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, 0.1, fused=True),
    "fused sgd": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, dampening=0.5, fused=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, 0.1, initial_accumulator_value=0.1),
    "rprop": lambda parameters: torch.optim.Rprop(parameters, 0.1),
    "spoiling": lambda parameters: Spoiling(parameters, 0.1),
}


def make(job):
    torch.manual_seed(0)
    model = Spoiled(job)
    optimizer = OPTIMIZERS[job.optimizer](model.parameters())
    if job.optimizer == "spoiling":
        optimizer.param_groups[0]["momentum"] = 0.0 if job.is_sparse else 0.9
        optimizer.model = model
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return model, optimizer, scheduler


def data(job):
    generator = torch.Generator().manual_seed(1)
    shape = (job.num_batches * 3,)
    return torch.randint(0, 7, shape, generator=generator), torch.randint(0, 3, shape, generator=generator)


class KeepsAverage(Callback):
    """Remembers the averaged model."""

    average = None

    def on_fit_finished(self, event):
        self.average = event.state.ema

    def on_fit_failed(self, event):
        self.average = event.state.ema


def by_hand(job, num_steps=NUM_STEPS):
    """Return what a loop has that knows which step is bad, and does not make it."""
    model, optimizer, scheduler = make(job)
    average = make_average(model) if job.has_ema else None
    inputs, target = (each.split(3) for each in data(job))
    for step in range(num_steps):
        if step != job.step:
            batches = range(step * job.accumulate, min((step + 1) * job.accumulate, job.num_batches))
            for batch in batches:
                model.calls = batch if batch != job.bad_batch else -1
                with torch.autocast("cpu", torch.bfloat16, enabled=job.precision == "bf16-mixed"):
                    loss = F.cross_entropy(model(inputs[batch]), target[batch])
                (loss / job.accumulate if job.accumulate > 1 else loss).backward()
            if job.clip == "norm":
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            elif job.clip == "value":
                torch.nn.utils.clip_grad_value_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        else:
            optimizer._opt_called = True
            let_counts_go_on(job, optimizer)
        scheduler.step()
        if average is not None:
            average.update_parameters(model)
    return model, optimizer, average


def let_counts_go_on(job, optimizer):
    """On a device that runs ahead an optimizer's own count of steps on the host does not know of the flag."""
    if job.device == "cpu" or job.optimizer not in ("adam", "foreach", "adagrad", "rprop"):
        return
    for state in optimizer.state.values():
        if job.step > 0:
            state["step"] += 1


def make_average(model):
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)


def by_trainer(job):
    model, optimizer, scheduler = make(job)
    keeper = KeepsAverage()
    trainer = Trainer(
        run_dir=None, enable_progress_bar=False, on_nonfinite=job.mode, schedule=job.schedule,
        precision=job.precision,
        device="cpu" if job.device == "cpu" else SimulatedBackend(), accumulate_grad_batches=job.accumulate,
        gradient_clip_val=None if job.clip == "none" else 0.1, log_grad_norm=job.logs_norm,
        gradient_clip_algorithm="norm" if job.clip == "none" else job.clip,
        ema_decay=0.9 if job.has_ema else None,
    )  # fmt: skip
    error = None
    try:
        trainer.fit(
            model, optimizer, TensorDataset(*data(job)), loss_fn=F.cross_entropy, batch_size=3,
            scheduler=scheduler, scheduler_interval="step", callbacks=[keeper],
        )  # fmt: skip
    except NonFiniteError as caught:
        error = caught
    return model, optimizer, keeper.average, error


def tensors(model, optimizer, average):
    """Return every number that training has made, by name."""
    found = dict(model.named_buffers())
    found |= {f"parameter {name}": each.detach() for name, each in model.named_parameters()}
    for index, state in enumerate(
        optimizer.state[each] for each in model.parameters() if each in optimizer.state
    ):
        found |= {
            f"state {index} {name}": torch.as_tensor(each) for name, each in state.items() if each is not None
        }
    if average is not None:
        found |= {f"average {name}": each for name, each in average.state_dict().items()}
    return found


def assert_all_finite(found):
    for name, each in found.items():
        assert each.isfinite().all(), name


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


jobs = st.builds(
    Job,
    site=st.sampled_from(["loss", "loss alone", "input", "gradient", "sparse gradient", "buffer", "state"]),
    step=st.integers(0, NUM_STEPS - 1),
    micro=st.integers(0, 2),
    value=st.sampled_from([float("nan"), float("inf")]),
    accumulate=st.sampled_from([1, 2, 3]),
    is_cut_short=st.booleans(),
    clip=st.sampled_from(["none", "norm", "value"]),
    logs_norm=st.booleans(),
    has_ema=st.booleans(),
    is_sparse=st.booleans(),
    optimizer=st.sampled_from([*OPTIMIZERS]),
    device=st.sampled_from(["cpu", "simulated"]),
    schedule=st.sampled_from(["auto", "overlap", "textbook"]),
    precision=st.sampled_from(["32-true", "bf16-mixed"]),
)


def is_seen(job):
    """An infinity that is clipped away, or in a buffer, where it may be meant, is nothing to leave out."""
    if job.value == job.value and (job.clip == "value" or job.site == "buffer"):
        return False
    return job.is_possible


@given(jobs.filter(is_seen))
@settings(max_examples=60)
@example(Job(site="state", optimizer="spoiling", step=0, device="simulated"))
@example(Job(site="gradient", optimizer="fused sgd", step=0, device="simulated"))
@example(Job(site="gradient", optimizer="rprop", step=0, device="simulated"))
@example(Job(site="buffer", optimizer="plain", is_sparse=True, has_ema=True, accumulate=3, micro=1))
def test_a_skipped_step_is_as_if_it_had_not_been_made(job):
    """Weights, optimizer state, buffers and averages, bit for bit."""
    model, optimizer, average, error = by_trainer(job)
    assert error is None
    found = tensors(model, optimizer, average)
    assert_all_finite(found)
    assert_same(found, tensors(*by_hand(job)))


@given(jobs.filter(is_seen))
@settings(max_examples=60)
def test_a_run_that_stops_has_changed_nothing_since(job):
    """The first bad step is named; weights, state and buffers are those before it, the average is finite."""
    job = replace(job, mode="stop")
    model, optimizer, average, error = by_trainer(job)
    assert error is not None
    assert error.first_step == job.step
    assert f"The weights are those before step {job.step}." in str(error)
    found = tensors(model, optimizer, average)
    assert_all_finite(found)
    counts = {name for name in found if name.endswith(" step")} if job.device != "cpu" else set()
    expected = tensors(*by_hand(job, job.step)[:2], None)
    assert_same({name: each for name, each in found.items() if name in expected and name not in counts},
                {name: each for name, each in expected.items() if name not in counts})  # fmt: skip


def test_without_the_guard_the_same_jobs_are_spoiled():
    """The tests above can fail."""
    for site in ("loss", "input", "gradient", "buffer"):
        model, optimizer, average, _ = by_trainer(Job(site=site, mode="ignore"))
        with pytest.raises(AssertionError):
            assert_all_finite(tensors(model, optimizer, average))
