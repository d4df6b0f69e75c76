"""How does the time of a step grow with workers, depth of the belt, batch size, and kernels launched?

Baseline: the first value of each series. Unit: ms a step, median of the rounds. Workers, depth and batch
size on the CPU with pure-Python samples; launches on the simulated accelerator, 20 µs of the host each.

    python -m benchmarks.compare.growth [--rounds 3] [--png FOLDER]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.compare import loops, ours
from benchmarks.compare.job import Job
from benchmarks.compare.variants import Run
from benchmarks.compare.workloads import WORKLOADS, Workload
from benchmarks.measure import describe_machine, interleave, median_interval

PYTHON = next(each for each in WORKLOADS if each.name == "python")
NOTHING = next(each for each in WORKLOADS if each.name == "nothing")
SETTLED_TIMES = 3  # so often as long, of which the last part counts: processes take a moment to start


def settled(place: str, **settings: int) -> Run:
    """Return this project's run, measured after its workers have started."""
    return partial(ours.ours, place=place, settling_times=SETTLED_TIMES, **settings)


def by_workers(count: int) -> dict[str, tuple[Workload, bool, Run]]:
    """Return what is measured with so many workers."""
    return {
        "DataLoader": (PYTHON, False, partial(loops.sensible, num_workers=count)),
        "ours thread": (PYTHON, False, settled("thread", num_workers=count)),
        "ours process": (PYTHON, False, settled("process", num_workers=count)),
    }


def by_depth(depth: int) -> dict[str, tuple[Workload, bool, Run]]:
    """Return what is measured with so many batches that may wait."""
    return {
        place: (PYTHON, False, settled(place.removeprefix("ours "), prefetch_depth=depth))
        for place in ("ours inline", "ours process")
    }


def by_batch_size(size: int) -> dict[str, tuple[Workload, bool, Run]]:
    """Return what is measured with batches of so many samples."""
    workload = replace(PYTHON, batch_size=size, num_batches=max(12, 1600 // size))
    return {
        "textbook": (workload, False, loops.textbook),
        "DataLoader, 2 workers": (workload, False, partial(loops.sensible, num_workers=2)),
        "ours process": (workload, False, settled("process")),
    }


def by_launches(count: int) -> dict[str, tuple[Workload, bool, Run]]:
    """Return what is measured with so many kernels a step, 6 ms of the device together."""
    workload = replace(PYTHON, num_launches=count, num_batches=60)
    return {
        "textbook": (workload, True, loops.textbook),
        "ours inline": (workload, True, settled("inline")),
        "ours process": (workload, True, settled("process")),
    }


SERIES: dict[str, tuple[tuple[int, ...], Callable[[int], dict[str, tuple[Workload, bool, Run]]]]] = {
    "workers": ((1, 2, 4), by_workers),
    "depth": ((1, 2, 4, 8, 16), by_depth),
    "batch size": ((4, 16, 64), by_batch_size),
    "launches": ((10, 50, 200), by_launches),
}


def step_ms(workload: Workload, is_simulated: bool, run: Run) -> float:
    """Return the milliseconds a step of one run."""
    job = Job(workload, is_simulated=is_simulated)
    run(job)
    return job.step_ms


def main() -> None:
    """Measure and print each series, and draw it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(SERIES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--png", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    loops.one_thread()
    print(describe_machine())
    for name in options.only.split(","):
        values, make = SERIES[name]
        cases = {(variant, value): case for value in values for variant, case in make(value).items()}
        named = {f"{variant}|{value}": partial(step_ms, *case) for (variant, value), case in cases.items()}
        found = interleave(named, options.rounds)
        lines: dict[str, dict[int, float]] = {}
        for (variant, value), times in zip(cases, found.values(), strict=True):
            lines.setdefault(variant, {})[value] = median_interval(times)[0]
        print(f"{name}: {', '.join(map(str, values))}")
        for variant, line in lines.items():
            print(f"  {variant:22} {'  '.join(f'{ms:7.2f}' for ms in line.values())} ms a step", flush=True)
        if options.png is not None:
            draw(options.png / f"growth_{name.replace(' ', '_')}.png", name, lines)


def draw(path: Path, name: str, lines: dict[str, dict[int, float]]) -> None:
    """Draw one series."""
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(6, 3.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    for variant, line in lines.items():
        axes.plot(list(line), list(line.values()), "o-", label=variant)
    axes.set_xscale("log", base=2)
    values = list(next(iter(lines.values())))
    axes.set_xticks(values, list(map(str, values)))
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(name)
    axes.set_ylabel("ms a step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
