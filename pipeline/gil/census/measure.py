"""Measure one callable: its held share alone, and what it and a neighbour do to each other."""

from __future__ import annotations

import sys
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from pipeline.concurrency import Scope
from pipeline.gil.live import GilAccount, gil_account
from pipeline.gil.marks import stage
from pipeline.gil.measuring.interpreter import handoff_counter

PERIOD_S = 0.00025
HOLDS_FROM, RELEASES_BELOW = 0.9, 0.1
BATCH_S = 0.002

RunMany = Callable[[int], object]
"""Calls what is measured so many times."""


@dataclass(frozen=True)
class CensusRow:
    """What was found of one callable.

    Args:
        name: What was called.
        held_ratio: Share of its time that it holds the GIL, running alone; None without a sampler.
        held_low: Lower end of the 95 % interval of it.
        held_high: Upper end of it.
        time_per_call_us: Its time alone, in microseconds.
        handoffs_per_call: How often the GIL changes hands during a call beside a thread of plain
            Python; None where that cannot be read.
        neighbour_slowdown: How many times longer a train step of many small operations takes while
            another thread makes these calls.
        slowdown_beside_python: How many times longer a call takes beside a thread of plain Python.
        verdict: ``holds`` from 90 % held on, ``releases`` below 10 %, else ``mixed``.
    """

    name: str
    held_ratio: float | None
    held_low: float | None
    held_high: float | None
    time_per_call_us: float
    handoffs_per_call: float | None
    neighbour_slowdown: float
    slowdown_beside_python: float
    verdict: Literal["holds", "mixed", "releases", "unknown"]


class Census:
    """Measures callables one after the other, for the length of a `with` block.

    Args:
        seconds: How long each is sampled.
        reference: A train step of many small operations.

    Attributes:
        why_not: Why there is no sampler; empty if there is one.

    Runs on:
        The calling thread, and one rival thread at a time.
    """

    def __init__(self, seconds: float, reference: Callable[[], object]) -> None:
        self._seconds, self._reference = seconds, reference
        self._stack = ExitStack()
        self._switches = handoff_counter()
        self._stage = stage("census")
        self.why_not = ""

    def __enter__(self) -> Census:
        self._account: GilAccount = self._stack.enter_context(gil_account(period_s=PERIOD_S))
        report = self._account.report()
        self.why_not = "" if report.backend != "signals" else report.doubts[0]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def measure(self, name: str, run_many: RunMany) -> CensusRow:
        """Measure a callable; it is called on this thread and on another, never on both at once."""
        count, call_s = self._size(run_many)
        held, low, high = self._held(run_many, count)
        beside_s, handoffs = self._beside_python(run_many, call_s)
        return CensusRow(
            name,
            held,
            low,
            high,
            time_per_call_us=1e6 * call_s,
            handoffs_per_call=handoffs,
            neighbour_slowdown=self._neighbour_slowdown(run_many, count),
            slowdown_beside_python=beside_s / call_s,
            verdict=verdict_of(held),
        )

    def _size(self, run_many: RunMany) -> tuple[int, float]:
        """Return how many calls last some milliseconds, and how long one takes; it warms up, too."""
        count = 1
        run_many(1)
        while (taken_s := _time(run_many, count)) < BATCH_S and count < 1 << 20:
            count *= 2
        taken_s = min(taken_s, _time(run_many, count))
        return count, taken_s / count

    def _held(self, run_many: RunMany, count: int) -> tuple[float | None, float | None, float | None]:
        with self._stage:
            self._account.restart()
            until_s = time.perf_counter() + self._seconds
            while time.perf_counter() < until_s:
                run_many(count)
        report = self._account.report()
        thread = threading.current_thread().name
        share = next((s for s in report.stages if (s.thread, s.stage) == (thread, self._stage.name)), None)
        if share is None or not share.num_samples:
            return None, None, None
        return share.held_ratio, share.held_low, share.held_high

    def _beside_python(self, run_many: RunMany, call_s: float) -> tuple[float, float | None]:
        """Return the time of a call beside plain Python, and the hand-offs in it."""
        with Scope() as scope:
            rival = Rival(spin)
            scope.start(rival.run, name="plain-python", stop=rival.stop)
            switches_before = self._switches() if self._switches else 0
            count, began_s, batch = 0, time.perf_counter(), 1
            while (taken_s := time.perf_counter() - began_s) < self._seconds or not count:
                run_many(batch)
                count += batch
                batch = max(1, min(2 * batch, int(0.1 * self._seconds / call_s)))
            switches = self._switches() - switches_before if self._switches else None
        return taken_s / count, None if switches is None else switches / count

    def _neighbour_slowdown(self, run_many: RunMany, count: int) -> float:
        """Return how many times longer the reference step takes beside these calls."""
        alone_s = self._time_reference(self._seconds / 4)
        with Scope() as scope:
            rival = Rival(lambda: run_many(count))
            scope.start(rival.run, name="census", stop=rival.stop)
            beside_s = self._time_reference(self._seconds)
        return beside_s / alone_s

    def _time_reference(self, seconds: float) -> float:
        began_s, count = time.perf_counter(), 0
        while (taken_s := time.perf_counter() - began_s) < seconds or not count:
            self._reference()
            count += 1
        return taken_s / count


