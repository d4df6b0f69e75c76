"""Worker processes that fail, hang or cannot start: who hears of it, and that nothing is left."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import pipeline.workers.dataset_pickle
from pipeline import Trainer
from pipeline.concurrency import SlotFile, available_cores
from pipeline.concurrency.processes.fork_server_client import ForkServer
from pipeline.concurrency.processes.shared_memory import check_room
from pipeline.data import as_source
from pipeline.errors import ConfigError, StageError, StallError, WorkerDiedError
from pipeline.testing import InMemoryLogger
from pipeline.workers import Processes
from pipeline.workers.processes import MODULES
from tests.workers import Augmented, Deadly, DeadlyBeside, Failing, Hanging, Meeting, UserError, Verbose


def processes_of(data, *, num_workers=2, num_threads=1, stall_timeout_s=60, **arguments):
    """Return a source and its worker processes, ready, which takes a while on a busy machine."""
    arguments = {"batch_size": 4, "shuffle": False, "drop_last": False, "collate_fn": None, **arguments}
    source = as_source(data, name="data", seed=0, **arguments)
    processes = Processes(source, num_workers, stall_timeout_s, num_threads)
    if not any(processes.wait_until_ready() for _ in range(200)):
        processes.close()
        pytest.fail("the workers are not there")
    return source, processes


def fit(data, **settings):
    """Train with worker processes that are ready before the first batch."""
    model = torch.nn.Linear(6, 3)
    trainer = Trainer(
        placement="process", num_workers=2, run_dir=None, enable_progress_bar=False, device="cpu", **settings
    )
    return trainer.fit(
        model, torch.optim.SGD(model.parameters(), 0.05), data, loss_fn=F.cross_entropy, batch_size=4
    )


@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_users_exception_keeps_its_type_and_its_traceback(num_threads):
    """It crosses the process border as itself, behind the batches before it, and names the sample."""
    source, processes = processes_of(Failing(20), num_threads=num_threads)
    batches = processes.batches(source.open(0), 4)
    try:
        assert len(next(batches)[0]) == 4
        with pytest.raises(UserError, match="mine") as caught:
            next(batches)
        assert caught.value.index == 5
        notes = "\n".join(caught.value.__notes__)
        assert "stage 'fetch', sample 5, batch 1 of epoch 0" in notes
        assert "workers.py" in notes
        assert 'raise UserError("mine", index)' in notes
    finally:
        processes.close()


@pytest.mark.parametrize(("text", "note"), [("é" * 100_000, None), ("short", "long" * 200_000)])
def test_an_error_at_length_is_cut(text, note):
    """What does not fit a message comes with the beginning of its text, and kills nobody."""
    source, processes = processes_of(Verbose(8, text=text, note=note))
    try:
        with pytest.raises(RuntimeError, match="ValueError: " + text[:5]):
            next(processes.batches(source.open(0), 4))
    finally:
        processes.close()


def test_what_is_no_text_in_the_import_path_is_left_out(monkeypatch):
    """As the interpreter does, so that a Path which somebody put there keeps no worker from its start."""
    monkeypatch.setattr(sys, "path", [*sys.path, Path("somewhere")])
    server = ForkServer(MODULES)
    try:
        with server.open_nursery() as control:
            assert b"born" in control.recv(1 << 10)
    finally:
        server.close()


@pytest.mark.parametrize(("exit_code", "text"), [(None, "signal SIGKILL, twice"), (7, "exit code 7, twice")])
@pytest.mark.filterwarnings("ignore:a worker process ended:RuntimeWarning")
def test_a_batch_that_kills_its_workers_ends_the_run(exit_code, text):
    """The error names the signal or the exit code, the batch and its samples; the one before it came."""
    source, processes = processes_of(Deadly(20, index=9, exit_code=exit_code))
    batches = processes.batches(source.open(0), 4)
    try:
        next(batches), next(batches)
        with pytest.raises(WorkerDiedError, match=rf"{text}.*batch 2 of epoch 0 \(samples 8, 9, 10, 11\)"):
            next(batches)
    finally:
        processes.close()


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_worker_that_hangs_ends_the_run(num_threads):
    """After the time-out the error names the batch, and shows where the worker stands, in all its threads."""
    source, processes = processes_of(
        Hanging(20, index=6), num_workers=1, num_threads=num_threads, stall_timeout_s=2
    )
    batches = processes.batches(source.open(0), 4)
    try:
        next(batches)
        with pytest.raises(StallError, match=r"batch 1 of epoch 0 \(samples 4, 5, 6, 7\) for 2 s") as caught:
            next(batches)
    finally:
        processes.close()
    assert "workers.py" in str(caught.value)
    assert str(caught.value).count("_answer_in_turn") == num_threads


def wait_for_the_end(pid):
    """Return once a process that is no child of this one has ended."""
    assert all_end([pid])


def told(caught):
    """Return what was said of workers that died."""
    assert all(each.category is RuntimeWarning for each in caught)
    return [str(each.message).split(" while it ")[1] for each in caught]


@pytest.mark.parametrize(("index", "beside"), [(5, 9), (9, 5)])
def test_a_batch_is_not_blamed_for_the_one_made_beside_it(index, beside, tmp_path):
    """Both are suspects, and made again one at a time: that shows which one it was; the other one comes."""
    data = DeadlyBeside(20, index=index, beside=beside, memory=str(tmp_path / "first"))
    source, processes = processes_of(data, num_workers=1, num_threads=2)
    reader, found = source.open(0), []
    try:
        with (
            warnings.catch_warnings(record=True) as caught,
            pytest.raises(WorkerDiedError, match=rf"twice.*batch {index // 4} of epoch 0"),
        ):
            warnings.simplefilter("always")
            found.extend(processes.batches(reader, 5))
        found.extend(processes.batches(source.open(0, start=index // 4 + 1), 4))
    finally:
        processes.close()
    first, *later = told(caught)
    assert "batch 1 of epoch 0 (samples 4, 5, 6, 7) or batch 2 of epoch 0 (samples 8, 9, 10, 11)" in first
    assert len(later) == 2
    assert all(each.startswith(f"made batch {index // 4} of epoch 0 (") for each in later)
    expected = [batch for number, batch in enumerate(all_of(source)) if number != index // 4]
    assert_equal(found, expected)


def all_of(source):
    """Return the batches of an epoch, made here."""
    reader = source.open(0)
    return [reader.read() for _ in range(reader.num_batches)]


def assert_equal(found, expected):
    """Compare batches."""
    for batch, other in zip(found, expected, strict=True):
        assert torch.equal(batch[0], other[0])


def test_a_worker_killed_once_loses_no_batch(tmp_path):
    """Those that were under way beside the one that did it, and those behind them, come too, in order."""
    data = DeadlyBeside(40, index=5, beside=9, memory=str(tmp_path / "first"), is_once=True)
    source, processes = processes_of(data, num_workers=1, num_threads=2)
    try:
        with pytest.warns(RuntimeWarning, match=r"batch 1 .* or batch 2 .*Another one makes each by itself"):
            assert_equal(list(processes.batches(source.open(0), 8)), all_of(source))
    finally:
        processes.close()


def test_a_batch_that_was_answered_is_not_blamed(tmp_path):
    """Its worker died of a later one, with jobs unread: the answer that nobody had read yet is read."""
    source, processes = processes_of(Deadly(16, index=9, memory=str(tmp_path / "once")), num_workers=1)
    batches = processes.batches(source.open(0), 4)
    try:
        found = [next(batches)]
        wait_for_the_end(processes._pool._workers[0].pid)
        with pytest.warns(RuntimeWarning, match="while it made batch 2 of epoch 0"):
            found.extend(batches)
    finally:
        processes.close()
    assert_equal(found, all_of(source))


def test_a_worker_that_dies_with_nothing_to_do_is_no_stall():
    """Somebody killed it: another one takes its place, which is said, and no batch is blamed."""
    source, processes = processes_of(Augmented(20), num_workers=2)
    try:
        for worker in [*processes._pool._workers]:
            os.kill(worker.pid, signal.SIGKILL)
            wait_for_the_end(worker.pid)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert_equal(list(processes.batches(source.open(0), 4)), all_of(source))
    finally:
        processes.close()
    assert told(caught) == ["had nothing to make. Another one takes its place."] * 2


def test_a_worker_that_is_let_go_does_not_wait_for_a_thread_that_hangs():
    """It ends when nobody asks any more, whichever of its threads hears of it."""
    source, processes = processes_of(Hanging(20, index=6), num_workers=1, num_threads=2)
    batches = processes.batches(source.open(0), 3)
    try:
        next(batches)
        worker = processes._pool._workers.pop()
        processes._pool._let_go(worker)
        wait_for_the_end(worker.pid)
    finally:
        processes.close()


def test_processes_are_closed_with_batches_under_way():
    """Whoever still iterates is told; nothing is left, which the fixture looks at."""
    source, processes = processes_of(Hanging(40, index=6), num_workers=2, num_threads=3)
    batches = processes.batches(source.open(0), 12)
    next(batches)
    processes.close()
    with pytest.raises(StageError, match="closed in the middle of an epoch"):
        list(batches)


def test_the_number_of_threads_changes_without_a_new_start():
    """The nursery has the dataset: idle workers are let go, and others forked in their place."""
    source, processes = processes_of(Meeting(24, pair=(4, 8)), num_workers=2)
    try:
        nursery = processes._pool._nursery
        assert processes.is_ready(1, 2)
        assert [worker.num_threads for worker in processes._pool._workers] == [2]
        assert_equal(list(processes.batches(source.open(0), 4)), all_of(source))
        assert processes.is_ready(3, 1)
        assert [worker.num_threads for worker in processes._pool._workers] == [1, 1, 1]
        assert processes._pool._nursery == nursery
    finally:
        processes.close()


class Unpicklable(Augmented):
    """Holds a lock."""

    def __init__(self):
        super().__init__(8)
        self.lock = threading.Lock()


def test_a_dataset_that_does_not_pickle_is_refused_by_name():
    """A pinned process says which attribute; nothing has been trained."""
    with pytest.raises(ConfigError, match=r"attribute 'lock' \(lock\) cannot be pickled.*placement=thread"):
        fit(Unpicklable())


def test_a_class_that_a_process_cannot_import_is_refused():
    """One of a function, as in a notebook, has no name that could be imported."""

    class Local(Augmented):
        pass

    with pytest.raises(ConfigError, match="placement=process needs the dataset in a process"):
        fit(Local(8))


def test_batches_of_an_iterable_cannot_be_shared_out():
    """A list of batches has no samples: the error says what has."""
    model = torch.nn.Linear(6, 3)
    trainer = Trainer(placement="process", run_dir=None, enable_progress_bar=False, device="cpu")
    batches = [(torch.randn(4, 6), torch.zeros(4, dtype=torch.int64))]
    with pytest.raises(ConfigError, match="placement=process needs samples to share out"):
        trainer.fit(model, torch.optim.SGD(model.parameters(), 0.05), batches, loss_fn=F.cross_entropy)


@pytest.mark.parametrize("data", [Unpicklable(), [(torch.randn(4, 6), torch.zeros(4, dtype=torch.int64))]])
def test_what_a_process_cannot_have_is_refused_before_any_file_is_made(data, tmp_path):
    """In `fit`, and not where the first batch is made: there is no run folder."""
    model = torch.nn.Linear(6, 3)
    trainer = Trainer(placement="process", run_dir=tmp_path / "run", enable_progress_bar=False, device="cpu")
    batch_size = None if isinstance(data, list) else 4
    with pytest.raises(ConfigError, match="placement=process needs"):
        trainer.fit(
            model,
            torch.optim.SGD(model.parameters(), 0.05),
            data,
            loss_fn=F.cross_entropy,
            batch_size=batch_size,
        )
    assert not (tmp_path / "run").exists()


def test_a_dataset_is_packed_once(monkeypatch):
    """To check early costs nothing: the processes that it starts are those of the run."""
    packed, pack = [], pipeline.workers.dataset_pickle.pack
    monkeypatch.setattr("pipeline.workers.dataset_pickle.pack", lambda *args: packed.append(1) or pack(*args))
    fit(Augmented(8))
    assert packed == [1]


def test_a_place_and_the_textbook_schedule_contradict():
    """The two settings cannot both be meant."""
    with pytest.raises(ConfigError, match="Leave one of them at auto"):
        Trainer(schedule="textbook", placement="process")


def test_room_is_looked_at_before_memory_is_taken():
    """More than the machine has is refused, with how much is needed."""
    with pytest.raises(StageError, match=r"need 1000000000 MB .* Lower batch_size"):
        check_room(10**15)
    slots = SlotFile()
    try:
        with pytest.raises(StageError, match="shared memory more"):
            slots.acquire(10**15)
    finally:
        slots.close()


def test_cores_are_those_of_this_process():
    """Affinity counts, and not what the machine has."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_rows_before_the_failure_are_with_the_loggers():
    """What was trained before a sample failed in a worker has been logged."""
    logger, model = InMemoryLogger(), torch.nn.Linear(6, 3)
    trainer = Trainer(
        placement="process", num_workers=1, run_dir=None, enable_progress_bar=False, device="cpu"
    )
    with pytest.raises(UserError):
        trainer.fit(
            model,
            torch.optim.SGD(model.parameters(), 0.05),
            Failing(20),
            loss_fn=F.cross_entropy,
            batch_size=4,
            loggers=[logger],
        )
    assert [row.step for row in logger.rows] == [1]


