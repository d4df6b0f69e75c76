"""What a review found: threads that change, descriptors that are missing, scripts that do odd things."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

import pipeline
from pipeline import GilAccountError, gil_account, stage
from pipeline.errors import warn_harmlessly
from pipeline.gil import stage_cell, stage_id
from pipeline.gil.account import stage_shares
from pipeline.gil.command import main
from pipeline.gil.measuring import calibrate
from pipeline.gil.measuring import sampler_client as sampler
from pipeline.gil.measuring.interpreter import switch_interval
from pipeline.gil.measuring.selftest import release_gil
from pipeline.gil.sampler.priority import PROBE_WINDOWS, WINDOW, Priority
from pipeline.gil.sampler.sampler import Sampler as ChildSampler
from pipeline.gil.sampler.thread_list import ENDED, MAX_ENDED, ThreadList
from pipeline.watch.clock import FORWARD, StepClock
from tests.gil.test_account import NAMES, STAGES, answer
from tests.gil.test_commands import own_environment, run_script


def test_a_stage_around_a_yield_crashes_nobody():
    """A generator may be finished by another thread than the one that began it."""

    def samples():
        with stage("decode"):
            yield 1
            yield 2

    generator, seen = samples(), []
    next(generator)
    thread = threading.Thread(target=lambda: seen.extend(generator))
    thread.start()
    thread.join()
    stage_cell()[0] = 0
    assert seen == [2]


def test_times_are_weighted_as_the_shares_are():
    """What a late sampler saw too much of takes no more time than the kernel allows."""
    counts = [[7, 1, "N", 0, 0, 300], [7, 2, "W", 8, 0, 700]]
    threads = [[7, "python", 2.0, 1.8], [8, "python", 2.0, 1.0]]
    shares = {
        each.stage: each for each in stage_shares(answer(counts=counts, threads=threads), NAMES, STAGES)
    }
    assert shares["forward"].time_s == pytest.approx(1.8)
    assert shares["fetch"].time_s == pytest.approx(0.2)


def test_a_thread_that_cannot_be_started_leaves_the_cheap_signals(monkeypatch):
    """As where a container's limit of processes is reached."""

    def no_thread(count):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(calibrate, "parked", no_thread)
    with gil_account() as account:
        pass
    assert "can't start new thread" in account.report().doubts[0]


def test_many_open_files_are_no_obstacle():
    """Descriptors beyond 1023 are beyond `select`."""
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with gil_account() as account:
            assert account.report().backend in sampler.BACKENDS
    finally:
        for fd in files:
            os.close(fd)


def test_the_sampler_ends_by_itself_beside_a_fork():
    """A forked process keeps its input open; it is told to stop."""
    reading, writing = os.pipe()
    with gil_account() as account:
        process = account._sampler._process
        pid = os.fork()
        if pid == 0:
            os.read(reading, 1)
            os._exit(0)
    os.write(writing, b"x")
    os.waitpid(pid, 0)
    os.close(reading)
    os.close(writing)
    assert process.returncode == 0


def test_an_interrupted_question_is_not_answered_to_the_next(monkeypatch):
    """Its answer would come for another one."""
    with gil_account() as account:
        inner = account._sampler

        def interrupted():
            raise KeyboardInterrupt

        monkeypatch.setattr(inner, "_read_line", interrupted)
        with pytest.raises(KeyboardInterrupt):
            account.report()
        monkeypatch.undo()
        with pytest.raises(GilAccountError, match="interrupted by KeyboardInterrupt"):
            account.report()


