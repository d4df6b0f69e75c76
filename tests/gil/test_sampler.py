"""The sampler against calls whose truth is known, and everything that can happen to it."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline import GilAccountError, gil_account, stage
from pipeline.gil.live import SampledAccount
from pipeline.gil.measuring import calibrate, interpreter, selftest
from pipeline.gil.measuring import sampler_client as sampler
from pipeline.gil.measuring.interpreter import find_gil, thread_state
from pipeline.gil.measuring.process_memory import Memory
from pipeline.gil.measuring.sampler_client import Sampler, SecondAccountError
from pipeline.gil.measuring.selftest import hold_gil as hold
from pipeline.gil.measuring.selftest import release_gil as release

MAIN = threading.main_thread().name


def loop(hold_us: int, release_us: int, seconds: float) -> float:
    """Hold the GIL and release it in turn; return for which share of the time it was held.

    A call takes as long as it takes: on a busy machine the thread gets its core back late.
    """
    began_s, released_s = time.perf_counter(), 0.0
    while (now_s := time.perf_counter()) < began_s + seconds:
        if hold_us:
            hold(hold_us)
            now_s = time.perf_counter()
        if release_us:
            release(release_us)
            released_s += time.perf_counter() - now_s
    return 1 - released_s / (time.perf_counter() - began_s)


@pytest.fixture
def memory():
    fd = os.open("/proc/self/mem", os.O_RDONLY)
    yield Memory(fd)
    os.close(fd)


@pytest.mark.parametrize("percent", [0, 25, 50, 75, 100])
def test_held_is_the_true_share(percent):
    """A loop of calls that hold and that release, of known length, reads as it is.

    One of three readings is enough: other programs may keep a thread off its core while it holds the GIL.
    """
    found = []
    for _ in range(3):
        with gil_account(period_s=0.0003) as account, stage("loop"):
            held_ratio = loop(20 * percent, 20 * (100 - percent), 0.8)
        found.append((account.report().stage(MAIN, "loop").held_ratio, held_ratio))
        if found[-1][0] == pytest.approx(held_ratio, abs=0.06):
            return
    pytest.fail(f"read {found}")


@pytest.mark.quiet
@pytest.mark.parametrize("percent", [0, 25, 50, 75, 100])
def test_held_is_within_three_points(percent):
    """On an idle machine, at the default rate."""
    with gil_account() as account, stage("loop"):
        loop(40 * percent, 40 * (100 - percent), 3)
    assert account.report().stage(MAIN, "loop").held_ratio == pytest.approx(percent / 100, abs=0.03)


def test_a_thread_that_waits_is_seen_with_whom_it_waits_for():
    """Beside a thread that holds the GIL, a thread that wants it waits, and that thread is blamed."""

    def holder():
        with stage("holding"):
            loop(20_000, 1_000, 0.8)

    with gil_account(period_s=0.0005) as account:
        other = threading.Thread(target=holder, name="holder")
        other.start()
        with stage("wanting"):
            loop(0, 1_000, 0.8)
        other.join()
    share = account.report().stage(MAIN, "wanting")
    assert share.waiting_ratio > 0.6
    assert share.held_ratio < 0.1
    assert share.blame["holder/holding"] > 0.9
    assert account.report().stage("holder", "holding").held_ratio > 0.8


def test_a_thread_blocked_elsewhere_does_not_wait_for_the_gil():
    """A lock is not the GIL, though both are futexes."""
    lock = threading.Lock()
    lock.acquire()
    with gil_account(period_s=0.0005) as account:
        other = threading.Thread(target=lock.acquire, name="locked out")
        other.start()
        loop(1_000, 1_000, 0.3)
        share = account.report().stage("locked out")
        lock.release()
        other.join()
    assert share.blocked_ratio > 0.9
    assert share.waiting_ratio < 0.1


def test_threads_that_never_registered_are_counted():
    """The interpreter's own list has the threads that were started in C, or by _thread."""
    done = threading.Event()

    def work():
        loop(2_000, 0, 0.4)
        done.set()

    with gil_account(period_s=0.0005) as account:
        _thread.start_new_thread(work, ())
        done.wait()
        held = [share.held_ratio for share in account.report().stages if share.thread != MAIN]
    assert max(held) > 0.5


