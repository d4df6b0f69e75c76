"""What does the Trainer cost per step over a bare loop?

Baseline: the bare loop below, which does nothing but train: forward, backward, step, zero_grad.
Unit: µs per step; each figure is the slope between a short and a long run, so set-up does not count.
Workload: a linear model of 16×4, batches of 8, SGD: the step is as short as a step can be.
With the loss logged at every step to ``metrics.jsonl`` and the bar on a terminal.

    python -m benchmarks.overhead [--rounds 15] [--steps 4000]

Two kinds of data in memory: batches that are ready (a list), and a TensorDataset from which each
batch is indexed. `textbook by hand` is the bare loop with `.item()`, JSON and tqdm at every step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset
from tqdm import tqdm

from benchmarks.measure import describe_machine, interleave, median_interval, terminal_on_stderr
from pipeline import Trainer

INPUTS, TARGET = torch.randn(8 * 256, 16), torch.randint(0, 4, (8 * 256,))
BATCHES = list(zip(INPUTS.split(8), TARGET.split(8), strict=True))


def start() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Return a new model and its optimizer."""
    model = torch.nn.Linear(16, 4)
    return model, torch.optim.SGD(model.parameters(), lr=0.01)


def ready(num_steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return so many batches that are made already."""
    return (BATCHES * (num_steps // len(BATCHES) + 1))[:num_steps]


def bare_ready(num_steps: int) -> float:
    """Time the bare loop over batches that are ready."""
    model, optimizer = start()
    batches = ready(num_steps)
    started_s = time.perf_counter()
    for inputs, target in batches:
        loss = F.cross_entropy(model(inputs), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started_s


def bare_indexed(num_steps: int) -> float:
    """Time the bare loop over batches that are indexed from tensors in a new order each time."""
    model, optimizer = start()
    started_s = time.perf_counter()
    order = torch.randint(0, len(INPUTS), (num_steps * 8,))
    for index in order.split(8):
        loss = F.cross_entropy(model(INPUTS[index]), TARGET[index])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started_s


def by_hand(num_steps: int) -> float:
    """Time the textbook loop as one writes it by hand, with `.item()`, JSON and tqdm."""
    model, optimizer = start()
    batches = ready(num_steps)
    with tempfile.TemporaryDirectory() as folder, Path(folder, "m.jsonl").open("w") as file:
        started_s = time.perf_counter()
        for step, (inputs, target) in enumerate(tqdm(batches)):
            loss = F.cross_entropy(model(inputs), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            file.write(json.dumps({"step": step, "train/loss": loss.item()}) + "\n")
        return time.perf_counter() - started_s


def trainer(schedule: str, is_indexed: bool, num_steps: int) -> float:
    """Time a fit with everything on."""
    model, optimizer = start()
    with tempfile.TemporaryDirectory() as folder:
        fit = Trainer(
            max_steps=num_steps, schedule=schedule, run_dir=folder, device="cpu",
            enable_checkpointing=False, log_every_n_steps=1,
        ).fit  # fmt: skip
        started_s = time.perf_counter()
        if is_indexed:
            repeats = num_steps * 8 // len(INPUTS) + 1
            data = TensorDataset(INPUTS.repeat(repeats, 1), TARGET.repeat(repeats))
            fit(model, optimizer, data, loss_fn=F.cross_entropy, batch_size=8, shuffle=True)
        else:
            fit(model, optimizer, ready(num_steps), loss_fn=F.cross_entropy)
        return time.perf_counter() - started_s


def slope(run: Callable[[int], float], num_steps: int) -> float:
    """Return µs per step between a run of a quarter of the steps and one of all of them."""
    short = num_steps // 4
    return (run(num_steps) - run(short)) / (num_steps - short) * 1e6


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = {
        "bare, ready batches": bare_ready,
        "textbook by hand, ready batches": by_hand,
        "Trainer textbook, ready batches": partial(trainer, "textbook", False),
        "Trainer overlap, ready batches": partial(trainer, "overlap", False),
        "bare, indexed": bare_indexed,
        "Trainer textbook, indexed": partial(trainer, "textbook", True),
        "Trainer overlap, indexed": partial(trainer, "overlap", True),
    }
    print(describe_machine())
    with terminal_on_stderr():
        variants = {name: partial(slope, run, arguments.steps) for name, run in runs.items()}
        found = interleave(variants, arguments.rounds)
    for name, values in found.items():
        baseline = found["bare, indexed" if "indexed" in name else "bare, ready batches"]
        middle, low, high = median_interval(values)
        extra, extra_low, extra_high = median_interval(
            [value - base for value, base in zip(values, baseline, strict=True)]
        )
        print(
            f"{name:34} {middle:7.1f} µs a step [{low:.1f}, {high:.1f}]   "
            f"over bare {extra:+6.1f} [{extra_low:+.1f}, {extra_high:+.1f}]"
        )


if __name__ == "__main__":
    main()
