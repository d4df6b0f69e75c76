"""The table of faults of docs/faults.md, cell by cell: what reaches the caller, what is left, what goes on.

Each cell ends with the same three looks: every step that was finished is in metrics.jsonl, once; every thread
and process has ended (the fixture of every test sees to that); and the run, resumed without the fault, has
the losses of one that never had it.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F

from pipeline import NonFiniteError, StallError, WorkerDiedError
from pipeline.loop import signals
from pipeline.testing import Gate
from pipeline.workers import Processes
from tests.faults.cells import (
    BAD_SAMPLE,
    BAD_STEP,
    HANGING,
    PLACES,
    At,
    Backward,
    Logger,
    Samples,
    UserError,
    fail,
    failing_collate,
    fit,
    out_of_memory,
    simulated,
)

IN_THIS_PROCESS = [place for place in PLACES if place != "overlap-process"]
AHEAD = [place for place in PLACES if place != "textbook"]
every_place = pytest.mark.parametrize("place", PLACES)


@pytest.fixture(autouse=True)
def workers_are_waited_for(monkeypatch):
    """Have every batch made by a worker; as it is, the loop makes them until the workers are there."""
    monkeypatch.setattr(Processes, "is_ready", lambda self, *counts: self._pool.wait_until_ready(60.0))


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """A shell's background job ignores SIGINT, and so does what it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the losses of the run that has no fault."""
    return fit("textbook", tmp_path_factory.mktemp("whole")).losses.tolist()


def check_what_is_left(place, run_dir, whole, *, least):
    """Look at the rows on the disk, and resume the run."""
    steps = logged_steps(run_dir)
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= least
    result = fit(place, run_dir, resume="auto")
    assert result.resumed_from is not None
    assert result.losses.tolist() == whole
    assert logged_steps(run_dir) == list(range(1, 11))


def logged_steps(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "train/loss" in row]


def notes_of(error):
    return " ".join(getattr(error, "__notes__", []))


@every_place
@pytest.mark.parametrize(
    ("fault", "error", "note"),
    [
        ("raises", UserError, f"stage 'fetch', sample {BAD_SAMPLE}, batch 8 of epoch 0, step 8"),
        ("wrong type", TypeError, "stage 'collate', batch 8 of epoch 0, step 8"),
        ("out of memory", MemoryError, f"stage 'fetch', sample {BAD_SAMPLE}, batch 8 of epoch 0, step 8"),
    ],
)
def test_a_dataset_that_fails(tmp_path, whole, place, fault, error, note):
    """Its own exception, with stage, sample, batch and step; the steps before it are finished."""
    with pytest.raises(error) as caught:
        fit(place, tmp_path, dataset=Samples(fault))
    assert note in notes_of(caught.value)
    check_what_is_left(place, tmp_path, whole, least=8)


@every_place
def test_a_dataset_that_is_slow(tmp_path, whole, place):
    """Nothing is said as long as each batch comes within the time-out."""
    assert fit(place, tmp_path, dataset=Samples("is slow"), stall_timeout_s=20).losses.tolist() == whole


@pytest.mark.parametrize("place", ["overlap-inline", "overlap-thread"])
def test_a_dataset_that_hangs_ahead_of_the_loop(tmp_path, whole, place):
    """StallError names stage and sample and shows the stack; the thread is left behind, with a warning."""
    HANGING.clear()
    with pytest.warns(RuntimeWarning, match="hangs and was left behind"), pytest.raises(StallError) as caught:
        fit(place, tmp_path, dataset=Samples("hangs"), stall_timeout_s=0.2)
    assert (caught.value.stage, caught.value.index) == ("fetch", BAD_SAMPLE)
    assert "__getitem__" in caught.value.stack
    HANGING.set()
    for thread in threading.enumerate():
        if thread.name.startswith("prefetch"):
            thread.join()
    check_what_is_left(place, tmp_path, whole, least=8)


def test_a_dataset_that_hangs_in_a_worker_process(tmp_path, whole):
    """StallError, and the worker is killed."""
    with pytest.raises(StallError) as caught:
        fit("overlap-process", tmp_path, dataset=Samples("hangs"), stall_timeout_s=1)
    assert caught.value.index in (None, BAD_SAMPLE)
    check_what_is_left("overlap-process", tmp_path, whole, least=6)


def test_a_dataset_that_hangs_in_textbook(tmp_path, whole, capfd):
    """The stack is shown after the time-out, again and again, and the loop waits on."""
    HANGING.clear()
    seen = []

    class Telling(Samples):
        def __getitem__(self, index):
            if index == BAD_SAMPLE:
                while "stage 'fetch', sample 17" not in "".join(seen):
                    HANGING.wait(0.02)
                    seen.append(capfd.readouterr().err)
            return super().__getitem__(index)

    assert fit("textbook", tmp_path, dataset=Telling(), stall_timeout_s=0.1).losses.tolist() == whole
    assert "textbook waits on; the loop stands at:" in "".join(seen)
    assert "__getitem__" in "".join(seen)


