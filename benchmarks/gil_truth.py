"""How near is the GIL account to the truth, and what does it cost the measured process?

Truth: loops of two C calls of known length, one through ``ctypes.PyDLL``, which holds the GIL, one
through ``ctypes.CDLL``, which does not. What a loop takes beyond their sum, it waited for the GIL.
Unit: points, that is hundredths of a thread's time; the cost is the ratio of a train step's time with
the tool on to its time without. Beside ``py-spy record --gil`` and ``gilknocker`` where they are
installed (the extra ``bench``). py-spy counts samples that hold the GIL; its count while a loop holds
it all the time is taken for 100 %. gilknocker gives one number, the share of its knocks' time that it
waited. Neither has waiting by thread.

    python -m benchmarks.gil_truth [--seconds 3] [--rounds 30]

The account needs a core that is free; the last case takes it away, and shows what is left.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import describe_machine, interleave, median_interval
from pipeline.gil import gil_account, stage

PY_SPY_HZ = 250
hold, release = ctypes.PyDLL(None).usleep, ctypes.CDLL(None).usleep


@dataclass
class Loop:
    """A thread's loop of a call that holds and one that releases; 0 leaves a call out."""

    hold_us: int
    release_us: int
    held: float = 0.0
    waiting: float = 0.0

    def run(self, name: str, until_s: float, alone_s: tuple[float, float]) -> None:
        """Loop, and note the true shares."""
        began_s, count = time.perf_counter(), 0
        with stage(name):
            while time.perf_counter() < until_s:
                if self.hold_us:
                    hold(self.hold_us)
                if self.release_us:
                    release(self.release_us)
                count += 1
        wall_s = time.perf_counter() - began_s
        self.held = count * alone_s[0] / wall_s
        self.waiting = max(0.0, 1 - count * sum(alone_s) / wall_s)


@dataclass
class Case:
    """Threads that loop side by side."""

    name: str
    loops: list[Loop]
    num_spinners: int = 0
    num_busy_processes: int = 0
    found: dict[str, float] = field(default_factory=dict)


def cases() -> list[Case]:
    """Return the cases: one thread, several, a rival of plain Python, and no core left."""
    single = [
        Case(f"one thread, {held}% held", [Loop(40 * held, 40 * (100 - held))])
        for held in (0, 25, 50, 75, 100)
    ]
    return [
        *single,
        Case("one thread, 50% held, short calls", [Loop(50, 50)]),
        Case("two threads, 1 ms held, 3 ms not", [Loop(1000, 3000) for _ in range(2)]),
        Case("three threads, 2 ms held, 2 ms not", [Loop(2000, 2000) for _ in range(3)]),
        Case("2 ms not held, beside plain Python", [Loop(0, 2000)], num_spinners=1),
        Case("the same, no core left", [Loop(0, 2000)], num_spinners=1, num_busy_processes=2),
    ]


def time_alone(call: Callable[[int], Any], us: int) -> float:
    """Return how long a call takes when nothing else runs, in seconds."""
    if not us:
        return 0.0
    times = []
    for _ in range(60):
        began_s = time.perf_counter()
        call(us)
        times.append(time.perf_counter() - began_s)
    return statistics.median(times)


