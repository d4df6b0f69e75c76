"""The gain measured in a run: it does not touch the numbers, and says what was."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pipeline import ConfigError, SimulatedBackend, Trainer
from pipeline.checkpoint import load_model
from pipeline.inbound.decide_placement import Place
from pipeline.inbound.fixed import Pinned
from pipeline.loop import gain
from pipeline.loop.gain import GainMeter, ratio_interval
from pipeline.outbound.rates import StepDone
from pipeline.settings import Settings
from pipeline.testing import InMemoryLogger


class Augmented(torch.utils.data.Dataset):
    """Draws from torch's generator for each sample."""

    def __len__(self):
        return 320

    def __getitem__(self, index):
        return torch.full((8,), index / 320) + 0.1 * torch.randn(8), index % 3


@pytest.fixture
def short_windows(monkeypatch):
    """Make windows of a few steps, so that a short run changes its schedule some twenty times."""
    monkeypatch.setattr(gain, "WINDOW_NS", 0)
    monkeypatch.setattr("pipeline.inbound.auto.LOOK_S", 0)
    monkeypatch.setattr("pipeline.inbound.auto.TRIAL_S", 0)
    monkeypatch.setattr(gain, "MIN_STEPS", 3)
    monkeypatch.setattr(gain, "GAP_S", 10.0)  # a busy machine's pause is no validation


