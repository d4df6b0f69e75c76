"""What the benchmarks share: the machine's description, interleaving, medians with an interval."""

from __future__ import annotations

import contextlib
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping

import torch


def describe_machine() -> str:
    """Say on what a figure was measured."""
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return (
        f"{platform.python_implementation()} {platform.python_version()}, torch {torch.__version__}, "
        f"{len(os.sched_getaffinity(0))} cores ({names[0] if names else platform.machine()}), "
        f"{torch.get_num_threads()} intra-op thread, switch interval {sys.getswitchinterval() * 1e3:g} ms"
    )


class OtherLoad:
    """Says how much of the machine other programs took meanwhile: figures taken beside them mean little."""

    def __init__(self) -> None:
        self._busy_s, self._own_s, self._began_s = _busy_s(), _own_s(), time.perf_counter()

    def ratio(self) -> float:
        """Return the share of all cores that others, and children still alive, were on since then."""
        others_s = _busy_s() - self._busy_s - (_own_s() - self._own_s)
        return max(others_s, 0.0) / (time.perf_counter() - self._began_s) / (os.cpu_count() or 1)


def _busy_s() -> float:
    with open("/proc/stat") as file:
        fields = [int(field) for field in file.readline().split()[1:]]
    return (sum(fields[:3]) + sum(fields[5:8])) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def interleave(variants: Mapping[str, Callable[[], float]], num_rounds: int) -> dict[str, list[float]]:
    """Run every variant once a round, in a new order each round, and return what each one gave."""
    order = random.Random(0)
    found: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(num_rounds):
        names = list(variants)
        order.shuffle(names)
        for name in names:
            found[name].append(variants[name]())
        print(f"\rround {number + 1} of {num_rounds}", end="", file=sys.__stderr__, flush=True)
    print(file=sys.__stderr__)
    return found


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """Return the median and a 95 % interval of it, from order statistics.

    Source:
        The binomial interval for a quantile: ranks n/2 ± 0.98 √n.
    """
    ordered, count = sorted(values), len(values)
    reach = 0.98 * count**0.5
    low = max(0, int(count / 2 - reach))
    high = min(count - 1, int(count / 2 + reach))
    return statistics.median(ordered), ordered[low], ordered[high]


@contextlib.contextmanager
def terminal_on_stderr() -> Iterator[None]:
    """Put a terminal behind standard error, which a process of its own reads, as a user's does."""
    master, slave = os.openpty()
    reader = subprocess.Popen(["cat"], stdin=master, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(master)
    before = sys.stderr
    sys.stderr = os.fdopen(slave, "w")
    try:
        yield
    finally:
        sys.stderr.close()
        sys.stderr = before
        reader.kill()
        reader.wait()
