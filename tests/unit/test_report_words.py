"""The words of the report, the warnings and the errors, for jobs of which the truth is known."""

from __future__ import annotations

import io
import random
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from pipeline import Callback, ConfigError, NonFiniteError, Trainer
from pipeline.batch import Row
from pipeline.checks import Limits
from pipeline.checks.limits import in_the_loop, in_turn
from pipeline.data import as_source
from pipeline.device import select_backend
from pipeline.errors import counted
from pipeline.every import Every
from pipeline.gil.cheap_signals import StageTime
from pipeline.inbound.decide_placement import INLINE, TEXTBOOK, Job, Place, why_settled
from pipeline.loggers import ProgressBar
from pipeline.loggers.group import LoggerTime
from pipeline.loop.findings import finding_of
from pipeline.loop.schedule import Belts
from pipeline.protocols import RunInfo
from pipeline.report.ceilings import StepCost
from pipeline.report.outbound_report import OutboundReport
from pipeline.report.placement_report import PlacementReport, plain_ms
from pipeline.report.possible import ONE_CORE, PLACES, Possible, places_of
from pipeline.report.record import RunReport
from pipeline.report.verdict import describe, lift
from pipeline.settings import Settings
from pipeline.watch.convoy import Convoy

PROCESS = "placement='process'"
BATCHES = {"batch_size": None, "collate_fn": None}


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def fit(step=loss_of, data=None, batch_size=8, callbacks=(), model=None, **settings):
    model = torch.nn.Linear(8, 3) if model is None else model
    if data is None:
        data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randint(0, 3, (64,)))
    trainer = Trainer(**{"run_dir": None, "enable_progress_bar": False} | settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return trainer.fit(model, optimizer, data, step=step, batch_size=batch_size, callbacks=list(callbacks))


# ---- numbers


@pytest.mark.parametrize(
    ("ms", "text"),
    [(1034.4, "1,034"), (999.7, "1,000"), (99.96, "100"), (36.0, "36"), (22.14, "22.1"), (0.1234, "0.123"),
     (0.00001, "0")],
)  # fmt: skip
def test_a_time_is_a_plain_number(ms, text):
    """Whatever its size: no exponent."""
    assert plain_ms(ms) == text
    assert f"{text} ms" in str(PlacementReport("inline", "", tried_ms={"textbook": ms}))


def test_one_of_a_thing_is_no_plural():
    """And thousands are set apart."""
    assert [counted(count, "step") for count in (0, 1, 2000)] == ["0 steps", "1 step", "2,000 steps"]
    assert counted(2, "batch", "batches") == "2 batches"


def test_what_was_tried_is_a_time_from_batch_to_batch():
    """It is no time of a step, of which several batches may be parts."""
    assert "from batch to batch: textbook 36 ms" in str(PlacementReport("x", "", tried_ms={"textbook": 36.0}))


# ---- short runs


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_of_a_few_steps_claims_nothing(num_steps, accumulate):
    """Nothing was settled: no verdict, no ceiling, no prediction; what is said adds up."""
    report = fit(max_steps=num_steps, accumulate_grad_batches=accumulate).report
    assert report.verdict == "none yet: the run ended before auto had settled where batches are made"
    assert (report.ceiling, report.ceilings, report.predictions) == ("", (), ())
    loop = {line.stage: line.step_ms for line in report.stages if line.thread == "loop"}
    assert sum(loop.values()) == pytest.approx(report.step_ms)
    assert loop["data_wait"] == pytest.approx(report.data_wait_ms)
    text = str(report)
    assert text.startswith(f"{counted(num_steps, 'step')} in ")
    assert "batches  made in textbook: not settled: the first batches are timed" in text
    assert "a longer run" in report.advice


def test_a_place_that_was_named_has_a_verdict_at_once():
    """There is nothing to settle."""
    assert "none yet" not in fit(max_steps=3, schedule="overlap").report.verdict
    assert "none yet" not in fit(max_steps=3, schedule="textbook").report.verdict


# ---- why batches are made where they are


JOB = Job(fetch_ms=1000.0, fetch_core_ms=1000.0, step_ms=1034.4, num_cores=2)
ALONE = {TEXTBOOK: 2034.4}
IN_TURN = Limits(1, False, "dataset.file can only be read in turn, by one thread", "type this")


@pytest.mark.parametrize(
    ("tried", "limits", "words", "not_words"),
    [
        (ALONE, Limits(), "1,000 of 2,034 ms: no other place that can be used promises", "% faster"),
        (ALONE | {INLINE: 2100.0}, Limits(), "no other place was more than 3% faster", "promises"),
        (ALONE | {INLINE: 1050.0}, Limits(), "48% less time", "no other place"),
        (ALONE, IN_TURN, "to read it ahead would take", "no other place"),
        (ALONE, IN_TURN, "type this", "no other place"),
        (ALONE | {INLINE: 1300.0}, IN_TURN, "36% less time than the textbook loop", "to read it ahead"),
        (ALONE | {Place("process", 2): 1300.0}, IN_TURN, "in turn, by one thread", "to read it ahead"),
    ],
)
def test_the_reason_of_a_place_is_what_was_measured(tried, limits, words, not_words):
    """What was not tried was not slower, and what is read ahead would not win by being read ahead."""
    found = why_settled(JOB, tried, limits)
    assert words in found
    assert not_words not in found
    assert "e+" not in found


# ---- advice that can be followed


@pytest.mark.parametrize("where", ["textbook", "inline", "thread"])
def test_one_core_is_not_sent_more_workers(where):
    """Nothing is made beside the loop there, but what waits."""
    places, obstacles = places_of("map", obstacle=ONE_CORE)
    known = Possible("map", places, obstacles, has_free_cores=False)
    for name in ("belt", "gil"):
        found = lift(name, where, known)
        assert PROCESS not in found
        assert "more workers lift" not in found
    assert "waits" in lift("belt", where, known)


def test_the_report_of_one_core_advises_no_process(monkeypatch):
    """Whatever the job."""
    monkeypatch.setattr("pipeline.loop.reporting.available_cores", lambda: 1)
    report = fit(schedule="overlap", max_steps=8).report
    assert PROCESS not in str(report)
    assert "process" not in {each.where for each in report.predictions}


def test_a_dataloader_has_workers_for_its_cores():
    """More of them help only where they wait."""
    assert "or a higher num_workers" in lift("belt", "inline", Possible("workers"))
    busy = lift("belt", "inline", Possible("workers", has_free_cores=False))
    assert "a higher num_workers (only where" in busy


@pytest.mark.parametrize("name", ["serial", "belt"])
@pytest.mark.parametrize("where", ["textbook", "inline", "thread"])
def test_what_auto_has_tried_is_not_advised(name, where):
    """It has found nothing faster."""
    found = lift(name, where, Possible(has_tried=True))
    assert "overlap" not in found
    assert "more workers" not in found
    assert "less work a sample" in found


def test_workers_are_set_where_they_count():
    """`num_workers` alone does nothing with placement='auto'."""
    assert "placement='thread' with a higher num_workers" in lift("belt", "thread", Possible())


def test_what_is_read_in_turn_may_be_read_by_one_thread():
    """If it is an iterable; a batch of a dataset may have to be made again."""
    limits = in_turn("dataset.count changes as batches are made")
    assert places_of("iterable", limits=limits)[0] == {"textbook", "inline"}
    assert places_of("map", limits=limits)[0] == {"textbook"}
    assert places_of("map", limits=in_the_loop("it calls the model"))[0] == {"textbook"}
    assert places_of("map")[0] == PLACES


@pytest.mark.parametrize(
    ("kind", "makers"), [("map", "worker processes"), ("workers", "the DataLoader's workers")]
)
def test_what_processes_hide_is_hidden(kind, makers):
    """A loop that does not wait for them has not nothing to load."""
    cost = StepCost(loop_ms=10, fetch_ms=0.1, fetch_core_ms=0.1, is_remote=True)
    assert f"loading is hidden: {makers} make" in describe(10.1, 0.1, cost, "process", None, Possible(kind))


@pytest.mark.parametrize("data", [[torch.zeros(2)], (torch.zeros(2) for _ in range(3))])
def test_the_convoy_advises_no_process_for_what_one_thread_reads(data):
    """The reason is told in its place."""
    belts = Belts(Settings(placement="inline"), select_backend("cpu"), None)
    belts.inbound(as_source(data, name="train_data", seed=0, **BATCHES), is_training=True)
    assert "read by one thread" in belts.why_no_process()
    belts.close()


def test_a_short_run_blames_no_logger():
    """What a logger takes at first is no tenth of a run."""
    busy = LoggerTime("ProgressBar", 3, 0.01, 0.01)
    assert OutboundReport(0.02, (busy,), {}, 1, 0.07, 1, 0.01, None).gil_bound_loggers == ()
    text = str(OutboundReport(0.02, (replace(busy, cpu_s=0.5),), {}, 1, 0.07, 1, 0.01, None))
    assert "at most 1 step and 70 ms behind, 1 row dropped" in text
    assert "enable_progress_bar=False" in text
    assert "InProcess" not in text


# ---- what a run was spent on


def run_of(times, train_s, writer_cpu_s=None, **settings):
    """Return a run that is over, as far as findings look at it."""
    spent = [StageTime("loop", *each, 0.0) for each in times]
    return SimpleNamespace(
        clock=SimpleNamespace(train_s=train_s, times=lambda: spent),
        settings=Settings(**settings),
        outbound=SimpleNamespace(writer_cpu_s=writer_cpu_s),
        gil=SimpleNamespace(convoy=None, report=None),
    )


SETTLED, TRYING = PlacementReport("textbook", ""), PlacementReport("inline", "", is_settled=False)


def test_a_run_that_saves_most_of_the_time_is_told_so():
    """With what to set; beside the loop where it was not."""
    times = [("forward", 1.0), ("checkpoint", 9.0)]
    found = finding_of(run_of(times, 1.0, checkpoint_every_n_steps=2), SETTLED)
    assert "saving takes 90% of the run" in found.verdict
    assert "checkpoint_every_n_steps: more than 2" in found.advice
    assert "schedule='overlap'" in found.advice
    assert "schedule" not in finding_of(run_of(times, 1.0, 0.5), SETTLED).advice
    assert finding_of(run_of([("checkpoint", 0.5)], 1.0), SETTLED) is None
    assert finding_of(run_of([("checkpoint", 9.0)], 100.0), SETTLED) is None
    assert "none yet" in finding_of(run_of([], 1.0), TRYING).verdict


def test_what_is_in_no_step_stands_below_the_steps():
    """In the table, with its seconds."""
    facts = {"num_steps": 1, "train_s": 0.5, "device": "cpu", "checkpoint_s": 9.0}
    assert "besides  checkpoints 9.00 s\n" in str(RunReport(facts, {}, {}, 500.0, 0.0, 16.0))
    assert "besides" not in str(RunReport(facts | {"checkpoint_s": 0.0}, {}, {}, 500.0, 0.0, 16.0))


@pytest.mark.parametrize(
    ("place", "is_said"), [("thread × 2", True), ("textbook", False), ("process × 2", False)]
)
def test_a_convoy_of_a_place_that_was_left_is_no_verdict(place, is_said):
    """Its thread holds the GIL no more; one of the user's does."""
    run = run_of([], 1.0)
    run.gil.convoy = Convoy("the loop waits", "prefetch/1/fetch", "what to do")
    assert (finding_of(run, PlacementReport(place, "")) is not None) == is_said
    run.gil.convoy = Convoy("the loop waits", "my thread", "what to do")
    assert finding_of(run, PlacementReport(place, "")).verdict.startswith("the loop waits")


class UntilWarned(Callback):
    """Ends the run once something was warned of."""

    def __init__(self, caught):
        self.caught = caught

    def on_step_finished(self, event):
        if len(self.caught):
            event.stop("warned")


def test_a_thread_of_the_users_that_holds_the_gil_is_named(monkeypatch):
    """By the warning and by the verdict, which does not speak of loading then."""
    monkeypatch.setattr("pipeline.watch.gil_watch.LOG_NS", 0)
    is_over = threading.Event()

    def tokenize():
        while not is_over.is_set():
            sum(range(1000))

    thread = threading.Thread(target=tokenize, name="my tokenizer")
    thread.start()
    try:
        with pytest.warns(UserWarning, match="'my tokenizer' holds it") as caught:
            report = fit(gil="account", max_epochs=10**6, callbacks=[UntilWarned(caught)]).report
    finally:
        is_over.set()
        thread.join()
    assert "the loop waits for the GIL" in report.verdict
    assert "'my tokenizer' holds it" in report.verdict
    assert "Move that thread's work to a process" in report.advice


# ---- NaN


@pytest.mark.parametrize("bad_step", [0, 3])
def test_a_nan_of_the_first_step_is_not_laid_to_the_learning_rate(bad_step):
    """No update had been made that it could come from."""
    count = iter(range(100))

    def step(model, batch):
        return loss_of(model, batch) * (float("nan") if next(count) == bad_step else 1.0)

    with pytest.raises(NonFiniteError) as caught:
        fit(step, max_steps=8)
    assert ("Lower the learning rate" in str(caught.value)) == bool(bad_step)
    assert ("No update had been made by then" in str(caught.value)) != bool(bad_step)


# ---- settings and the bar


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shuffle": True}, "It is an argument of fit: trainer.fit(…, shuffle=…)."),
        ({"step": 1}, "It is an argument of fit: trainer.fit(…, step=…)."),
        ({"forward": 1}, "It is an argument of predict: trainer.predict(…, forward=…)."),
        ({"batchsize": 8}, "batchsize is not a setting. Did you mean batch_size, an argument of fit?"),
        ({"max_epoch": 8}, "max_epoch is not a setting. Did you mean max_epochs?"),
        ({"placement": "threads"}, "got 'threads'. Did you mean thread?"),
        ({"schedule": "Overlap"}, "got 'Overlap'. Did you mean overlap?"),
        ({"gil": 3}, "got 3."),
    ],
)
def test_what_was_meant_is_told(settings, words):
    """A misspelled choice, and an argument of a method that was given as a setting."""
    with pytest.raises(ConfigError) as caught:
        Trainer(**settings)
    assert str(caught.value).endswith(words)


