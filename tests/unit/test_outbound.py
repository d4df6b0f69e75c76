"""The outbound belt: no step lost or doubled, whatever the loggers do, and what they cost is told by name."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from pipeline import ConfigError, Row, SimulatedBackend, Trainer
from pipeline.concurrency import Scope, Writer
from pipeline.errors import NonFiniteError
from pipeline.loggers import LoggerGroup, LoggerTime
from pipeline.outbound.belt import DirectOutbound
from pipeline.outbound.rates import StepDone
from pipeline.protocols import RunInfo
from pipeline.report import OutboundReport
from pipeline.testing import Gate, InMemoryLogger
from tests.textbook import build_model


class UserError(Exception):
    """What only the user's own code raises."""


def fit(*, num_steps=24, loggers=(), loss_fn=F.cross_entropy, val_data=None, callbacks=(), **settings):
    torch.manual_seed(0)
    model = build_model("linear")
    inputs = torch.randn(num_steps * 2, 6)
    data = TensorDataset(inputs, torch.arange(len(inputs)) % 3)
    trainer = Trainer(**{
        "schedule": "overlap", "device": SimulatedBackend(), "run_dir": None, "enable_progress_bar": False,
        **settings,
    })  # fmt: skip
    return trainer.fit(
        model, torch.optim.SGD(model.parameters(), 0.01), data,
        loss_fn=loss_fn, batch_size=2, loggers=list(loggers), val_data=val_data, callbacks=list(callbacks),
    )  # fmt: skip


def steps_of(logger):
    return [row.step for row in logger.rows if "train/loss" in row.values]


@given(
    st.fixed_dictionaries({
        "num_steps": st.integers(1, 80),
        "log_every_n_steps": st.integers(1, 5),
        "max_log_lag": st.integers(1, 40),
        "log_overflow": st.sampled_from(["wait", "grow"]),
        "max_steps_in_flight": st.integers(1, 9),
        "max_epochs": st.integers(1, 3),
        "val_check_interval": st.none() | st.integers(1, 20),
    })
)  # fmt: skip
def test_no_step_is_lost_or_doubled(settings):
    """Each step's row comes once, in order, with its own loss, at any lag and with validations between."""
    logger = InMemoryLogger()
    settings["val_data"] = TensorDataset(torch.randn(4, 6), torch.zeros(4).long())
    result = fit(loggers=[logger], **settings)
    every_n, count = settings["log_every_n_steps"], settings["num_steps"] * settings["max_epochs"]
    assert len(result.losses) == count
    assert steps_of(logger) == list(range(every_n, count + 1, every_n))
    rows = [row for row in logger.rows if "train/loss" in row.values]
    assert [row.values["train/loss"] for row in rows] == result.losses.tolist()[every_n - 1 :: every_n]
    assert result.outbound.num_dropped == 0


class Fumbling(SimulatedBackend):
    """A planted fault: the copy of one step's numbers is never delivered, or is delivered elsewhere."""

    def __init__(self):
        super().__init__()
        self.copies = 0

    def copy_out(self, source, pinned):
        self.copies += 1
        super().copy_out(source if self.copies != 7 else source * 0, pinned)


def test_a_lost_number_is_noticed():
    """The comparison can fail: one step whose copy went wrong changes the losses."""
    assert fit(device=Fumbling()).losses != fit().losses


class Leap(Writer):
    """A planted fault: the writer hands every fifth item over twice and leaves out every seventh."""

    def put(self, item):
        self.count = getattr(self, "count", 0) + 1
        for _ in range(2 if self.count % 5 == 0 else 0 if self.count % 7 == 0 else 1):
            super().put(item)


def test_a_lost_or_doubled_step_is_noticed(monkeypatch):
    """The check of the rows can fail: a writer that drops and doubles gives other steps."""
    monkeypatch.setattr("pipeline.outbound.belt.Writer", Leap)
    logger = InMemoryLogger()
    fit(loggers=[logger])
    assert steps_of(logger) != list(range(1, 25))


class Held(InMemoryLogger):
    """Holds the writer thread at its first row until told otherwise."""

    def __init__(self):
        super().__init__()
        self.gate = Gate()

    def log(self, row):
        self.gate.pass_through()
        super().log(row)


def opening_at(logger, num_calls):
    """Return a loss that opens the logger's gate once the loop has come so far without it."""
    calls = []

    def loss_fn(outputs, target):
        calls.append(1)
        if len(calls) == 2:
            logger.gate.wait_for_arrivals(1)
        if len(calls) == num_calls:
            logger.gate.open()
        return F.cross_entropy(outputs, target)

    return loss_fn