SCRIPT = """
import os, sys, time
import torch
from pipeline.data import as_source
from pipeline.workers import Processes
from tests.workers import Augmented, Hanging
{guard}
    source = as_source(
        {data}, name="data", batch_size=4, shuffle=False, drop_last=False, collate_fn=None, seed=0
    )
    processes = Processes(source, 2, 60, {num_threads})
    assert processes.wait_until_ready()
    batches = processes.batches(source.open(0), 4)
    first = next(batches)
    print("pids", *[worker.pid for worker in processes._pool._workers], processes._pool._nursery, flush=True)
    {end}
"""


def run_script(
    path, end, *, data="Augmented(64)", num_threads=1, guard='if __name__ == "__main__":', prefix=""
):
    """Start a script of its own; return the process and the processes that it has told of."""
    path.write_text(prefix + SCRIPT.format(data=data, num_threads=num_threads, guard=guard, end=end))
    home = str(Path(__file__).parents[2])
    script = subprocess.Popen(
        [sys.executable, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": home},
        start_new_session=True,
    )
    assert script.stdout is not None
    line = script.stdout.readline()
    return script, [int(each) for each in line.split()[1:]]


def all_end(pids, timeout_s=10):
    """Say whether processes that are no children of this one end in time."""
    for pid in pids:
        try:
            file = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        poller = select.poll()
        poller.register(file, select.POLLIN)
        try:
            has_ended = bool(poller.poll(timeout_s * 1e3))
        finally:
            os.close(file)
        if not has_ended:
            return False
    return True


@pytest.mark.parametrize(("signal_number", "num_threads"), [(signal.SIGKILL, 3), (signal.SIGTERM, 1)])
def test_no_orphan_is_left_when_the_trainer_is_killed(tmp_path, signal_number, num_threads):
    """Workers and nursery end with it, in the middle of a batch that would never end."""
    end = "for _ in batches: pass"
    script, pids = run_script(
        tmp_path / "script.py", end, data="Hanging(64, index=20)", num_threads=num_threads
    )
    with script:
        assert len(pids) == 3
        os.kill(script.pid, signal_number)
        script.wait()
        assert all_end(pids)
        script.stderr.read()


def test_a_terminals_ctrl_c_is_the_trainers_alone(tmp_path):
    """SIGINT to the whole group leaves the workers alive; they end when the trainer does."""
    end = """
    try:
        os.killpg(0, 2)
        time.sleep(30)
    except KeyboardInterrupt:
        print(len(next(batches)[0]), "more", flush=True)
    processes.close()
    """
    script, pids = run_script(tmp_path / "script.py", end)
    with script:
        assert script.stdout.readline() == "4 more\n"
        assert script.wait() == 0
        assert all_end(pids)
        assert "Traceback" not in script.stderr.read()


def test_a_script_without_a_guard_may_use_processes_for_a_dataset_of_a_module(tmp_path):
    """What is defined elsewhere is imported from there: the script is not run again."""
    script, pids = run_script(tmp_path / "script.py", "processes.close()", guard="if True:")
    with script:
        assert len(pids) == 3
        assert script.wait() == 0
        script.stderr.read()


OWN_CLASS = """
from torch.utils.data import Dataset
class Own(Dataset):
    def __len__(self): return 64
    def __getitem__(self, index): return index
"""


@pytest.mark.parametrize("is_guarded", [True, False])
def test_a_class_of_the_script_needs_a_guard(tmp_path, is_guarded):
    """With one the script is imported; without, the error shows what to write."""
    guard = 'if __name__ == "__main__":' if is_guarded else "if True:"
    script, pids = run_script(
        tmp_path / "script.py",
        "processes.close()",
        data="Own()",
        guard=guard,
        prefix=OWN_CLASS,
    )
    with script:
        code, errors = script.wait(), script.stderr.read()
    if is_guarded:
        assert code == 0, errors
    else:
        assert code == 1
        assert 'if __name__ == "__main__":' in errors
        assert "ConfigError" in errors