def test_functions_that_hold_the_gil_are_named():
    """The innermost Python function of the holder, with its file and line."""

    def crunch():
        total = 0
        for number in range(20_000):
            total += number
        return total

    with gil_account(period_s=0.0005, functions=True) as account:
        until_s = time.perf_counter() + 0.4
        while time.perf_counter() < until_s:
            crunch()
    top = max(account.report().functions, key=lambda each: each.held_s)
    assert top.function.endswith("crunch")
    assert (top.file, top.line) == (__file__, crunch.__code__.co_firstlineno)


def test_threads_that_come_and_go_do_no_harm():
    """Hundreds of short threads, more than the table has rows, end in the middle of samples."""
    marked = stage("short")

    def work():
        with marked:
            release(200)

    with gil_account(period_s=0.0003) as account:
        for _ in range(20):
            crew = [threading.Thread(target=work) for _ in range(20)]
            for thread in crew:
                thread.start()
            for thread in crew:
                thread.join()
        report = account.report()
    assert report.num_samples > 0
    assert sum(share.time_s for share in report.stages if share.stage == "short") > 0


def test_a_second_account_is_refused_and_the_first_goes_on():
    """One sampler a process."""
    with gil_account() as account:
        with pytest.raises(SecondAccountError, match="running already"), gil_account():
            pass
        loop(1_000, 0, 0.05)
        assert account.report().num_samples > 0