@every_place
def test_a_dataset_that_exits(tmp_path, whole, place):
    """SystemExit travels like any exception."""
    with pytest.raises(SystemExit) as caught:
        fit(place, tmp_path, dataset=Samples("exits"))
    assert caught.value.code == 3
    check_what_is_left(place, tmp_path, whole, least=8)


@pytest.mark.parametrize("fault", ["exits at once", "is killed"])
def test_a_worker_process_that_dies(tmp_path, whole, fault):
    """Another one makes the batch again, which a warning says; WorkerDiedError if that one dies too."""
    how = "exit code 3" if fault == "exits at once" else "signal SIGKILL"
    with (
        pytest.warns(RuntimeWarning, match=f"ended with {how}.*Another one makes it again"),
        pytest.raises(WorkerDiedError, match=how),
    ):
        fit("overlap-process", tmp_path, dataset=Samples(fault))
    check_what_is_left("overlap-process", tmp_path, whole, least=6)


# A process that has threads is forked, which Python 3.12 and newer warn of.
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("place", IN_THIS_PROCESS)
@pytest.mark.parametrize(("fault", "code"), [("exits at once", 3), ("is killed", -9)])
def test_a_dataset_that_ends_the_whole_process(tmp_path, whole, place, fault, code):
    """Nobody can be told; the run goes on from its newest checkpoint, with every row up to there."""
    process = os.fork()
    if not process:
        try:
            fit(place, tmp_path, dataset=Samples(fault))
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == code
    result = fit(place, tmp_path, resume="auto")
    assert result.resumed_from is not None
    assert result.losses.tolist() == whole
    assert logged_steps(tmp_path) == list(range(1, 11))


@every_place
def test_a_collate_function_that_raises(tmp_path, whole, place):
    """Its own exception; no sample is to blame."""
    with pytest.raises(UserError) as caught:
        fit(place, tmp_path, collate_fn=failing_collate)
    assert "stage 'collate', batch 8 of epoch 0, step 8" in notes_of(caught.value)
    check_what_is_left(place, tmp_path, whole, least=8)


@every_place
def test_a_transfer_that_raises(tmp_path, whole, place):
    """The device's own exception reaches the caller."""
    method = "move" if place == "textbook" else "copy_in"
    with pytest.raises(UserError):
        fit(place, tmp_path, device=simulated(method, 7))
    # Threads copy side by side: the seventh copy may belong to the second batch already.
    check_what_is_left(place, tmp_path, whole, least=1 if place == "overlap-thread" else 2)


def broken_optimizer(model, optimizer):
    optimizer.step = At(optimizer.step, BAD_STEP, fail)


def broken_model(model, optimizer):
    model.forward = At(model.forward, BAD_STEP, fail)


def no_memory(model, optimizer):
    model.forward = At(model.forward, BAD_STEP, out_of_memory)


STEPS = {
    "forward": ({"prepare": broken_model}, UserError, "stage 'step', step 3"),
    "backward": (
        {"loss_fn": At(F.cross_entropy, BAD_STEP, lambda o, t: Backward.apply(o.sum()))},
        UserError,
        "stage 'step', step 3",
    ),
    "optimizer": ({"prepare": broken_optimizer}, UserError, "stage 'optimizer', step 3"),
    "no memory": ({"prepare": no_memory}, torch.OutOfMemoryError, "batch of 2 samples.*Halve batch_size"),
}


@every_place
@pytest.mark.parametrize("name", STEPS)
def test_a_step_that_raises(tmp_path, whole, place, name):
    """The user's own exception with its step; out of memory with the batch's size and what to try."""
    arguments, error, note = STEPS[name]
    if "loss_fn" in arguments:
        arguments["loss_fn"].left = BAD_STEP
    with pytest.raises(error) as caught:
        fit(place, tmp_path, **arguments)
    assert_matches(note, notes_of(caught.value))
    check_what_is_left(place, tmp_path, whole, least=3)


def assert_matches(pattern, text):
    import re

    assert re.search(pattern, text), text


@every_place
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite(tmp_path, whole, place, value):
    """The error has the first and the last step, the run folder the samples; the checkpoints are clean."""
    loss_fn = At(F.cross_entropy, BAD_STEP, lambda o, t: F.cross_entropy(o, t) * float(value))
    with pytest.raises(NonFiniteError) as caught:
        fit(place, tmp_path, loss_fn=loss_fn)
    assert caught.value.first_step == 3 <= caught.value.last_step < 10
    line = json.loads((tmp_path / "nonfinite.jsonl").read_text().splitlines()[0])
    assert (line["step"], line["batches"], line["samples"]) == (3, [3], [[6, 7]])


