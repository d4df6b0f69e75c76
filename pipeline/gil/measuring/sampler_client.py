"""Start, ask and stop the sampler's process, and find out whether it may be believed."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from pipeline.concurrency.processes.ignored_signals import starting_deaf
from pipeline.errors import GilAccountError
from pipeline.gil import marks
from pipeline.gil.measuring import calibrate
from pipeline.gil.measuring.interpreter import find_gil, is_gil_enabled
from pipeline.gil.measuring.process_memory import Memory
from pipeline.gil.measuring.selftest import TEST_PERIOD_S, sees_waiters

PERIOD_S = 0.001
MAX_EVENTS = 50_000  # of a trace; the oldest go first
REPLY_TIMEOUT_S, END_TIMEOUT_S = 10.0, 2.0
PR_SET_PTRACER = 0x59616D61
BACKENDS = {
    "flags": "the waiting flag that CPython 3.15 publishes",
    "waiters": "the GIL's own count of waiters, and the system calls of each thread",
    "counts": "the GIL's own count of waiters; not which system call each thread is in",
    "held": "who holds the GIL; who waits for it cannot be seen here",
    "no-gil": "running and blocked only: the GIL is off",
}
_ROOT = Path(__file__).resolve().parents[3]
_START = "import sys; sys.path.append({root!r}); from pipeline.gil.sampler.main import main; main()"
_starting = threading.Lock()
_user_pid = 0  # the process that has a sampler; another value than ours is of a process we were forked from


class SecondAccountError(GilAccountError):
    """An account of this process runs already."""


class Sampler:
    """The sampler's process, for the length of a `with` block.

    Args:
        period_s: Mean time between two samples, in seconds.
        has_trace: Keep when each thread began to do what.
        has_functions: Keep which Python function holds the GIL.

    Attributes:
        backend: How it decides, one of `BACKENDS`.

    Raises:
        GilAccountError: If the GIL cannot be sampled here; nothing is left running.

    Runs on:
        Any thread. Starting takes some 0.2 s and holds the GIL for some 0.05 s of them.
    """

    def __init__(
        self, *, period_s: float = PERIOD_S, has_trace: bool = False, has_functions: bool = False
    ) -> None:
        self._period_s, self._has_trace, self._has_functions = period_s, has_trace, has_functions
        self._asking = threading.Lock()
        self._received, self._failure = b"", ""
        self.backend = ""

    def __enter__(self) -> Sampler:
        self._owner_pid = os.getpid()
        _claim()
        try:
            self._process = self._start()
        except RuntimeError as error:  # no new thread can be started
            _release()
            raise GilAccountError(f"the sampler could not be started: {error}") from error
        except BaseException:
            _release()
            raise
        try:
            self.backend = self._choose_backend()
            self.ask(f"period {self._period_s}")
            self.ask("reset")
        except RuntimeError as error:
            self._end()
            raise GilAccountError(f"the sampler could not be started: {error}") from error
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if os.getpid() != self._owner_pid:
            return  # a forked process: the sampler is its parent's
        self._end()

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command and return its answer.

        Raises:
            GilAccountError: If the sampler's process has died or does not answer.
        """
        if os.getpid() != self._owner_pid:
            raise GilAccountError("the account belongs to the process that this one was forked from")
        with self._asking:
            if self._failure:  # an answer that came too late must not be taken for the next one's
                raise GilAccountError(self._failure)
            try:
                self._stdin.write(command.encode() + b"\n")
                answer = json.loads(self._read_line())
            except (BrokenPipeError, ValueError) as error:
                self._failure = self._describe_death()
                raise GilAccountError(self._failure) from error
            except BaseException as error:
                self._failure = f"the account was interrupted by {type(error).__name__}"
                raise
        return dict(answer)

    # ---- its process

    def _start(self) -> subprocess.Popen[bytes]:
        if not sys.executable:
            raise GilAccountError("sys.executable is empty: there is no Python to run the sampler with")
        marks.forget_forked_threads()
        memory_fd = _open_memory()
        try:
            self._config = self._explore(memory_fd)
            command = [sys.executable, "-I", "-S", "-c", _START.format(root=str(_ROOT))]
            with starting_deaf():
                process = subprocess.Popen(
                    [*command, json.dumps(self._config)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    bufsize=0,
                    pass_fds=[memory_fd],
                    process_group=0,  # a terminal's signals are not for it
                )
        except OSError as error:
            raise GilAccountError(f"the sampler's process could not be started: {error}") from error
        finally:
            os.close(memory_fd)
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise AssertionError("all three were asked for")
        self._stdin, self._stdout, self._stderr = process.stdin, process.stdout, process.stderr
        _allow_tracing(process.pid)
        return process

    def _explore(self, memory_fd: int) -> dict[str, Any]:
        config: dict[str, Any] = {
            "pid": os.getpid(),
            "memory_fd": memory_fd,
            "period_s": TEST_PERIOD_S,
            "table": marks.table.buffer_info()[0],
            "table_bytes": 8 * len(marks.table),
            "max_events": MAX_EVENTS if self._has_trace else 0,
        }
        if not is_gil_enabled():
            return {**config, "gil": 0, "gil_bytes": 0, "waiters": [], "requested": 0} | {
                "chain": None,
                "frames": None,
            }
        return config | _calibration(self._has_functions)

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            self._stdin.write(b"stop\n")  # its input may not end: a forked process has a copy of the pipe
        self._stdin.close()
        try:
            self._process.wait(timeout=END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stdout.close()
        self._stderr.close()
        _release()

    def _read_line(self) -> bytes:
        deadline_s = time.monotonic() + REPLY_TIMEOUT_S
        ready = select.poll()  # unlike `select`, it takes descriptors beyond 1023
        ready.register(self._stdout, select.POLLIN)
        while b"\n" not in self._received:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not ready.poll(1e3 * left_s):
                raise ValueError("no answer in time")
            if not (part := os.read(self._stdout.fileno(), 1 << 20)):
                raise ValueError("its output has ended")
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _describe_death(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        if self._process.returncode is None:
            return f"the sampler's process {self._process.pid} does not answer"
        says = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        last = f": {says[-1]}" if says else ""
        return f"the sampler's process has ended with {self._process.returncode}{last}"

    # ---- its self-test

    def _choose_backend(self) -> str:
        if not self._config["gil"]:
            return "no-gil"
        sees_waiting = sees_waiters(self.ask)
        knows_calls = self.ask("report")["knows_calls"]
        if not sees_waiting:
            return "held"
        if self._config["requested"]:
            return "flags"
        return "waiters" if knows_calls else "counts"


def _open_memory() -> int:
    try:
        fd = os.open("/proc/self/mem", os.O_RDONLY)
    except OSError as error:
        raise GilAccountError(f"/proc/self/mem cannot be opened: {error.strerror}") from error
    import fcntl  # there is none where there is no /proc

    try:
        # Above the three that the child's own pipes take, should one of ours be closed.
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(fd)


def _claim() -> None:
    global _user_pid
    with _starting:
        if _user_pid == os.getpid():
            raise SecondAccountError("an account of this process's GIL is running already. Leave it first.")
        _user_pid = os.getpid()


def _release() -> None:
    global _user_pid
    _user_pid = 0


@functools.cache
def _calibration(has_functions: bool) -> dict[str, Any]:
    """Return where everything is; it stays there as long as the process lives, and in its forks."""
    memory_fd = _open_memory()
    try:
        memory = Memory(memory_fd)
        gil = find_gil(memory)
        chain = calibrate.find_chain(memory, gil)
        requested = calibrate.find_requested(gil, chain)
        return {
            "gil": gil.address,
            "gil_bytes": gil.size_bytes,
            "chain": chain,
            "requested": requested,
            "waiters": [] if requested else calibrate.find_waiters(gil),
            "frames": calibrate.find_frames(memory) if has_functions else None,
        }
    finally:
        os.close(memory_fd)


def _allow_tracing(pid: int) -> None:
    """Let the sampler read which system call a thread is in, where Yama would forbid it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(pid), 0, 0, 0)