def test_a_slow_logger_never_holds_up_a_loop_that_may_drop():
    """The loop passes a logger that is stuck; rows beyond the bound are dropped and counted, losses kept."""
    logger = Held()
    result = fit(loggers=[logger], num_steps=300, max_log_lag=50, log_overflow="drop",
                 loss_fn=opening_at(logger, 250))  # fmt: skip
    assert len(result.losses) == 300
    assert result.outbound.num_dropped > 100
    assert len(steps_of(logger)) + result.outbound.num_dropped == 300
    assert steps_of(logger) == sorted(set(steps_of(logger)))
    assert result.outbound.max_lag_steps > 100
    assert f"{result.outbound.num_dropped} rows dropped" in str(result.outbound)


def test_a_slow_logger_never_holds_up_a_loop_that_may_grow():
    """The loop passes a logger that is stuck, and every row arrives in the end."""
    logger = Held()
    result = fit(loggers=[logger], num_steps=300, max_log_lag=50, log_overflow="grow",
                 loss_fn=opening_at(logger, 250))  # fmt: skip
    assert steps_of(logger) == list(range(1, 301))
    assert result.outbound.num_dropped == 0


def test_a_slow_logger_holds_up_a_loop_that_waits():
    """No more steps than the bound are ahead of the loggers; the loop goes on when they have caught up."""
    logger, seen = Held(), []

    def loss_fn(outputs, target):
        seen.append(len(logger.rows))
        return F.cross_entropy(outputs, target)

    opener = threading.Thread(target=lambda: (logger.gate.wait_for_arrivals(1), logger.gate.open()))
    opener.start()
    result = fit(loggers=[logger], num_steps=300, max_log_lag=20, loss_fn=loss_fn)
    opener.join()
    assert steps_of(logger) == list(range(1, 301))
    assert all(step - done <= 21 for step, done in enumerate(seen))
    assert result.outbound.max_lag_steps <= 21


def test_the_loggers_are_opened_and_closed_where_they_run():
    """Nothing of a logger's own work is done on the loop thread, its opening and closing included."""

    class Watched(InMemoryLogger):
        def open(self, info):
            self.rows.append(info)
            self.threads.add(threading.current_thread().name)

        def close(self):
            super().close()
            self.threads.add(threading.current_thread().name)

        def flush(self):
            self.threads.add(threading.current_thread().name)

    logger = Watched()
    fit(loggers=[logger])
    assert isinstance(logger.rows[0], RunInfo)
    assert logger.is_closed
    assert logger.threads == {"writer"}


@pytest.mark.parametrize("schedule", ["textbook", "overlap"])
@pytest.mark.parametrize("method", ["open", "log", "flush", "close"])
def test_an_error_of_a_backend_reaches_the_user(schedule, method):
    """Whatever a logger raises, and wherever, comes out of fit as itself; the other logger has its rows."""

    def fail(*arguments):
        raise UserError(method)

    bad, good = InMemoryLogger(), InMemoryLogger()
    setattr(bad, method, fail)
    with pytest.raises(UserError, match=method) as caught:
        fit(loggers=[bad, good], schedule=schedule)
    assert f"stage '{method} (InMemoryLogger 1)'" in caught.value.__notes__[0]
    assert good.is_closed
    assert steps_of(good)[:1] == [1]  # training goes on, and the others hear of it


def test_rows_before_a_nan_are_told_and_the_nans_own():
    """The row whose loss is not finite is the last one that the loggers see."""
    logger, calls = InMemoryLogger(), []

    def loss_fn(outputs, target):
        calls.append(1)
        return F.cross_entropy(outputs, target) * (float("nan") if len(calls) == 5 else 1.0)

    with pytest.raises(NonFiniteError):
        fit(loggers=[logger], loss_fn=loss_fn)
    assert steps_of(logger) == [1, 2, 3, 4, 5]


def test_times_are_told_by_name():
    """Each logger has its rows and its time; one of a kind needs no number."""
    result = fit(loggers=[InMemoryLogger(), InMemoryLogger(), opened()])
    assert [(each.name, each.num_rows) for each in result.outbound.loggers] == [
        ("InMemoryLogger 1", 25), ("InMemoryLogger 2", 25), ("Held", 25),
    ]  # fmt: skip
    assert all(each.wall_s > 0 and each.cpu_s > 0 for each in result.outbound.loggers)
    assert result.outbound.writer_cpu_s > 0
    textbook = fit(loggers=[InMemoryLogger()], schedule="textbook").outbound
    assert (textbook.writer_cpu_s, textbook.loggers[0].cpu_s, textbook.max_lag_steps) == (None, 0, 0)
    assert "on the loop thread (textbook)" in str(textbook)


