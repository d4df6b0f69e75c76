"""What does looking at a run cost?

Three questions, each with its own baseline:

1. **overhead**: five metrics at every step (loss, accuracy, top-2, gradient norm, learning rate), a
   file and a bar. Baseline: a bare loop that computes the same five and reads none. Unit: µs a step, the
   slope between a short and a long run; a linear model of 16×4, batches of 8.
2. **throughput**: the simulated accelerator, 1 ms of host work and 2 ms of device time a step. Baseline:
   the same loop with nothing on. Bounds: the longer of the two, and their sum.
3. **slow logger**: the same steps with a logger that sleeps 20 ms a call, for each `log_overflow`.

    pip install 'beltloop[bench]'
    python -m benchmarks.outbound [--rounds 9] [--steps 2000] [--only overhead|throughput|slow]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks import peers
from benchmarks.measure import describe_machine, interleave, median_interval, terminal_on_stderr
from benchmarks.overhead import ready, slope, start
from pipeline import Callback, Every, SimulatedBackend, StepFinished, Trainer
from pipeline.loggers import CsvLogger, InProcess, MlflowLogger, TensorBoardLogger
from pipeline.metrics import accuracy, top_k_accuracy

TRAIN_METRICS = {"accuracy": accuracy, "top2": partial(top_k_accuracy, k=2)}


def bare(num_steps: int) -> float:
    """Time a loop that computes five metrics and reads none."""
    model, optimizer = start()
    batches = ready(num_steps)
    started_s = time.perf_counter()
    for inputs, target in batches:
        peers.compute(model, optimizer, inputs, target)
    return time.perf_counter() - started_s


def by_hand(num_steps: int) -> float:
    """Time the loop that one writes by hand: five `.item()`, JSON and tqdm at every step."""
    model, optimizer = start()
    batches = ready(num_steps)
    with tempfile.TemporaryDirectory() as folder, Path(folder, "m.jsonl").open("w") as file:
        started_s = time.perf_counter()
        for step, (inputs, target) in enumerate(bar := tqdm(batches)):
            found = peers.compute(model, optimizer, inputs, target)
            values = {name: float(value) for name, value in found.items()}
            file.write(json.dumps({"step": step, **values}) + "\n")
            bar.set_postfix(loss=values["loss"], refresh=False)
        return time.perf_counter() - started_s


class Marks(Callback):
    """Notes when the loop is half way and when it is through: start and end of the loggers are left out."""

    def __init__(self, num_steps: int) -> None:
        self.every, self.times_s = Every(steps=num_steps // 2), []

    def on_step_finished(self, event: StepFinished) -> None:
        self.times_s.append(time.perf_counter())


def trainer(schedule: str, make_loggers: Callable[[], list[Any]], num_steps: int) -> float:
    """Time a fit with five metrics, the file, the bar, and further loggers."""
    model, optimizer = start()
    with tempfile.TemporaryDirectory() as folder:
        fit = Trainer(
            max_steps=num_steps, schedule=schedule, run_dir=folder, device="cpu",
            enable_checkpointing=False, log_grad_norm=True,
        ).fit  # fmt: skip
        result = fit(
            model, optimizer, ready(num_steps), loss_fn=F.cross_entropy, train_metrics=TRAIN_METRICS,
            loggers=make_loggers(),
        )  # fmt: skip
    return result.train_s


def in_process(num_steps: int = 8000) -> float:
    """Return µs a step with TensorBoard in a process, when that has started: the second half of a run."""
    (model, optimizer), marks = start(), Marks(num_steps)
    with tempfile.TemporaryDirectory() as folder:
        fit = Trainer(
            max_steps=num_steps, schedule="overlap", run_dir=folder, device="cpu",
            enable_checkpointing=False, log_grad_norm=True, max_log_lag=100_000,
        ).fit  # fmt: skip
        fit(
            model, optimizer, ready(num_steps), loss_fn=F.cross_entropy, train_metrics=TRAIN_METRICS,
            loggers=[InProcess(TensorBoardLogger)], callbacks=[marks],
        )  # fmt: skip
    return (marks.times_s[1] - marks.times_s[0]) / (num_steps // 2) * 1e6


OVERHEAD: dict[str, Callable[[int], float]] = {
    "bare": bare,
    "by hand: item, JSON, tqdm": by_hand,
    "textbook, JSONL + bar": partial(trainer, "textbook", list),
    "overlap, JSONL + bar": partial(trainer, "overlap", list),
    "overlap, + CSV": partial(trainer, "overlap", lambda: [CsvLogger()]),
    "overlap, + TensorBoard": partial(trainer, "overlap", lambda: [TensorBoardLogger()]),
    "Ignite, by hand JSON, its bar": peers.ignite,
    "Accelerate, by hand JSON, tqdm": peers.accelerate,
    "Lightning, CSV and its bar": peers.lightning,
}


class Device(SimulatedBackend):
    """Two milliseconds of device time a step, behind one of host work."""

    def __init__(self) -> None:
        super().__init__(is_virtual=False, launch_us=20.0)

    def loss_fn(self, outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Launch a step's kernels, and compute the loss."""
        self.launch(2e-3, num_launches=50)
        return F.cross_entropy(outputs, target)


