"""The processes that keep the workers: killed at any moment, and deaf to what is sent to all."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from pipeline.concurrency import Child, fork_server
from pipeline.concurrency.processes import fork_server_client as server
from pipeline.data import as_source
from pipeline.errors import WorkerDiedError
from pipeline.gil.measuring.sampler_client import Sampler
from pipeline.workers import Processes
from pipeline.workers.processes import MODULES
from tests.faults.test_workers import all_end, all_of, assert_equal, run_script
from tests.workers import Augmented, Stream

TAKES_ITS_PLACE = "the process that has the dataset.* is gone.*Another one takes its place"


@pytest.fixture
def own_server(monkeypatch):
    """Return a fork server that this test may kill."""
    monkeypatch.setattr(server, "_server", None)
    yield fork_server(MODULES)
    fork_server().close()


def opened(data, **arguments):
    """Return a source and its worker processes, on their way."""
    arguments = {"batch_size": 4, "shuffle": False, "drop_last": False, "collate_fn": None, **arguments}
    source = as_source(data, name="data", seed=0, **arguments)
    return source, Processes(source, 2, 60)


def kill(pid):
    """Kill a process, and return when it has ended."""
    os.kill(pid, signal.SIGKILL)
    assert all_end([pid])


def kill_nursery(processes):
    """Kill the process that has the dataset, and return when its workers have ended too."""
    pool = processes._pool
    workers = [each.pid for each in pool._workers]
    while not pool._nursery:  # it has not said its number yet
        assert not pool._is_ready
        pool._start_workers()
    kill(pool._nursery)
    assert all_end(workers)


@pytest.mark.parametrize("moment", ["before there are workers", "before the epoch", "in its middle"])
def test_another_nursery_takes_the_place_of_one_that_was_killed(moment):
    """All batches come, in order, with the numbers that they would have had; and it is said."""
    source, processes = opened(Augmented(40, draws=("torch", "python", "numpy")))
    found = []
    try:
        if moment == "before there are workers":
            kill_nursery(processes)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert processes.wait_until_ready()
            if moment == "before the epoch":
                kill_nursery(processes)
            batches = processes.batches(source.open(0), 6)
            found = [next(batches), next(batches)]
            if moment == "in its middle":
                kill_nursery(processes)
            found += batches
    finally:
        processes.close()
    assert [re.search(TAKES_ITS_PLACE, str(each.message)) is not None for each in caught] == [True]
    assert len(found) == 10
    assert_equal(found, all_in_isolation(source))


def all_in_isolation(source):
    """Return the batches of an epoch, made by processes that nobody kills."""
    processes = Processes(source, 1, 60)
    try:
        assert processes.wait_until_ready()
        return list(processes.batches(source.open(0), 4))
    finally:
        processes.close()


def test_shards_are_read_again_after_the_nursery_was_killed():
    """Whoever takes over reads its shard from the start, up to the batch that comes next."""
    source, processes = opened(Stream([9, 5, 11, 7]), num_shards=2)
    try:
        assert processes.wait_until_ready()
        batches = processes.batches(source.open(0), 4)
        found = [next(batches) for _ in range(3)]
        kill_nursery(processes)
        with pytest.warns(RuntimeWarning, match=TAKES_ITS_PLACE):
            found += batches
    finally:
        processes.close()
    assert_equal(found, list(all_in_isolation(source)))


@pytest.mark.filterwarnings("ignore:the process that has the dataset:RuntimeWarning")
def test_a_nursery_that_is_killed_twice_ends_the_run():
    """The error says which process it was and what to do; closing, and asking again, raise nothing else."""
    source, processes = opened(Augmented(400))
    try:
        assert processes.wait_until_ready()
        batches = processes.batches(source.open(0), 4)
        next(batches)
        kill_nursery(processes)
        for _ in range(10):  # more than were answered before
            next(batches)
        kill_nursery(processes)
        with pytest.raises(WorkerDiedError, match=r"process that has the dataset.*twice.*oom.*num_workers"):
            list(batches)
        with pytest.raises(WorkerDiedError, match="twice"):
            processes.is_ready(2)
    finally:
        processes.close()


def test_the_fork_server_is_killed_before_there_are_workers(own_server):
    """Another one is started, which is said."""
    source, processes = opened(Augmented(8))
    try:
        kill(own_server._process.pid)
        with pytest.warns(RuntimeWarning, match="is gone, and they with it"):
            assert processes.wait_until_ready()
        assert len(list(processes.batches(source.open(0), 2))) == 2
    finally:
        processes.close()


def test_workers_outlive_the_fork_server(own_server):
    """Two loaders that share it lose nothing when it is killed; a third one has another one started."""
    both = [opened(Augmented(40)) for _ in range(2)]
    third = None
    try:
        assert all(processes.wait_until_ready() for _, processes in both)
        batches = [processes.batches(source.open(0), 4) for source, processes in both]
        found = [[next(each)] for each in batches]
        kill(own_server._process.pid)
        third = opened(Augmented(8))
        assert third[1].wait_until_ready()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for each, further in zip(found, batches, strict=True):
                each += further
        assert [len(each) for each in found] == [10, 10]
        assert fork_server() is not own_server
    finally:
        for _, processes in [*both, *([third] if third else [])]:
            processes.close()


def test_a_server_that_dies_as_it_is_asked_is_replaced(own_server, monkeypatch):
    """It was alive when it was looked at, and gone when it was to fork."""
    monkeypatch.setattr(
        server.ForkServer, "is_usable", property(lambda self: self._process.returncode is None)
    )
    kill(own_server._process.pid)
    source, processes = opened(Augmented(8))
    try:
        assert processes.wait_until_ready()
        assert len(list(processes.batches(source.open(0), 2))) == 2
    finally:
        processes.close()


def test_no_orphan_is_left_when_server_and_trainer_are_killed(tmp_path):
    """A nursery without a server looks at its owner itself."""
    end = """
    import pipeline.concurrency.processes.fork_server_client as server
    print(server._server._process.pid, flush=True)
    for _ in batches: pass
    """
    script, pids = run_script(tmp_path / "script.py", end, data="Hanging(64, index=20)")
    with script:
        keeper = int(script.stdout.readline())
        kill(keeper)
        assert len(pids) == 3
        script.kill()
        script.wait()
        assert all_end(pids)
        script.stderr.read()


TO_ALL = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


class Counter:
    """What a process of its own keeps."""

    count = 0

    def add(self):
        self.count += 1

    def tell(self):
        raise RuntimeError(f"counted {self.count}")


def test_workers_and_their_keepers_are_deaf_to_what_is_sent_to_all(own_server):
    """Each of the signals, to each process, at work and while the server starts: all batches come."""
    starting = own_server._process.pid
    for number in TO_ALL:
        os.kill(starting, number)
    source, processes = opened(Augmented(40))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert processes.wait_until_ready()
            pool = processes._pool
            batches = processes.batches(source.open(0), 4)
            found = [next(batches)]
            for number in TO_ALL:
                for pid in (starting, pool._nursery, *(each.pid for each in pool._workers)):
                    os.kill(pid, number)
            found += batches
        assert_equal(found, all_of(source))
    finally:
        processes.close()


def test_a_loggers_process_and_the_sampler_are_deaf_too():
    """From their first instruction on."""
    child = Child(Counter)
    with Sampler() as sampler:
        for number in TO_ALL:
            os.kill(child._process.pid, number)
            os.kill(sampler._process.pid, number)
        child.send([("add", ()), ("add", ())])
        child.send([("tell", ())])
        with pytest.raises(RuntimeError, match="counted 2"):
            child.wait()
        assert sampler.ask("report")
    child.close()


CHILD = """
import os
from pipeline.concurrency import Child
from tests.faults.test_keepers import Forgetful
child = Child(Forgetful)
if os.fork() == 0:
    os.read(0, 1)
print(child._process.pid, flush=True)
os.kill(os.getpid(), 9)
"""


class Forgetful:
    """Nothing."""


def test_a_loggers_process_ends_with_its_owner_though_a_fork_has_its_pipe(tmp_path):
    """A DataLoader's worker that was forked holds the pipe open; the owner itself is looked at."""
    owner = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    with owner:
        pid = int(owner.stdout.readline())
        assert owner.wait() == -signal.SIGKILL
        assert all_end([pid], timeout_s=30)


class Starter(Augmented):
    """Starts a program at each sample, and a fork, and ends both with SIGTERM."""

    def __getitem__(self, index):
        program = subprocess.Popen(["sleep", "60"])
        program.terminate()
        if (fork := os.fork()) == 0:
            signal.pause()
            os._exit(0)
        os.kill(fork, signal.SIGTERM)
        return torch.tensor([program.wait(), os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])])


def test_what_a_dataset_starts_is_not_deaf():
    """Programs and forks of a worker end when they are told to, as everywhere."""
    source, processes = opened(Starter(4))
    try:
        assert processes.wait_until_ready()
        (found,) = processes.batches(source.open(0), 1)
        assert (found == -signal.SIGTERM).all()
    finally:
        processes.close()