def run_case(case: Case, seconds: float) -> None:
    """Run a case's threads for so long."""
    alone_s = [(time_alone(hold, loop.hold_us), time_alone(release, loop.release_us)) for loop in case.loops]
    burners = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(case.num_busy_processes)
    ]
    until_s = time.perf_counter() + seconds
    threads = [
        threading.Thread(target=loop.run, args=(f"loop {number}", until_s, alone), name=f"loop {number}")
        for number, (loop, alone) in enumerate(zip(case.loops, alone_s, strict=True))
    ]
    threads += [threading.Thread(target=spin, args=(until_s,)) for _ in range(case.num_spinners)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for burner in burners:
        burner.kill()
        burner.wait()


def spin(until_s: float) -> None:
    """Run plain Python."""
    while time.perf_counter() < until_s:
        for _ in range(1000):
            pass


def measure_account(case: Case, seconds: float) -> str:
    """Return the account's shares beside the true ones, for each looping thread."""
    with gil_account() as account:
        run_case(case, seconds)
        report = account.report()
    parts = []
    for number, loop in enumerate(case.loops):
        share = report.stage(f"loop {number}", f"loop {number}")
        parts.append(
            f"held {share.held_ratio:6.1%} of {loop.held:6.1%} "
            f"({100 * (share.held_ratio - loop.held):+5.1f})  "
            f"waiting {share.waiting_ratio:6.1%} of {loop.waiting:6.1%} "
            f"({100 * (share.waiting_ratio - loop.waiting):+5.1f})"
        )
    doubt = "  DOUBT: " + "; ".join(report.doubts) if report.doubts else ""
    return f"\n{'':36}".join(parts) + doubt


def measure_others(case: Case, seconds: float) -> str:
    """Return what py-spy and gilknocker say of the share held by all threads together."""
    said = []
    if shutil.which("py-spy"):
        said.append(f"py-spy {count_py_spy(case, seconds) / full_count_py_spy(seconds):6.1%}")
    if knocker := start_gilknocker():
        run_case(case, seconds)
        said.append(f"gilknocker {knocker.contention_metric:6.1%}")
        knocker.stop()
    truth = min(1.0, sum(loop.held for loop in case.loops)) if not case.num_spinners else 1.0
    return f"{'':36}all threads: true {truth:6.1%}  " + "  ".join(said)


@contextlib.contextmanager
def py_spy(out: Path, seconds: float, rate: int = PY_SPY_HZ) -> Iterator[None]:
    """Have py-spy record this process's holders of the GIL meanwhile."""
    command = ["py-spy", "record", "--gil", "--format", "raw", "--rate", str(rate)]
    process = subprocess.Popen(
        [*command, "--duration", str(max(1, int(seconds))), "--output", str(out), "--pid", str(os.getpid())],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(0.5)  # it needs that long to begin
    try:
        yield
    finally:
        process.wait()


def count_py_spy(case: Case, seconds: float) -> int:
    """Return in how many of py-spy's samples of a case some thread held the GIL."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.txt"
        with py_spy(out, seconds):
            run_case(case, seconds + 1)
        lines = out.read_text().splitlines() if out.exists() else []
    return sum(int(line.rsplit(" ", 1)[1]) for line in lines)


@functools.cache
def full_count_py_spy(seconds: float) -> int:
    """Return its count where the GIL is held all the time; it does not say how many samples it took."""
    return max(1, count_py_spy(Case("spin", [], num_spinners=1), seconds))


def start_gilknocker() -> Any:
    """Return a running knocker with its default times, or None if it is not installed."""
    try:
        from gilknocker import KnockKnock
    except ImportError:
        return None
    knocker = KnockKnock(
        polling_interval_micros=1000, sampling_interval_micros=10_000, sleeping_interval_micros=10_000
    )
    knocker.start()
    return knocker


def train_steps(num_steps: int) -> float:
    """Return the time of a train step of eight layers with AdamW, in seconds."""
    torch.manual_seed(0)
    layers = [part for _ in range(7) for part in (torch.nn.Linear(256, 256), torch.nn.ReLU())]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(256, 10))
    optimizer = torch.optim.AdamW(model.parameters())
    inputs, target = torch.randn(64, 256), torch.randint(0, 10, (64,))
    times = []
    for number in range(num_steps + 5):
        began_s = time.perf_counter()
        loss = torch.nn.functional.cross_entropy(model(inputs), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number >= 5:
            times.append(time.perf_counter() - began_s)
    return sum(times) / len(times)


def train_with_account(period_s: float, num_steps: int) -> float:
    """Time train steps beside the sampler."""
    with gil_account(period_s=period_s):
        return train_steps(num_steps)


def train_with_py_spy(num_steps: int, seconds: float) -> float:
    """Time train steps beside py-spy."""
    with tempfile.TemporaryDirectory() as folder, py_spy(Path(folder) / "out.txt", seconds):
        return train_steps(num_steps)


def train_with_gilknocker(num_steps: int) -> float:
    """Time train steps beside gilknocker."""
    knocker = start_gilknocker()
    found = train_steps(num_steps)
    knocker.stop()
    return found


def show_cost(num_rounds: int, num_steps: int = 100) -> None:
    """Print what each tool costs a train step."""
    seconds = num_steps * train_steps(num_steps)
    variants: dict[str, Callable[[], float]] = {
        "alone": partial(train_steps, num_steps),
        "account, 1 ms (default)": partial(train_with_account, 0.001, num_steps),
        "account, 5 ms": partial(train_with_account, 0.005, num_steps),
        "account, 0.25 ms": partial(train_with_account, 0.00025, num_steps),
    }
    if shutil.which("py-spy"):
        variants[f"py-spy --gil, {PY_SPY_HZ} Hz"] = partial(train_with_py_spy, num_steps, seconds + 2)
    if start_gilknocker():
        variants["gilknocker, 1 ms"] = partial(train_with_gilknocker, num_steps)
    found = interleave(variants, num_rounds)
    for name, times in found.items():
        ratios = [each / alone for each, alone in zip(times, found["alone"], strict=True)]
        ratio, low, high = median_interval(ratios)
        step_ms = 1e3 * statistics.median(times)
        print(f"{name:28} {step_ms:6.2f} ms a step   ratio {ratio:.3f} [{low:.3f}, {high:.3f}]")


def main() -> None:
    """Print measured against true, and the cost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a case; 0 leaves the cases out")
    parser.add_argument("--rounds", type=int, default=30, help="of the table of costs; 0 leaves it out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(describe_machine())
    for case in cases() if arguments.seconds else []:
        print(f"{case.name:36}{measure_account(case, arguments.seconds)}")
        print(measure_others(case, arguments.seconds), flush=True)
    if arguments.rounds:
        show_cost(arguments.rounds)


if __name__ == "__main__":
    main()
