"""The signal that stops a run also kills the workers of the user's own DataLoader: all is saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from pipeline import Trainer
from tests.faults.cells import At, Samples
from tests.faults.test_workers import all_end

# A process that has threads is forked, which Python 3.12 and newer warn of.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
ROOT = Path(__file__).parents[2]
REACHED = "has reached what makes the data, too"


def workers():
    """Return the processes of DataLoaders: children of this one that were forked from it."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            if Path(f"/proc/{child}/cmdline").read_bytes() == Path("/proc/self/cmdline").read_bytes():
                found.append(child)
    return found


def kill_workers():
    """Kill them all, and return when they have ended."""
    found = workers()
    assert found
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    assert all_end(found)


def stop():
    """Ask this process to stop, as whoever sends the signal to all does."""
    os.kill(os.getpid(), signal.SIGTERM)


def fit(run_dir, *, loss_fn=F.cross_entropy, validates=False, persistent=False, batch_size=2, **settings):
    """Train two epochs of ten batches, five a step, with a DataLoader's own workers.

    One batch at most waits for the loop: more could be the rest of an epoch, which then needs no workers.
    """
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 2))
    loaders = [DataLoader(Samples(), batch_size, num_workers=2, shuffle=True, persistent_workers=persistent)]
    if validates:
        loaders.append(DataLoader(Samples(), 2, num_workers=1, persistent_workers=persistent))
    trainer = Trainer(
        **{
            "max_epochs": 2, "run_dir": run_dir, "enable_progress_bar": False, "device": "cpu", "gil": "off",
            "accumulate_grad_batches": 5, "prefetch_depth": 1, **settings,
        }
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.5)
    return trainer.fit(
        model, optimizer, loaders[0], loss_fn=loss_fn, val_data=loaders[1] if validates else None
    )


def at(number, *faults):
    """Return a loss function at whose so-manieth call things happen."""

    def loss_fn(outputs, target):
        for fault in faults:
            fault()
        return F.cross_entropy(outputs, target)

    return At(F.cross_entropy, number, loss_fn)


@pytest.mark.parametrize("schedule", ["textbook", "overlap"])
@pytest.mark.parametrize("order", [(kill_workers, stop), (stop, kill_workers)])
def test_an_accumulation_that_lost_its_data_is_saved_in_its_middle(tmp_path, order, schedule):
    """Whoever gets the signal first. Resumed, the run has the losses of one that was never stopped."""
    # A step needs more batches than could have been made ahead, by the workers (4) and on the belt (1).
    settings = {"schedule": schedule, "batch_size": 1, "accumulate_grad_batches": 20}
    whole = fit(tmp_path / "whole", **settings)
    with pytest.warns(UserWarning, match=f"SIGTERM {REACHED}"):
        part = fit(tmp_path / "part", loss_fn=at(26, *order), **settings)
    assert (part.stop_reason, part.num_steps) == ("SIGTERM", 1)
    assert part.saves
    rest = fit(tmp_path / "part", resume="auto", **settings)
    assert rest.losses == whole.losses


def test_an_update_is_not_broken_off_by_a_worker_that_dies(tmp_path):
    """torch would raise in its middle: the weights would be half changed, and the run ended."""

    class Killed(torch.optim.SGD):
        def step(self, closure=None):
            if not hasattr(self, "is_done"):
                self.is_done = True
                kill_workers()
                stop()
            return super().step(closure)

    def train(run_dir, kind, **settings):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 2)
        trainer = Trainer(
            max_epochs=2, run_dir=run_dir, enable_progress_bar=False, device="cpu", gil="off",
            prefetch_depth=1, **settings,
        )  # fmt: skip
        loader = DataLoader(Samples(), 2, num_workers=2)
        return trainer.fit(model, kind(model.parameters(), 0.1), loader, loss_fn=F.cross_entropy)

    whole = train(tmp_path / "whole", torch.optim.SGD)
    part = train(tmp_path / "part", Killed)
    assert (part.stop_reason, part.num_steps) == ("SIGTERM", 1)
    assert train(tmp_path / "part", torch.optim.SGD, resume="auto").losses == whole.losses


@pytest.mark.parametrize(("persistent", "interval"), [(False, None), (True, 1)])
def test_a_validation_that_lost_its_data_is_begun_again(tmp_path, persistent, interval):
    """At an epoch's end and in its middle; its values are the same, and what is drawn afterwards."""
    arguments = {"validates": True, "persistent": persistent, "val_check_interval": interval}
    num_steps = interval or 2
    whole = fit(tmp_path / "whole", **arguments)
    number = 5 * num_steps + 4  # a step has five batches; the fourth one of the first validation
    with pytest.warns(UserWarning, match=f"SIGTERM {REACHED}.*The validation is begun again"):
        part = fit(tmp_path / "part", loss_fn=at(number, stop, kill_workers), **arguments)
    assert (part.stop_reason, part.num_steps) == ("SIGTERM", num_steps)
    assert part.history == whole.history[: len(part.history)]
    if not persistent:  # such a loader draws a seed when it starts workers, and so once more in a resumed run
        rest = fit(tmp_path / "part", resume="auto", **arguments)
        assert rest.losses == whole.losses
        assert [row.values for row in rest.history] == [row.values for row in whole.history]


@pytest.mark.parametrize("number", [6, 14])
def test_a_worker_that_dies_without_a_signal_is_an_error(tmp_path, number):
    """torch's own, with what it says of the death; in training and in a validation."""
    with pytest.raises(RuntimeError, match="DataLoader worker") as caught:
        fit(tmp_path, loss_fn=at(number, kill_workers), validates=True)
    assert "killed by signal: Killed" in "\n".join([str(caught.value), *caught.value.__notes__])


def test_the_users_own_error_is_an_error_after_a_signal_too(tmp_path):
    """Only data is excused: what the step raises ends the run as ever."""

    def fail():
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fit(tmp_path, loss_fn=at(6, stop, fail))


GROUP = """
import os, signal, sys, torch
from torch.utils.data import DataLoader
from pipeline import Trainer
from tests.faults.cells import Samples

if __name__ == "__main__":
    calls = []
    def loss_fn(outputs, target):
        calls.append(1)
        if len(calls) == 13:
            os.killpg(0, getattr(signal, sys.argv[2]))
        return torch.nn.functional.cross_entropy(outputs, target)
    model = torch.nn.Linear(4, 2)
    data = DataLoader(Samples(), 2, num_workers=2, multiprocessing_context=sys.argv[3])
    trainer = Trainer(
        run_dir=sys.argv[1], device="cpu", enable_progress_bar=False, max_epochs=9, accumulate_grad_batches=10
    )
    result = trainer.fit(model, torch.optim.SGD(model.parameters(), 0.1), data, loss_fn=loss_fn)
    print(result.stop_reason, result.num_steps, len(result.saves))
"""


@pytest.mark.parametrize(("name", "context"), [("SIGINT", "forkserver"), ("SIGTERM", "fork")])
def test_a_signal_to_the_whole_group(tmp_path, name, context):
    """As a terminal and a scheduler send it: exit code 0, a checkpoint, and why it stopped."""
    path = tmp_path / "script.py"
    path.write_text(GROUP)
    done = subprocess.run(
        [sys.executable, str(path), str(tmp_path / "run"), name, context],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        capture_output=True,
        text=True,
    )
    reason, num_steps, num_saves = done.stdout.split()
    assert (reason, done.returncode) == (name, 0), done.stderr
    assert num_steps in ("1", "2")
    assert int(num_saves) >= 1