def opened():
    logger = Held()
    logger.gate.open()
    return logger


def test_a_logger_that_holds_the_gil_is_named_with_a_way_out():
    """A tenth of the training time in a backend's Python is worth a line; sleeping is not."""
    busy, asleep = LoggerTime("MlflowLogger", 100, 0.9, 0.9), LoggerTime("Remote", 100, 5.0, 0.01)
    report = OutboundReport(4.0, (busy, asleep), {"Mine": 0.2}, 3, 0.07, 0, 1.0, None)
    assert report.gil_bound_loggers == (busy,)
    text = str(report)
    assert "MlflowLogger: 100 rows in 0.90 s (22.5% of training)" in text
    assert "pipeline.loggers.InProcess(MlflowLogger" in text
    assert "InProcess(Remote" not in text
    assert "callback Mine: 0.20 s (5.0% of training)" in text
    assert "at most 3 steps and 70 ms behind" in text


def test_a_group_that_never_logged_is_closed_once():
    """Loggers are closed once, whether or not anything was logged."""
    logger, calls = InMemoryLogger(), []
    logger.close = lambda: calls.append(1)
    group = LoggerGroup([logger], RunInfo(None, {}), is_off_loop=False)
    with group.closing():
        group.flush()
        group.close()
    assert calls == [1]


def test_every_logger_hears_a_row_that_one_of_them_fails_at():
    """The first error is raised at the end, the others stand on it as notes."""

    class Bad(InMemoryLogger):
        def log(self, row):
            raise UserError(str(row.step))

    good = InMemoryLogger()
    group = LoggerGroup([Bad(), Bad(), good], RunInfo(None, {}), is_off_loop=True)
    with pytest.raises(UserError) as caught, group.closing():
        group.log([Row(3, 0, {}), Row(4, 0, {})])
    assert [row.step for row in good.rows] == [3, 4]
    assert caught.value.__notes__ == [
        "stage 'log (Bad 1)', step 3",
        "while this error was handled: UserError: 3",
    ]


def test_a_writers_last_word_is_said_on_its_thread():
    """`finish` is called once when all is handled, after an error too; what it raises reaches the owner."""
    said = []

    def finish():
        said.append(threading.current_thread().name)

    def fail(*arguments):
        raise UserError("last")

    with Scope() as scope:
        Writer(scope, lambda items: None, name="w", gather_s=0, finish=finish)
    with Scope() as scope:
        writer = Writer(scope, fail, name="w", gather_s=0, finish=finish)
        writer.put(1)
    assert said == ["w", "w"]
    with pytest.raises(UserError, match="last"), Scope() as scope:
        Writer(scope, lambda items: None, name="w", gather_s=0, finish=fail)


def test_the_bound_and_the_policy_are_settings():
    """Each is refused with what to type."""
    with pytest.raises(ConfigError) as caught:
        Trainer(log_overflow="lose")
    assert "log_overflow must be wait, drop, grow, got 'lose'" in str(caught.value)
    with pytest.raises(ConfigError, match="max_log_lag must be 1 or more, got 0"):
        Trainer(max_log_lag=0)


def test_a_textbook_loop_drops_no_row():
    """Nothing can be behind where the loop itself writes, however many rows it keeps for a moment."""
    logger = InMemoryLogger()
    fit(loggers=[logger], num_steps=60, log_overflow="drop", max_log_lag=2, schedule="textbook")
    assert steps_of(logger) == list(range(1, 61))


def test_an_interrupt_among_the_kept_rows_loses_none_behind_it():
    """The row under way is lost to the interrupt; the others are written when the run ends."""
    noted = []

    class Noting:
        on_step = None

        def note_step(self, done, values, *, reached):
            if done.step == 3:
                raise KeyboardInterrupt
            noted.append(done.step)

        def deliver(self):
            pass

    outbound = DirectOutbound(SimulatedBackend(), Noting())
    outbound._due_s = 1e9
    for step in range(1, 7):
        outbound.put_step(StepDone(step, 0, 1, 0, 0.0, 1, 0), {"train/loss": 1.0})
    with pytest.raises(KeyboardInterrupt):
        outbound.settle()
    outbound.settle()
    assert noted == [1, 2, 4, 5, 6]
