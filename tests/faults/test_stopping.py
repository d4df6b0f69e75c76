"""Stopping in good order: time limits, signals of every kind, and what is put back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.torture import torture
from pipeline import CheckpointError, ConfigError, Trainer
from pipeline.loggers import CsvLogger
from tests.faults.cells import At, Samples, UserError, fail, fit

ROOT = Path(__file__).parents[2]


def at(number, do):
    """Return a loss function that does something at its so-manieth call, and then is itself."""

    def loss_fn(outputs, target):
        do()
        return F.cross_entropy(outputs, target)

    return At(F.cross_entropy, number, loss_fn)


@pytest.mark.parametrize("place", ["textbook", "overlap-inline"])
def test_sigusr1_saves_and_goes_on(tmp_path, place):
    """A checkpoint that nothing else would have made, and the run ends as ever."""
    loss_fn = at(4, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    trainer = Trainer(run_dir=tmp_path, schedule=place.partition("-")[0], enable_progress_bar=False)
    result = trainer.fit(
        model, torch.optim.SGD(model.parameters(), 0.1), Samples(), loss_fn=loss_fn, batch_size=2
    )
    assert [each.step for each in result.saves] == [4, 10]
    assert (result.stop_reason, result.num_steps) == ("max_epochs", 10)


@pytest.mark.parametrize("limit", [1e-6, "00:00:01"])
def test_a_run_stops_before_its_time_is_up(tmp_path, limit):
    """Saved after the step under way; the limit is in seconds, or as clusters write it."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    trainer = Trainer(run_dir=tmp_path, max_epochs=10**6, max_time=limit, enable_progress_bar=False)
    result = trainer.fit(
        model, torch.optim.SGD(model.parameters(), 0.1), Samples(), loss_fn=F.cross_entropy, batch_size=2
    )
    assert result.stop_reason == "max_time"
    assert result.saves[-1].step == result.num_steps
    with pytest.raises(ConfigError, match="max_time must be a number above 0 of seconds, or a text like"):
        Trainer(max_time="soon")


def test_on_another_thread_nothing_is_installed(tmp_path):
    """Handlers can be set on the main thread only; the run is the same."""
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def work():
        found.append(signal.getsignal(signal.SIGTERM))
        found.append(fit("overlap-inline", tmp_path, loss_fn=at(3, look)))

    def look():
        found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[:2] == [before, before]
    assert found[2].num_steps == 10