class Rival:
    """Calls a function over and over until it is stopped."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work, self._is_stopped = work, False

    def run(self) -> None:
        """Work; the rival thread."""
        while not self._is_stopped:
            self._work()

    def stop(self) -> None:
        """Let `run` return after the call under way."""
        self._is_stopped = True


def spin() -> None:
    """Run plain Python for some 10 µs."""
    for _ in range(300):
        pass


def verdict_of(held: float | None) -> Literal["holds", "mixed", "releases", "unknown"]:
    """Return the word for a held share."""
    if held is None:
        return "unknown"
    return "holds" if held >= HOLDS_FROM else "releases" if held < RELEASES_BELOW else "mixed"


def reference_step() -> tuple[str, Callable[[], object]]:
    """Return a train step of many small operations, and what it is; without torch, hashes stand in."""
    try:
        import torch
    except ImportError:
        return "100 hashes of 4 KB", _hash_step
    torch.set_num_threads(1)  # a core is left for the rival, or the sampler
    layers = [part for _ in range(6) for part in (torch.nn.Linear(64, 64), torch.nn.ReLU())]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(64, 1))
    optimizer, inputs = torch.optim.SGD(model.parameters(), lr=1e-3), torch.randn(32, 64)

    def step() -> None:
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    return "a train step of 7 linear layers of 64 with SGD", step


def _hash_step() -> None:
    import hashlib

    for _ in range(100):
        hashlib.sha256(bytes(4096)).digest()


def _time(run_many: RunMany, count: int) -> float:
    began_s = time.perf_counter()
    run_many(count)
    return time.perf_counter() - began_s


def call_many(function: Callable[[], object]) -> RunMany:
    """Return what calls a function so many times."""

    def run_many(count: int) -> None:
        for _ in range(count):
            function()

    return run_many


def check_statement(statement: str, setup: str) -> None:
    """See whether they compile.

    Raises:
        SyntaxError: If one does not; its file name says which.
    """
    compile(setup, "<setup>", "exec")
    compile(statement, "<stmt>", "exec")


def statement_many(statement: str, setup: str) -> RunMany:
    """Return what runs a statement so many times after a setup that runs once, as `timeit` means them.

    Raises:
        Exception: The setup's own.
    """
    setup_lines = textwrap.indent(setup or "pass", 4 * " ")
    statement_lines = textwrap.indent(statement + "\npass", 12 * " ")  # it may be a comment alone
    source = (
        "def _statements():\n"
        f"{setup_lines}\n"
        "    _count = yield\n"
        "    while True:\n"
        "        for _ in range(_count):\n"
        f"{statement_lines}\n"
        "        _count = yield\n"
    )
    namespace: dict[str, Any] = {}
    exec(compile(source, "<census>", "exec"), namespace)
    statements = namespace["_statements"]()
    next(statements)
    return statements.send  # type: ignore[no-any-return]


def describe(row: CensusRow, width: int) -> str:
    """Return a row of the table."""
    held = "      not known     "
    if row.held_ratio is not None:
        held = f"{row.held_ratio:6.1%} [{row.held_low:4.0%}, {row.held_high:4.0%}]"
    handoffs = "-" if row.handoffs_per_call is None else f"{row.handoffs_per_call:.3g}"
    return (
        f"{row.name[:width]:{width}} {row.verdict:9} {held} {row.time_per_call_us:12,.1f} {handoffs:>9} "
        f"{row.neighbour_slowdown:9.2f} {row.slowdown_beside_python:9.2f}"
    )


def table_head(width: int) -> str:
    """Return the head of the table."""
    return (
        f"{'':{width}} {'':9} {'held, 95 % interval':>20} {'time/call':>12} {'hand-offs':>9} {'slows a':>9} "
        f"{'slowed by':>9}\n"
        f"{'callable':{width}} {'verdict':9} {'':>20} {'us':>12} {'per call':>9} {'step x':>9} "
        f"{'Python x':>9}"
    )


def warn(message: str) -> None:
    """Say something that is no row."""
    print(message, file=sys.stderr, flush=True)
