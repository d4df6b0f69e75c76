"""Where does `auto` settle, how soon, and what do its checks cost?

Baseline: another checkout, if one is named. Unit: seconds until a run has settled, milliseconds a step after
that, and the checks' share of the run's time.

    python -m benchmarks.settling [--only NAME,…] [--seconds 20] [--against CHECKOUT] [--rounds 1]

Each run is a process of its own; with a baseline the two take turns. Nothing else should be running.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parents[1]


class Settled(logging.Handler):
    """Notes when a run says where its batches are made from then on."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.began_s, self._place = time.perf_counter(), ""
        self.after_s: float | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if "batches made in" in record.getMessage() and (place := record.args[1].place) != self._place:  # type: ignore
            self._place, self.after_s = place, time.perf_counter() - self.began_s


def run(name: str, seconds: float) -> dict[str, Any]:
    """Train one job with the defaults for some seconds; return where its batches were made."""
    from benchmarks.compare.job import Job
    from benchmarks.compare.workloads import WORKLOADS
    from pipeline import Trainer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    workload = next((each for each in WORKLOADS if each.name == name), WORKLOADS[0])
    job, settled, ends_s = Job(workload, is_simulated=False), Settled(), list[float]()

    def step(model: Any, batch: Any) -> Any:
        ends_s.append(time.perf_counter())
        return job.forward(model, batch)

    logging.getLogger("pipeline").addHandler(settled)
    logging.getLogger("pipeline").setLevel(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        data = _data(name, workload, folder)
        trainer = Trainer(
            max_epochs=10**6,
            max_time=seconds,
            run_dir=None,
            enable_progress_bar=False,
            device="cpu",
        )
        settled.began_s = time.perf_counter()
        result = trainer.fit(
            job.model,
            job.optimizer,
            data,
            step=step,
            batch_size=workload.batch_size,
            shuffle=True,
            collate_fn=workload.collate_fn,
        )
        ran_s = time.perf_counter() - settled.began_s
    placement = result.placement
    assert placement is not None
    late = [each for each in ends_s if each - settled.began_s > 0.6 * seconds]
    return {
        "place": placement.place,
        "after_s": settled.after_s,
        "step_ms": 1e3 * (late[-1] - late[0]) / (len(late) - 1) if len(late) > 1 else None,
        "first_ms": 1e3 * (ends_s[0] - settled.began_s),
        "checks": getattr(placement, "checks_s", 0.0) / ran_s,
        "compared": getattr(placement, "num_compared", 0),
        "limit": getattr(placement, "limit", ""),
    }


def _data(name: str, workload: Any, folder: str) -> Any:
    if name == workload.name:
        return workload.dataset()
    from benchmarks.everyday import EVERYDAY

    return EVERYDAY[name](folder)


def _measured(name: str, seconds: float, checkout: Path) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--job", name, "--seconds"]
    with tempfile.TemporaryDirectory() as only_the_library:
        (Path(only_the_library) / "pipeline").symlink_to(checkout / "pipeline")
        environment = {**os.environ, "PYTHONPATH": f"{only_the_library}{os.pathsep}{HERE}"}
        done = subprocess.run([*command, str(seconds)], env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"place": done.stderr.strip().splitlines()[-1][:60]}
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def _row(name: str, code: str, found: list[dict[str, Any]]) -> str:
    def middle(key: str, digits: str) -> str:
        values = [each[key] for each in found if each.get(key) is not None]
        return format(statistics.median(values), digits) if values else "-"

    places = " / ".join(dict.fromkeys(each["place"] for each in found))
    cells = (middle("after_s", ".1f"), middle("step_ms", ".2f"), middle("first_ms", ".0f"))
    checks = (middle("checks", ".2%"), middle("compared", ".0f"))
    return "| " + " | ".join((name, code, places, *cells, *checks)) + " |"


def main() -> None:
    """Run the jobs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="names of jobs")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each run")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each job")
    parser.add_argument("--against", type=Path, help="another checkout of this project")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        print(json.dumps(run(given.job, given.seconds)))
        return
    from benchmarks.compare.workloads import WORKLOADS
    from benchmarks.everyday import EVERYDAY

    names = given.only.split(",") if given.only else [*(each.name for each in WORKLOADS), *EVERYDAY]
    codes = {"this": HERE} if given.against is None else {"before": given.against.resolve(), "this": HERE}
    print("| job | code | made in | settled after s | ms a step then | first batch ms | checks | compared |")
    print("|---|---|---|---|---|---|---|---|")
    for name in names:
        found: dict[str, list[dict[str, Any]]] = {code: [] for code in codes}
        for _ in range(given.rounds):
            for code, checkout in codes.items():
                found[code].append(_measured(name, given.seconds, checkout))
        for code in codes:
            print(_row(name, code, found[code]), flush=True)


if __name__ == "__main__":
    main()