def test_the_time_left_of_a_resumed_run_is_worked_out_from_its_own_steps(monkeypatch):
    """Those that were made before took no time of this run's."""
    now_s = [0.0]
    monkeypatch.setattr("pipeline.loggers.drawing.time.monotonic", lambda: now_s[0])
    bar = ProgressBar(100, stream := io.StringIO(), Every(steps=1))
    bar.open(RunInfo(None, {}, 90))
    now_s[0] = 10.0
    bar.log(Row(91, 0, {"train/loss": 0.5}))
    bar.close()
    assert "step 91/100, 0:10 and 1:30 to go" in stream.getvalue()


# ---- what is made ahead


class Draws(torch.utils.data.Dataset):
    """Draws from a generator that threads share."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.full((8,), random.random()), index % 3


class Streamed(torch.utils.data.IterableDataset):
    """The same, read by one thread."""

    def __iter__(self):
        return map(Draws().__getitem__, range(64))


@pytest.mark.parametrize("data", [Draws(), Streamed()])
def test_processes_are_advised_for_draws_that_can_be_taken_there(data):
    """Both kinds of dataset can."""
    with pytest.warns(UserWarning, match="drawn from") as caught:
        fit(data=data, placement="inline", max_steps=8)
    assert "or set placement=process" in str(caught[0].message)


def test_no_process_is_advised_for_draws_of_batches_in_a_row():
    """Nobody can share in them."""
    batches = torch.utils.data.DataLoader(Streamed(), batch_size=8)
    with pytest.warns(UserWarning, match="drawn from") as caught:
        fit(data=batches, batch_size=None, placement="inline", max_steps=8)
    assert "placement=process" not in str(caught[0].message)
