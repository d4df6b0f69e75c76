"""How fast is the same training on other people's loops, and on ours?

Baselines: the textbook loop (fetch, step, `.item()`, a line of JSON, at every step), and the *sensible* one
(the best of a DataLoader with 0, 1, 2 and 4 persistent workers, the loss read every 50 steps). The bound:
the same step with its batches already there. Unit: ms a step, and ratios of it; above 1, ours is faster.

    python -m benchmarks.compare [--only python,jpeg] [--device cpu|simulated] [--rounds 5]
    python -m benchmarks.compare --table results.json --png FOLDER      # from an earlier run

Every peer is tuned first: each of its settings is tried once on the job. Then all are interleaved, in a new
order each round. torch has one intra-op thread; the other cores are for the host's work. The simulated
accelerator has no device behind it: what is measured on it is how a loop waits, not a gain on CUDA.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

from benchmarks.compare import loops, ours, peers
from benchmarks.compare.plots import write_plots
from benchmarks.compare.table import Result, describe, read, summary
from benchmarks.compare.variants import candidates, fixed, measure, tune
from benchmarks.compare.workloads import WORKLOADS, Workload
from benchmarks.measure import OtherLoad, describe_machine, interleave


def compare(workload: Workload, device: str, num_rounds: int, families: list[str], own: list[str]) -> Result:
    """Measure all variants of one workload on one device, interleaved."""
    is_simulated, others = device == "simulated", OtherLoad()
    tuned, settings = tune(workload, families, is_simulated=is_simulated)
    found: dict[str, list[float]] = {}

    def timed(name: str) -> float:
        measured = measure(variants[name], workload, is_simulated=is_simulated)
        found.setdefault(name, []).append(measured.first_ms)
        return measured.step_ms

    variants = {**fixed(own), **tuned}
    times = interleave({name: partial(timed, name) for name in variants}, num_rounds)
    predicted = ours.predict(workload, is_simulated=is_simulated)
    shown = times, found, settings, predicted
    return Result(workload.name, workload.about, device, *shown, others_ratio=others.ratio())


def keep(path: Path | None, result: Result) -> None:
    """Add a result to a file, so that a run that is cut short loses little."""
    if path is not None:
        before = json.loads(path.read_text()) if path.exists() else []
        path.write_text(json.dumps([*before, result.to_dict()], indent=1))


def main() -> None:
    """Measure, and print lines and a table; or print those of an earlier run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(each.name for each in WORKLOADS), help="workloads")
    parser.add_argument("--device", choices=("cpu", "simulated"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", default=",".join(candidates()), help="families; nothing for none")
    parser.add_argument("--ours", default=",".join(ours.VARIANTS), help="variants of this project")
    parser.add_argument("--json", type=Path, help="add the times to this file")
    parser.add_argument("--table", type=Path, nargs="+", help="print what these files hold, measure nothing")
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="draw plots")
    options = parser.parse_args()
    results: list[Result] = []
    if options.table:
        results = [read(each) for path in options.table for each in json.loads(path.read_text())]
    else:
        loops.one_thread()
        peers.be_quiet()
        print(describe_machine())
        for workload in WORKLOADS:
            if workload.name in options.only.split(","):
                asked = options.rounds, options.peers.split(","), options.ours.split(",")
                results.append(compare(workload, options.device, *asked))
                print(describe(results[-1]), flush=True)
                keep(options.json, results[-1])
    print(f"\n{summary(results)}")
    if options.png is not None:
        write_plots(options.png, results)


if __name__ == "__main__":
    main()