def test_standard_input_may_be_closed():
    """The sampler's own pipes then must not collide with what it reads."""
    code = "from pipeline.gil.command import main; raise SystemExit(main(['check']))"
    done = subprocess.run(
        f'"{sys.executable}" -c "{code}" <&-',
        shell=True,
        capture_output=True,
        text=True,
        env=own_environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_switch_interval_survives():
    """It is kept in whole microseconds, and cut to them."""
    before_s = sys.getswitchinterval()
    try:
        sys.setswitchinterval(15e-6)
        for _ in range(3):
            with switch_interval(0.01):
                pass
        assert sys.getswitchinterval() == pytest.approx(15e-6)
    finally:
        sys.setswitchinterval(before_s)


def test_submodules_are_there_without_an_import_of_their_own():
    """As they were when the package imported everything."""
    code = "import pipeline; print(pipeline.metrics.__name__, hasattr(pipeline, 'nothing'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=own_environment())
    assert done.stdout == "pipeline.metrics False\n"
    assert set(pipeline.__all__) <= set(dir(pipeline))


def test_every_public_name_has_a_home():
    """The list for tools, the list for people and the table of homes are one."""
    homes = {name for names in pipeline._HOMES.values() for name in names}
    assert homes == set(pipeline.__all__)
    for name in pipeline.__all__:
        assert getattr(pipeline, name) is not None


def test_a_warning_that_is_an_error_is_printed(capfd):
    """A look at the GIL ends no training, whatever the filters say; here they make errors of warnings."""
    warn_harmlessly("the loop waits")
    assert "warning: the loop waits" in capfd.readouterr().err


def test_steps_are_counted_once():
    """The end of an epoch is training time, but no step."""
    clock = StepClock()
    clock.restart()
    clock.enter(FORWARD)
    clock.step_ended()
    clock.training_paused()
    clock.leave()
    assert clock.num_steps == 1


class EndedThread:
    def __init__(self, tid):
        self.tid = tid


def test_many_threads_that_ended_become_one():
    """So that a long run with short threads stays small; nothing counted is lost."""
    threads = ThreadList(memory=None, pid=0, chain=None)
    threads.ended = [EndedThread(tid) for tid in range(MAX_ENDED + 1)]
    given_up = threads.forget_ended()
    assert len(threads.ended) + len(given_up) == MAX_ENDED + 1
    child = ChildSampler.__new__(ChildSampler)
    child._counts = Counter({(0, 1, "W", 1, 2): 3, (1, 1, "W", 1, 2): 4, (9000, 1, "W", 1, 2): 5})
    child._holders = Counter({(0, 64, True): 1, (1, 64, True): 2})
    child._merge_ended(given_up)
    assert child._counts == {(ENDED, 1, "W", ENDED, 2): 7, (9000, 1, "W", ENDED, 2): 5}
    assert child._holders == {(ENDED, 64, True): 3}


@pytest.fixture
def scheduler(monkeypatch):
    """Take note of the priorities that are asked for."""
    asked = []
    monkeypatch.setattr(os, "sched_setscheduler", lambda pid, policy, parameter: asked.append(policy))
    return asked


def test_real_time_priority_is_asked_for_when_the_sampler_is_late(scheduler):
    """And given back for a try, since it takes a core from whoever runs there."""
    priority = Priority()
    for _ in range(WINDOW):
        priority.note(0.0001)
    assert scheduler == []
    for _ in range(WINDOW):
        priority.note(0.002)
    assert scheduler == [os.SCHED_FIFO]
    for _ in range(PROBE_WINDOWS * WINDOW):
        priority.note(0.0001)
    assert scheduler == [os.SCHED_FIFO, os.SCHED_OTHER]
    assert not priority.is_realtime


def test_a_priority_that_is_refused_is_not_asked_for_again(monkeypatch):
    """The lateness in the report tells."""
    asked = []

    def refuse(*arguments):
        asked.append(arguments)
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    priority = Priority()
    for _ in range(10 * WINDOW):
        priority.note(0.002)
    assert len(asked) == 1
    assert not priority.is_realtime


def test_a_script_may_close_its_output():
    """The exit code stays its own."""
    assert run_script("import sys; sys.stdout.close()").returncode == 0


def test_a_script_may_change_its_folder():
    """The report goes where it was asked for, and the script's own file keeps its name."""
    Path("sub").mkdir()
    done = run_script(
        "import os; os.chdir('sub'); print(os.path.isabs(__file__))", options=["--json", "r.json"]
    )
    assert done.stdout == "True\n"
    assert json.loads(Path("r.json").read_text())["num_samples"] >= 0


def test_a_script_is_waited_for():
    """Its threads may go on when its last line is done."""
    text = """
import threading, time
def work():
    time.sleep(0.3)
    print("done")
threading.Thread(target=work, name="late").start()
"""
    done = run_script(text, options=["--json", "r.json"])
    assert done.stdout == "done\n"
    assert json.loads(Path("r.json").read_text())["wall_s"] > 0.3


def test_a_script_may_have_an_excepthook():
    """It is called, as Python does."""
    done = run_script("import sys\nsys.excepthook = lambda *error: print('mine', error[0].__name__)\n1 / 0")
    assert done.stdout == "mine ZeroDivisionError\n"
    assert done.returncode == 1


def test_a_script_beside_a_pipeline_of_its_own_is_refused():
    """It would import this package instead."""
    Path("pipeline.py").write_text("")
    Path("script.py").write_text("import pipeline")
    assert main(["run", "script.py"]) == 2


def test_a_script_that_looks_for_torch_first_is_recognised():
    """Libraries ask whether it is there before it is imported."""
    text = (
        "import importlib.util\nimportlib.util.find_spec('torch')\nimport torch\n"
        "print(hasattr(torch.nn.Module.__call__, '__wrapped__'))"
    )
    assert run_script(text).stdout == "True\n"


def test_an_optimizer_that_fails_leaves_no_stage():
    """What comes after its error is not the optimizer's."""
    import torch

    from pipeline.gil.torch_stages import torch_stages

    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            assert stage_cell()[0] == stage_id("optimizer")
            raise RuntimeError("out of memory")

    own_step, before = Failing.step, stage_cell()[0]
    with torch_stages():
        optimizer = Failing([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="out of memory"):
                optimizer.step()
            assert stage_cell()[0] == before
    assert Failing.step is own_step or getattr(Failing.step, "hooked", False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "no.such.module"], "no.such.module is no module"),
        (["--trace", "nowhere/t.json", "script.py"], "the folder nowhere does not exist"),
        (["--period-ms", "0", "script.py"], "--period-ms must be above 0"),
        ([], "there is no script to run"),
    ],
)
def test_a_run_that_cannot_begin_says_why(arguments, message, capfd, monkeypatch):
    """Before anything is started."""
    Path("script.py").write_text("")
    monkeypatch.setattr(sys, "argv", sys.argv[:])
    monkeypatch.setattr(sys, "path", sys.path[:])
    assert main(["run", *arguments]) == 2
    assert message in capfd.readouterr().err


