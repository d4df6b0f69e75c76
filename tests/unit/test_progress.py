"""What a run shows: on a terminal, in a pipe, in a notebook; a validation has its own."""

from __future__ import annotations

import io
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from pipeline import Every, SimulatedBackend, Trainer
from pipeline.batch import Progress, Row
from pipeline.loggers import ProgressBar
from pipeline.loggers.drawing import PlainLines, _clock
from pipeline.testing import InMemoryLogger
from tests.textbook import build_model

STEP = {
    "train/loss": 0.51234,
    "rate/samples_per_s": 12345.6,
    "time/step_ms": 10.0,
    "time/data_wait_ms": 2.5,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_loss_rate_wait_and_time_left():
    """Loss, samples per second, data wait and what is left stand beside the bar."""
    stream = Terminal()
    bar = ProgressBar(10, stream, Every(steps=1))
    for step in range(1, 6):
        bar.log(Row(step, 3, STEP))
    shown = stream.getvalue()
    assert "5/10" in shown
    assert "epoch 3, loss 0.5123, 12,346 samples/s, data wait 25%" in shown
    assert "<00:00" in shown  # time left
    bar.close()


def test_a_validation_has_a_bar_of_its_own():
    """It counts its own batches below the other and goes when it is done; the result stays as a line."""
    stream = Terminal()
    bar = ProgressBar(10, stream, Every(steps=1))
    bar.log(Row(1, 0, STEP))
    bar.log_progress(Progress("validate", 3, 7, False))
    assert "3/7" in stream.getvalue()
    bar.log_progress(Progress("validate", 7, 7, True))
    bar.log(Row(1, 0, {"val/loss": 0.25}))
    bar.log(Row(2, 0, STEP))
    bar.close()
    assert "epoch 0 step 1 val/loss 0.25\n" in stream.getvalue()
    assert stream.getvalue().rindex("2/10") > stream.getvalue().rindex("7/7")


def test_a_validation_that_fails_leaves_no_bar():
    """The bar of a validation that never ended is closed with the run."""
    stream = Terminal()
    bar = ProgressBar(10, stream)
    bar.log_progress(Progress("validate", 1, None, False))
    bar.close()
    assert "1batch" in stream.getvalue()


def test_a_pipe_gets_a_plain_line_now_and_then():
    """No control characters; a line when it is due, and one for each validation, with the time left."""
    stream = io.StringIO()
    bar = ProgressBar(10, stream, Every(steps=4))
    for step in range(1, 11):
        bar.log(Row(step, 0, STEP))
    bar.log_progress(Progress("validate", 1, 2, False))
    bar.log(Row(10, 0, {"val/loss": 0.25}))
    bar.close()
    lines = stream.getvalue().splitlines()
    assert lines == [
        "step 4/10, 0:00 and 0:00 to go: epoch 0, loss 0.5123, 12,346 samples/s, data wait 25%",
        "step 8/10, 0:00 and 0:00 to go: epoch 0, loss 0.5123, 12,346 samples/s, data wait 25%",
        "epoch 0 step 10 val/loss 0.25",
    ]


def test_a_run_of_unknown_length_says_how_long_it_runs():
    """Where nobody knows the number of steps there is no time left; and times are read easily."""
    stream = io.StringIO()
    PlainLines(None, stream).show(3, "x")
    assert stream.getvalue() == "step 3 in 0:00: x\n"
    assert [_clock(each) for each in (0.4, 61, 3725)] == ["0:00", "1:01", "1:02:05"]


class Handle:
    def __init__(self, first):
        self.drawn = [first]

    def update(self, drawing):
        self.drawn.append(drawing)


@pytest.fixture
def notebook(monkeypatch):
    """A stand-in for IPython's kernel: its display keeps what was drawn."""
    handles = []

    def display(drawing, *, display_id):
        assert display_id is True
        handles.append(Handle(drawing))
        return handles[-1]

    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    fake = types.SimpleNamespace(
        get_ipython=lambda: shell, display=types.SimpleNamespace(display=display, HTML=str)
    )
    monkeypatch.setitem(sys.modules, "IPython", fake)
    return handles


def test_a_notebook_gets_a_bar_without_widgets(notebook, capsys):
    """One display, updated in place; the validation's is emptied; results are printed below the cell."""
    bar = ProgressBar(10, every=Every(steps=1))
    bar.log(Row(5, 0, STEP))
    bar.log_progress(Progress("validate", 1, 2, False))
    bar.log_progress(Progress("validate", 2, 2, True))
    bar.log(Row(5, 0, {"val/loss": 0.25}))
    bar.close()
    steps, validation = notebook
    assert '<progress value="5" max="10"></progress> step 5/10' in steps.drawn[-1]
    assert "data wait 25%" in steps.drawn[-1]
    assert validation.drawn[1].startswith('<progress value="1" max="2"></progress> batch 1/2')
    assert validation.drawn[-1] == ""
    assert capsys.readouterr().out == "epoch 0 step 5 val/loss 0.25\n"


@pytest.mark.parametrize("schedule", ["textbook", "overlap"])
def test_validation_tells_how_far_it_is(schedule):
    """The last word of each validation comes before its numbers, from the thread of the loggers."""

    class Watching(InMemoryLogger):
        def log_progress(self, progress):
            self.rows.append(progress)

    logger, model = Watching(), build_model("linear")
    data = TensorDataset(torch.randn(8, 6), torch.zeros(8).long())
    trainer = Trainer(schedule=schedule, device=SimulatedBackend(), run_dir=None, enable_progress_bar=False,
                      limit_val_batches=3)  # fmt: skip
    trainer.fit(model, torch.optim.SGD(model.parameters(), 0.1), data, loss_fn=F.cross_entropy, batch_size=2,
                val_data=data, loggers=[logger])  # fmt: skip
    kinds = [type(each).__name__ for each in logger.rows]
    assert kinds[4:][-2:] == ["Progress", "Row"]
    assert logger.rows[-2] == Progress("validate", 3, 3, True)