@every_place
@pytest.mark.parametrize("fault", [UserError("mine"), OSError(errno.ENOSPC, "No space left on device")])
def test_a_logger_that_fails(tmp_path, whole, place, fault, capsys):
    """Training goes on without it, which is said at once; at the end its exception is raised."""

    def raise_fault():
        raise fault

    with pytest.raises(type(fault)) as caught:
        fit(place, tmp_path, loggers=[Logger(raise_fault)])
    assert "stage 'log (Logger)', step 3" in notes_of(caught.value)
    assert "is told nothing more; training goes on" in capsys.readouterr().err
    assert logged_steps(tmp_path) == list(range(1, 11))
    check_what_is_left(place, tmp_path, whole, least=10)


@pytest.mark.parametrize("place", AHEAD)
def test_a_logger_that_blocks(tmp_path, whole, place):
    """StallError names it and shows its stack; metrics.jsonl, which comes first, has the rows."""
    gate = Gate()
    with (
        pytest.warns(RuntimeWarning, match="'writer' hangs and was left behind"),
        pytest.raises(StallError) as caught,
    ):
        fit(place, tmp_path, loggers=[Logger(gate.pass_through)], stall_timeout_s=1)
    assert caught.value.stage == "log (Logger)"
    assert "pass_through" in caught.value.stack
    gate.open()
    for thread in threading.enumerate():
        if thread.name == "writer":
            thread.join()
    check_what_is_left(place, tmp_path, whole, least=1)


def test_a_logger_that_blocks_in_textbook(tmp_path, whole, capfd):
    """The stack is shown and the loop waits on."""
    seen = []

    def block():
        while "textbook waits on" not in "".join(seen):
            HANGING.wait(0.02)
            seen.append(capfd.readouterr().err)

    HANGING.clear()
    result = fit("textbook", tmp_path, loggers=[Logger(block)], stall_timeout_s=0.1)
    assert result.losses.tolist() == whole


@every_place
def test_a_checkpoint_that_cannot_be_written(tmp_path, whole, place, monkeypatch):
    """The error says at which step; the older ones are there."""
    monkeypatch.setattr("os.replace", At(os.replace, BAD_STEP, no_space))
    with pytest.raises(OSError, match="No space left") as caught:
        fit(place, tmp_path)
    monkeypatch.undo()
    os.chdir(tmp_path)
    assert "stage 'checkpoint', step 4" in notes_of(caught.value)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-00000002.safetensors", "step-00000003.safetensors"]
    check_what_is_left(place, tmp_path, whole, least=4)


def no_space(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


@every_place
def test_a_checkpoint_that_cannot_be_written_and_does_not_matter(tmp_path, whole, place, monkeypatch):
    """With on_checkpoint_error=warn the user is told at once and training goes on."""
    monkeypatch.setattr("os.replace", At(os.replace, BAD_STEP, no_space))
    with pytest.warns(RuntimeWarning, match="step 4 could not be written: .*older ones are kept"):
        result = fit(place, tmp_path, on_checkpoint_error="warn")
    assert result.losses.tolist() == whole
    assert [each.step for each in result.saves if not each.num_bytes] == [4]


@every_place
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal(tmp_path, whole, place, name):
    """The step is finished and saved, fit returns and says why, and the handlers are as they were."""
    number = getattr(signal, name)
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]

    def loss_fn(outputs, target):
        os.kill(os.getpid(), number)
        return F.cross_entropy(outputs, target)

    result = fit(place, tmp_path, loss_fn=At(F.cross_entropy, BAD_STEP, loss_fn))
    assert (result.stop_reason, result.num_steps) == (name, 4)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before
    check_what_is_left(place, tmp_path, whole, least=4)


@every_place
@pytest.mark.parametrize("names", [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGTERM", "SIGINT")])
def test_a_second_signal(tmp_path, whole, place, names, monkeypatch):
    """It stops at once, wherever the loop is: here in the middle of the step."""
    monkeypatch.setattr(signals, "_ECHO_S", 0.0)  # else one that comes at once is an echo of the first

    def loss_fn(outputs, target):
        for name in names:
            os.kill(os.getpid(), getattr(signal, name))
        return F.cross_entropy(outputs, target)

    with pytest.raises(KeyboardInterrupt, match=f"{names[1]} after {names[0]}: stopped at once"):
        fit(place, tmp_path, loss_fn=At(F.cross_entropy, BAD_STEP, loss_fn))
    check_what_is_left(place, tmp_path, whole, least=3)


def test_the_looks_can_fail(tmp_path, whole):
    """A row that is missing, or another seed's losses, are noticed."""
    with pytest.raises(UserError):
        fit("textbook", tmp_path, dataset=Samples("raises"))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3] + lines[4:]))
    with pytest.raises(AssertionError), warnings.catch_warnings():
        check_what_is_left("textbook", tmp_path, whole, least=7)