def test_a_forked_process_marks_its_own_stages_and_disturbs_nobody():
    """In a fork, marks go to a copy, the account says that it is the parent's, and one may begin anew."""
    with gil_account(period_s=0.0005) as account:
        with stage("parent"):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    with stage("child"):
                        loop(1_000, 0, 0.05)
                    with pytest.raises(GilAccountError, match="forked from"):
                        account.report()
                    with gil_account(period_s=0.0005) as own, stage("child"):
                        loop(1_000, 0, 0.1)
                    code = 0 if own.report().stage(MAIN, "child").held_ratio > 0.5 else 2
                finally:
                    os._exit(code)
            loop(1_000, 0, 0.2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    report = account.report()
    assert report.stage(MAIN, "parent").held_ratio > 0.5
    assert "child" not in {share.stage for share in report.stages}


def sampler_pid(account: SampledAccount) -> int:
    return account._sampler._process.pid


def test_a_sampler_that_is_killed_is_a_clear_line():
    """What is measured goes on; the report says how the sampler ended; another account may begin."""
    with gil_account() as account:
        os.kill(sampler_pid(account), signal.SIGKILL)
        with pytest.raises(GilAccountError, match="has ended with -9"):
            account.report()
    with pytest.raises(GilAccountError, match="has ended with -9"):
        account.report()
    with gil_account() as account:
        assert account.report().backend in sampler.BACKENDS


def test_a_sampler_that_hangs_is_given_up_and_ended(monkeypatch):
    """No answer within the time-out is an error, and leaving the block still ends the process."""
    with gil_account() as account:
        monkeypatch.setattr(sampler, "REPLY_TIMEOUT_S", 0.1)
        monkeypatch.setattr(sampler, "END_TIMEOUT_S", 0.1)
        os.kill(sampler_pid(account), signal.SIGSTOP)
        with pytest.raises(GilAccountError, match="does not answer"):
            account.report()


def test_a_sampler_ends_with_its_parent():
    """Even if that is killed and can tell it nothing."""
    code = (
        "import sys, time\n"
        "from pipeline.gil import gil_account\n"
        "with gil_account() as account:\n"
        "    print(account._sampler._process.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
    )
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    folder = Path(f"/proc/{pid}")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended and is gone
        while "Z" not in folder.joinpath("stat").read_text().split()[2]:
            release(1_000)


def test_ctrl_c_of_the_terminal_does_not_reach_the_sampler():
    """It is in a process group of its own, and ignores SIGINT."""
    with gil_account() as account:
        assert os.getpgid(sampler_pid(account)) != os.getpgid(0)
        os.kill(sampler_pid(account), signal.SIGINT)
        loop(1_000, 0, 0.05)
        assert account.report().num_samples > 0


def test_an_unknown_interpreter_leaves_the_cheap_signals(monkeypatch):
    """Wall and thread time of the stages, and what is missing in words."""

    def not_found(memory):
        raise GilAccountError("the GIL was found at 0 addresses")

    monkeypatch.setattr(sampler, "_calibration", not_found)
    with gil_account() as account, stage("loop"):
        loop(5_000, 5_000, 0.1)
    report = account.report()
    assert report.backend == "signals"
    assert report.doubts == ["the GIL was found at 0 addresses: held, waiting and blame are missing"]
    (times,) = [each for each in report.times if each.stage == "loop"]
    assert times.wall_s > 0.1 > times.cpu_s
    with pytest.raises(GilAccountError, match="no trace"):
        account.write_trace("trace.json")


def test_without_proc_the_cheap_signals_are_left(monkeypatch):
    """A descriptor that cannot be had is a doubt in the report, and no error."""

    def refuse(path, flags, *rest):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(interpreter, "_gil_address", interpreter._gil_address.__wrapped__)
    with gil_account() as account:
        pass
    assert "/proc/self/mem cannot be opened: Permission denied" in account.report().doubts[0]
    assert "and the hand-offs" in account.report().doubts[0]


def test_a_self_test_that_fails_refuses(monkeypatch):
    """If a call that holds the GIL does not read so, nothing else is believed."""
    monkeypatch.setattr(selftest, "hold_gil", release)
    with pytest.raises(GilAccountError, match="self-test failed"), Sampler():
        pass


def test_a_gil_that_is_off_leaves_running_and_blocked(monkeypatch):
    """On a free-threaded build there is nothing to hold."""
    monkeypatch.setattr(sampler, "is_gil_enabled", lambda: False)
    with gil_account(period_s=0.0005) as account, stage("sleeping"):
        loop(20_000, 0, 0.3)
    report = account.report()
    share = report.stage(MAIN, "sleeping")
    assert report.backend == "no-gil"
    assert share.blocked_ratio > 0.8
    assert share.held_ratio == share.waiting_ratio == 0
    assert any("the GIL is off" in doubt for doubt in report.doubts)  # beside those of a busy machine


def test_a_gil_found_twice_is_in_doubt(monkeypatch, memory):
    """It must be found at one address."""
    monkeypatch.setattr(interpreter, "_search", lambda *_: {64, 128})
    with pytest.raises(GilAccountError, match="at 2 addresses"):
        find_gil(memory)


def test_a_gil_that_is_not_the_published_one_is_in_doubt(monkeypatch, memory):
    """From 3.13 on the interpreter publishes where it is."""
    monkeypatch.setattr(interpreter, "_published", lambda *_: (1, 2, 3))
    with pytest.raises(GilAccountError, match="publishes"):
        find_gil(memory)


def test_finding_the_gil_restores_the_switch_interval(memory):
    """The search changes it twice."""
    before = sys.getswitchinterval()
    find_gil(memory)
    assert sys.getswitchinterval() == before


def test_the_chain_has_every_thread(memory):
    """The interpreter's list is found by experiment."""
    gil = find_gil(memory)
    chain = calibrate.find_chain(memory, gil)
    with calibrate.parked(3) as crew:
        found = calibrate._walk(memory, chain["head"], chain["next"], chain["native_id"])
        expected = {member.tstate: member.tid for member in crew}
        expected[thread_state()] = threading.get_native_id()
        assert expected.items() <= found.items()


def test_a_wrong_address_is_no_crash(memory):
    """Memory that is not mapped reads as nothing."""
    assert memory.read(8, 64) == b""
    assert memory.word(2**63) == 0