def simulated(
    num_steps: int, *, schedule: str = "overlap", has_all: bool, has_mlflow: bool = False, **arguments: Any
) -> float:
    """Return ms a step on the simulated accelerator, in the second half of a run."""
    device, (model, optimizer), marks = Device(), start(), Marks(num_steps)
    with tempfile.TemporaryDirectory() as folder:
        own = {"schedule": schedule, "device": device, "max_steps": num_steps, "enable_checkpointing": False}
        further: dict[str, Any] = {}
        if has_all:
            own |= {"run_dir": folder, "log_grad_norm": True}
            loggers: list[Any] = [CsvLogger(), TensorBoardLogger()]
            if has_mlflow:
                loggers.append(InProcess(MlflowLogger, tracking_uri=f"sqlite:///{folder}/mlflow.db"))
            further = {"train_metrics": TRAIN_METRICS, "loggers": loggers}
        else:
            own |= {"run_dir": None, "enable_progress_bar": False}
            further = {"loggers": arguments.pop("loggers", [])}
        Trainer(**own, **arguments).fit(
            model, optimizer, ready(num_steps), loss_fn=device.loss_fn, callbacks=[marks], **further
        )
    return (marks.times_s[1] - marks.times_s[0]) / (num_steps // 2) * 1e3


def item_and_print(num_steps: int) -> float:
    """Return ms a step of a loop by hand that reads and prints the loss at each step."""
    device, (model, optimizer) = Device(), start()
    started_s = time.perf_counter()
    for inputs, target in ready(num_steps):
        loss = device.loss_fn(model(device.move(inputs)), device.move(target))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tqdm.write(f"loss {device.read(loss):.4f}", file=peers.stderr())
    return (time.perf_counter() - started_s) / num_steps * 1e3


class Slow:
    """A logger that takes 20 ms a call, as one over a network does."""

    def log(self, row: Any) -> None:
        time.sleep(20e-3)

    def flush(self) -> None: ...
    def close(self) -> None: ...


def report(found: dict[str, list[float]], baseline: str, unit: str, *, is_ratio: bool) -> None:
    """Print each variant's median and its distance from the baseline, paired by round."""
    for name, values in found.items():
        middle, low, high = median_interval(values)
        pairs = zip(values, found[baseline], strict=True)
        far = [base / value if is_ratio else value - base for value, base in pairs]
        distance = median_interval(far)
        words = "{:.3f} [{:.3f}, {:.3f}] of its throughput" if is_ratio else "{:+.1f} [{:+.1f}, {:+.1f}] over"
        print(f"{name:38} {middle:8.2f} {unit} [{low:.2f}, {high:.2f}]   {words.format(*distance)}")


def main() -> None:
    """Measure and print three tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--only", choices=["overhead", "throughput", "slow"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(describe_machine())
    with terminal_on_stderr(), peers.quiet():
        if arguments.only in (None, "overhead"):
            runs = {name: partial(slope, run, arguments.steps) for name, run in OVERHEAD.items()}
            runs["overlap, + TensorBoard in a process"] = in_process
            report(interleave(runs, arguments.rounds), "bare", "µs", is_ratio=False)
        if arguments.only in (None, "throughput"):
            count = 3000  # six seconds: the process of a logger takes some to start
            variants = {
                "nothing on": partial(simulated, count, has_all=False),
                "JSONL, CSV, TensorBoard, bar, metrics": partial(simulated, count, has_all=True),
                "the same, and MLflow in a process": partial(simulated, count, has_all=True, has_mlflow=True),
                "textbook, nothing on": partial(simulated, count, schedule="textbook", has_all=False),
                "by hand: item and print": partial(item_and_print, count),
            }
            report(interleave(variants, arguments.rounds), "nothing on", "ms", is_ratio=True)
        if arguments.only in (None, "slow"):
            slow = {
                f"20 ms a call, {policy}": lambda policy=policy: simulated(
                    500, has_all=False, loggers=[Slow()], log_overflow=policy, max_log_lag=100
                )
                for policy in ("drop", "grow", "wait")
            }
            variants = {"no logger": partial(simulated, 500, has_all=False), **slow}
            report(interleave(variants, min(arguments.rounds, 3)), "no logger", "ms", is_ratio=True)


if __name__ == "__main__":
    main()
