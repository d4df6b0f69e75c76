"""What does each loop cost besides time: memory of the whole tree, processor time, time to the first step?

Baseline: the textbook loop, and torch's DataLoader with as many workers, by fork and by a fork server. Units:
MB (PSS, the highest seen: pages that processes share count once), ms of processor time a sample, ms to the
first step. Each variant runs in a process of its own, whose tree another one looks at: every 20 ms for
processor time, every 200 ms for memory, since each look at memory stops the process for some ms. What the
training process imports at its start is not counted as time, but is in the memory.

    python -m benchmarks.compare.resources [--only python,large] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.compare import loops, ours, peers
from benchmarks.compare.job import Job
from benchmarks.compare.variants import Run
from benchmarks.compare.workloads import WORKLOADS, Workload
from benchmarks.measure import describe_machine, interleave, median_interval

LOOK_S = 0.02
LOOKS_PER_MEMORY = 10
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
WORKERS = 2
STARTS = ("fork", "forkserver")


def variants() -> dict[str, Run]:
    """Return what is compared: everything that makes batches elsewhere has two workers there."""
    kinds = {
        f"DataLoader, {kind}": partial(loops.sensible, num_workers=WORKERS, start=kind) for kind in STARTS
    }
    places = {
        f"ours {place}": partial(ours.ours, place=place, num_workers=WORKERS)
        for place in ours.VARIANTS
        if place != "textbook"
    }
    return {
        "textbook": loops.textbook,
        **kinds,
        "SPDL": partial(peers.spdl_threads, num_threads=WORKERS),
        "SPDL process": partial(peers.spdl_process, num_threads=WORKERS),
        "nodes": partial(peers.nodes, num_threads=WORKERS),
        "Lightning": partial(peers.lightning, num_workers=WORKERS),
        "Accelerate": partial(peers.accelerate, num_workers=WORKERS),
        "ours textbook": partial(ours.ours, place="textbook"),
        **places,
    }


def workload_of(name: str) -> Workload:
    """Return a workload by its name, long enough for processes to start; the same for everybody."""
    found = next(each for each in WORKLOADS if each.name == name)
    return replace(found, num_batches=found.num_batches * ours.SETTLING_TIMES, counts_start=True)


def run_child(variant: str, workload: str) -> None:
    """Run a variant, and say when it began and how long it took to its first step."""
    loops.one_thread()
    job = Job(workload_of(workload), is_simulated=False)
    before = cpu_s(os.getpid())
    variants()[variant](job)
    print(json.dumps({"first_ms": job.first_ms, "import_cpu_s": before, "steps": job.num_steps}), flush=True)


def measure(variant: str, workload: str) -> dict[str, float]:
    """Run a variant in a process of its own; return peak memory, processor time and time to first step."""
    command = [sys.executable, "-m", "benchmarks.compare.resources", "--child", variant, "--only", workload]
    peak_mb, spent_s, num_looks = 0.0, {}, 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        while not has_said(child):  # not until it has ended, which touches further memory
            tree = descendants(child.pid)
            spent_s |= {pid: cpu_s(pid) for pid in tree}
            if num_looks % LOOKS_PER_MEMORY == 0:
                peak_mb = max(peak_mb, sum(map(pss_mb, tree)))
            num_looks += 1
        lines = child.stdout.read().splitlines() if child.stdout else []
    found = json.loads(lines[-1])
    samples = found["steps"] * workload_of(workload).batch_size
    spent = sum(spent_s.values()) - found["import_cpu_s"]
    return {"peak_mb": peak_mb, "cpu_ms": spent / samples * 1e3, "first_ms": found["first_ms"]}


def has_said(child: subprocess.Popen[str]) -> bool:
    """Say whether a process has printed something, or ended; wait a moment for it."""
    return bool(select.select([child.stdout], [], [], LOOK_S)[0])


def descendants(pid: int) -> list[int]:
    """Return a process and all below it."""
    found, waiting = [], [pid]
    while waiting:
        found.append(each := waiting.pop())
        try:
            for task in Path(f"/proc/{each}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except OSError:
            continue  # it has ended
    return found


def cpu_s(pid: int) -> float:
    """Return the processor time of a process; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def pss_mb(pid: int) -> float:
    """Return the memory of a process, shared pages by its share of them; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def compare(workload: str, num_rounds: int) -> None:
    """Measure every variant on a workload, and print a line for each."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in variants()}

    def note(name: str) -> float:
        print(f"\r{name:20}", end="", file=sys.stderr, flush=True)
        found[name].append(measure(name, workload))
        return 0.0

    interleave({name: partial(note, name) for name in found}, num_rounds)
    print(f"{workload}: median of {num_rounds}, and the range of the memory")
    for name, each in found.items():
        shown = {key: median_interval([one[key] for one in each])[0] for key in each[0]}
        peaks = [one["peak_mb"] for one in each]
        print(
            f"  {name:22} {shown['peak_mb']:6.0f} MB [{min(peaks):.0f}, {max(peaks):.0f}]  "
            f"{shown['cpu_ms']:6.2f} ms of processor time a sample  "
            f"first step after {shown['first_ms']:6.0f} ms",
            flush=True,
        )


def main() -> None:
    """Measure and print a line for each variant."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="python", help="workloads, with commas between")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        run_child(options.child, options.only)
        return
    print(describe_machine())
    for workload in options.only.split(","):
        compare(workload, options.rounds)


if __name__ == "__main__":
    main()