def test_an_ignored_signal_stays_ignored(tmp_path):
    """As Ctrl-C is in a job in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        result = fit("textbook", tmp_path, loss_fn=at(3, lambda: os.kill(os.getpid(), signal.SIGINT)))
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.stop_reason == "max_epochs"


def test_handlers_are_put_back_after_an_error(tmp_path):
    """Whatever ends the run."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(UserError):
        fit("textbook", tmp_path, loss_fn=At(F.cross_entropy, 3, fail))
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_is_not_begun_again_in_silence(tmp_path):
    """Files that cannot be used: refused. A run without any: begun again, with a warning."""
    with pytest.raises(ConfigError, match="resume='auto' looks into run_dir, which must be named"):
        fit("textbook", None, resume="auto")
    assert fit("textbook", tmp_path / "new", resume="auto").resumed_from is None
    for path in (tmp_path / "new" / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint can be used.*cut off.*another run_dir"):
        fit("textbook", tmp_path / "new", resume="auto")
    for path in (tmp_path / "new" / "checkpoints").iterdir():
        path.unlink()
    with pytest.warns(UserWarning, match="stopped before its first checkpoint: it begins again"):
        fit("textbook", tmp_path / "new", resume="auto")
    rows = [json.loads(line) for line in (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 11))


RANK = """
import os, signal, sys, torch
from pipeline import Trainer
rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
calls = []
def loss_fn(outputs, target):
    calls.append(1)
    if rank == 1 and len(calls) == 5:
        os.kill(os.getpid(), signal.SIGTERM)
    return torch.nn.functional.cross_entropy(outputs, target)
model = torch.nn.Linear(4, 2)
data = torch.utils.data.TensorDataset(torch.randn(100, 4), torch.arange(100) % 2)
trainer = Trainer(run_dir=sys.argv[3], device="cpu", enable_progress_bar=False)
result = trainer.fit(
    model, torch.optim.SGD(model.parameters(), 0.1), data, loss_fn=loss_fn, batch_size=2
)
print(result.stop_reason, result.num_steps)
torch.distributed.destroy_process_group()
"""


def test_all_ranks_stop_at_the_same_step(tmp_path):
    """One of them gets SIGTERM at step 5; both stop at step 16, where they tell each other."""
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store"), str(tmp_path / "run")], cwd=ROOT,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    said = [each.communicate(timeout=100) for each in ranks]
    assert [out.split() for out, _ in said] == [["SIGTERM", "16"], ["SIGTERM", "16"]], said


def test_another_run_is_refused_and_another_setting_named(tmp_path):
    """A checkpoint of another model, other callbacks, or with settings that decide the numbers changed."""
    whole = fit("textbook", tmp_path / "a").losses.tolist()
    step_3 = fit("textbook", tmp_path / "b", loss_fn=at(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    path = step_3.last_checkpoint

    def wider(model, optimizer):
        model.extra = torch.nn.Linear(1, 1)

    with pytest.raises(CheckpointError, match="its model does not fit this run's"):
        fit("textbook", tmp_path / "c", resume=path, prepare=wider)
    model = torch.nn.Linear(4, 2)
    trainer = Trainer(seed=1, run_dir=tmp_path / "d", resume=path, enable_progress_bar=False)
    with pytest.warns(UserWarning, match="seed was 0, is 1"):
        trainer.fit(
            model, torch.optim.SGD(model.parameters(), 0.1), Samples(), loss_fn=F.cross_entropy, batch_size=2
        )
    assert fit("textbook", tmp_path / "e", resume=path).losses.tolist() == whole, "into a new folder"
    assert fit("textbook", tmp_path / "b", resume=path).losses.tolist() == whole, "into its own"


def test_going_back_to_an_older_checkpoint(tmp_path):
    """The later ones are put aside: their rows are gone, and they are not the newest any more."""
    whole = fit("textbook", tmp_path)
    older = tmp_path / "checkpoints" / "step-00000009.safetensors"
    again = fit("textbook", tmp_path, resume=older)
    assert again.losses == whole.losses
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == [
        "step-00000009.safetensors", "step-00000010.safetensors", "step-00000010.safetensors.superseded"
    ]  # fmt: skip
    assert fit("textbook", tmp_path, resume="auto").losses == whole.losses


def test_a_table_goes_on_where_the_run_does(tmp_path):
    """CsvLogger takes up its file and cuts what comes again."""
    fit("textbook", tmp_path / "whole", loggers=[CsvLogger()])
    with pytest.raises(UserError):
        fit("textbook", tmp_path / "cut", loss_fn=At(F.cross_entropy, 6, fail), loggers=[CsvLogger()])
    fit("textbook", tmp_path / "cut", loggers=[CsvLogger()], resume="auto")
    steps = [
        [line.split(",")[0] for line in (tmp_path / name / "metrics.csv").read_text().splitlines()]
        for name in ("whole", "cut")
    ]
    assert steps[0] == steps[1]


# A process that has threads is forked, which Python 3.12 and newer warn of.
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_run_that_is_killed_again_and_again_is_the_run_that_never_was(tmp_path):
    """The short form of benchmarks/torture.py: SIGKILL and SIGTERM at random moments, some during a save."""
    assert torture(tmp_path, num_kills=8, num_epochs=2, seed=3, max_s=0.3)["kills"] >= 8