def fit(data=None, **settings):
    """Train a model with dropout for four epochs; return the result and its weights."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 3))
    arguments = {"loggers": settings.pop("loggers", ())}
    if data is None:
        data, arguments = Augmented(), arguments | {"batch_size": 4, "shuffle": True}
    base = {"max_epochs": 4, "run_dir": None, "enable_progress_bar": False, "prefetch_depth": 2}
    trainer = Trainer(**base | {"max_steps_in_flight": 1} | settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = trainer.fit(model, optimizer, data, loss_fn=F.cross_entropy, **arguments)
    return result, [each.detach().clone() for each in model.parameters()]


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "overlap"},
        {"schedule": "auto", "max_epochs": 16},
        {"schedule": "overlap", "placement": "thread", "num_workers": 2},
        {"schedule": "overlap", "placement": "process", "num_workers": 1, "max_epochs": 16},
        {"schedule": "overlap", "accumulate_grad_batches": 3},
        {"schedule": "overlap", "device": "simulated"},
    ],
)
def test_measuring_does_not_touch_the_numbers(short_windows, settings):
    """Losses and weights are those of the textbook loop, bit for bit, over many changes of schedule."""
    is_simulated = settings.get("device") == "simulated"
    plain, weights = fit(**{**settings, "schedule": "textbook", "placement": "auto", "device": "cpu"})
    if is_simulated:
        settings = {**settings, "device": SimulatedBackend()}
    measured, measured_weights = fit(**settings, measure_gain=True)
    assert measured.losses == plain.losses
    assert all(map(torch.equal, weights, measured_weights))
    # Those two may wait for worker processes until the run is over.
    if settings.get("placement") != "process" and settings["schedule"] != "auto":
        assert measured.report.gain.num_windows >= gain.MIN_PAIRS


def test_a_loader_of_ones_own_gives_the_same_numbers(short_windows):
    """One that can only be read in order, and draws its order from the global generator."""

    def loader():
        return torch.utils.data.DataLoader(Augmented(), batch_size=4, shuffle=True)  # fmt: skip

    def plain_iterable():
        return list(loader())

    for make in (loader, plain_iterable):
        torch.manual_seed(1)
        plain, weights = fit(make(), schedule="textbook")
        torch.manual_seed(1)
        measured, measured_weights = fit(make(), schedule="overlap", measure_gain=True)
        assert measured.losses == plain.losses
        assert all(map(torch.equal, weights, measured_weights))
        assert measured.report.gain is not None


def test_every_step_is_logged_once_and_in_order(short_windows):
    """By two threads in turn."""
    logger = InMemoryLogger()
    result, _ = fit(schedule="overlap", measure_gain=True, loggers=[logger])
    steps = [row.step for row in logger.rows if "train/loss" in row.values]
    assert steps == list(range(1, 321))
    assert [row.values["train/loss"] for row in logger.rows if "train/loss" in row.values] == list(
        result.losses
    )


def test_checkpoints_are_those_of_a_run_without_it(short_windows):
    """Written by two threads in turn, with a validation between the epochs."""

    def final(name, **settings):
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 3)
        trainer = Trainer(max_epochs=8, run_dir=name, enable_progress_bar=False, prefetch_depth=2,
                          max_steps_in_flight=1, val_check_interval=50, **settings)  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        result = trainer.fit(model, optimizer, Augmented(), loss_fn=F.cross_entropy, batch_size=4,
                             val_data=Augmented())  # fmt: skip
        saved = torch.nn.Linear(8, 3)
        load_model(result.last_checkpoint, saved)
        return result, saved.state_dict()

    plain, weights = final("plain", schedule="textbook")
    measured, measured_weights = final("measured", schedule="overlap", measure_gain=True)
    assert measured.report.gain is not None
    assert measured.metrics["val/loss"] == plain.metrics["val/loss"]
    assert all(torch.equal(weights[name], measured_weights[name]) for name in weights)


def test_a_lost_batch_would_be_noticed(short_windows, monkeypatch):
    """The check can fail: one batch left out behind each textbook window gives other losses."""

    def choose(self, reader):
        reader.position += self.kind == "textbook"
        return choose_well(self, reader)

    choose_well = GainMeter.choose
    plain, _ = fit(schedule="textbook")
    monkeypatch.setattr(GainMeter, "choose", choose)
    measured, _ = fit(schedule="overlap", measure_gain=True)
    assert measured.losses[:100] != plain.losses[:100]


def test_a_run_that_is_too_short_has_no_gain():
    """And says why."""
    result, _ = fit(schedule="overlap", measure_gain=True, max_epochs=1)
    assert result.report.gain is None
    assert any("too short to tell" in note for note in result.report.notes)


def test_textbook_alone_cannot_be_compared():
    """With what to type."""
    with pytest.raises(ConfigError, match="measure_gain=true compares textbook with overlap"):
        Trainer(schedule="textbook", measure_gain=True)


# ---- the meter, with times fed


class Belt:
    """An inbound belt as the meter sees it."""

    def __init__(self):
        self.chooser = Pinned(Place("inline"))

    def is_ready(self):
        return True


class Fed:
    """A loop whose steps take as long as a test says, in either schedule."""

    def __init__(self, textbook_ms, overlap_ms, drained_ms, depth=4):
        settings = Settings(prefetch_depth=depth, max_steps_in_flight=1)
        self.meter = GainMeter(settings)
        self.meter.measure(Belt())
        self.times = {"textbook": textbook_ms, "overlap": overlap_ms, "drained": drained_ms}
        self.depth, self.now_s, self.step = depth, 0.0, 0
        self.kinds = []

    def run(self, num_windows):
        """Run so many windows; each one of overlap ends with the batches that its belt has left."""
        for _ in range(num_windows):
            place = self.meter.choose(None)
            self.kinds.append(place.name)
            while self.meter.goes_on() and self.step < 100_000:
                self.make_step("textbook" if place.name == "textbook" else "overlap")
            if place.name != "textbook":
                for _ in range(self.depth):
                    self.make_step("drained")
        return self.meter.gain()

    def make_step(self, kind):
        self.step += 1
        step_ms = self.times[kind](self.step)
        self.now_s += step_ms / 1e3
        wait_ms = 0.5 * step_ms if kind == "textbook" else 0.0
        self.meter.step_done(StepDone(self.step, 0, int(step_ms * 1e6), int(wait_ms * 1e6), self.now_s, 4, 0))


def constant(step_ms):
    return lambda step: step_ms


def noisy(step_ms):
    draw = random.Random(0)
    return lambda step: step_ms * draw.uniform(0.8, 1.2)


def test_the_gain_is_what_was_fed():
    """20 ms against 12, with 10 to be had: 1.67 times, 80 % of what there is to win."""
    found = Fed(constant(20), constant(12), constant(10)).run(60)
    assert found.ratio == pytest.approx(20 / 12)
    assert found.low == pytest.approx(found.ratio)
    assert found.headspace_ms == pytest.approx(10)
    assert found.won_ratio == pytest.approx(0.8)
    assert found.num_windows == gain.MAX_PAIRS


def test_where_there_is_nothing_to_gain_the_interval_holds_one():
    """Both take the same, but for noise."""
    found = Fed(noisy(20), noisy(20), noisy(20)).run(60)
    assert found.low < 1.0 < found.high
    assert found.ratio == pytest.approx(1.0, abs=0.05)


def test_both_schedules_take_turns_in_random_order():
    """Of each pair of windows either comes first, now and then, by the seed."""
    fed = Fed(constant(20), constant(12), constant(10))
    fed.run(41)
    pairs = [tuple(fed.kinds[number : number + 2]) for number in range(1, 41, 2)]
    assert set(pairs) == {("textbook", "inline"), ("inline", "textbook")}


def test_after_the_last_window_the_faster_one_goes_on():
    """A loss ends in textbook, a gain in overlap, for the rest of the run."""
    losing = Fed(constant(12), constant(20), constant(10))
    losing.run(41)
    assert losing.meter.choose(None).name == "textbook"
    assert losing.meter.gain().high < 1
    winning = Fed(constant(20), constant(12), constant(10))
    winning.run(41)
    assert winning.meter.choose(None).name == "inline"
    assert winning.meter.goes_on()


def test_the_warm_up_of_a_window_does_not_count():
    """The first steps of each, in which caches and belts fill, are slow here, and are left out."""
    fed = Fed(constant(20), constant(12), constant(10))
    slow = dict.fromkeys(range(100000), 0)

    def slow_at_first(kind, step_ms, warm):
        def of(step):
            seen = len(fed.meter._now.steps) if fed.meter._now else warm
            slow[step] = 1
            return step_ms * (10 if seen < warm else 1)

        return of

    fed.times["textbook"] = slow_at_first("textbook", 20, gain.WARM_TEXTBOOK_STEPS)
    fed.times["overlap"] = slow_at_first("overlap", 12, 4)
    assert fed.run(60).ratio == pytest.approx(20 / 12)


def test_a_window_that_its_epoch_ends_is_begun_anew():
    """Its steps do not count."""
    fed = Fed(constant(20), constant(12), constant(10))
    fed.run(1)
    fed.meter.choose(None)
    for _ in range(5):
        fed.make_step("overlap")
    kind = fed.meter.kind
    fed.meter.choose(None)  # the next epoch
    assert fed.meter.kind == kind
    assert fed.meter._now.steps == []


def test_a_pause_begins_the_window_anew():
    """A validation between two steps: the belt was filled meanwhile."""
    fed = Fed(constant(20), constant(12), constant(10))
    fed.run(1)
    fed.meter.choose(None)
    for _ in range(5):
        fed.make_step("overlap")
    fed.now_s += 1.0
    fed.make_step("overlap")
    assert len(fed.meter._now.steps) == 1


def test_the_interval_is_students():
    """Of the logarithms of three ratios, by hand."""
    middle, low, high = ratio_interval([2.0, 2.2, 1.8], [1.0, 1.0, 1.0])
    logs = [math.log(each) for each in (2.0, 2.2, 1.8)]
    mean = sum(logs) / 3
    spread = math.sqrt(sum((each - mean) ** 2 for each in logs) / 2)
    assert middle == pytest.approx(math.exp(mean))
    assert math.log(high / low) == pytest.approx(2 * 4.303 * spread / math.sqrt(3))


def test_a_gain_goes_into_the_report(short_windows):
    """With a verdict that says it was measured, and the step without the textbook windows."""
    result, _ = fit(schedule="overlap", measure_gain=True)
    report = result.report
    assert "measured in this run" in report.verdict
    assert report.step_ms == report.gain.overlap_ms
    assert replace(report.gain).steps_per_window >= 3