def test_what_setup_prints_is_not_json(capfd):
    """Nor what a module prints that is imported."""
    Path("noisy.py").write_text("print('imported')\ndef f(): pass\n")
    sys.path.insert(0, os.getcwd())
    try:
        main(
            ["census", "--json", "--seconds", "0.02", "--setup", "print('hi')", "--stmt", "1 + 1", "noisy:f"]
        )
    finally:
        sys.path.pop(0)
    assert len(json.loads(capfd.readouterr().out)) == 2


def test_a_setup_that_fails_is_named(capfd):
    """And the exit code says that something is missing."""
    assert main(["census", "--seconds", "0.02", "--setup", "1 / 0", "--stmt", "1 + 1"]) == 1
    assert "failed: 1 + 1: ZeroDivisionError" in capfd.readouterr().err


def test_a_statement_may_be_a_comment(capfd):
    """As with timeit."""
    assert main(["census", "--json", "--seconds", "0.02", "--stmt", "# nothing"]) == 0


def test_beside_busy_threads_the_self_test_holds():
    """What the caller waits for the GIL before a known call is not the call's."""
    stop = threading.Event()

    def spin():
        while not stop.is_set():
            sum(range(2000))

    crew = [threading.Thread(target=spin) for _ in range(2)]
    for thread in crew:
        thread.start()
    try:
        with gil_account() as account:
            release_gil(1000)
            backend = account.report().backend
    finally:
        stop.set()
        for thread in crew:
            thread.join()
    assert backend in ("waiters", "flags", "counts", "held")


def test_a_stopped_account_leaves_no_process():
    """Whatever was done to its sampler before."""
    with gil_account() as account:
        pid = account._sampler._process.pid
        os.kill(pid, signal.SIGSTOP)
        os.kill(pid, signal.SIGCONT)
    while Path(f"/proc/{pid}").exists():
        release_gil(1000)
