"""What do the places cost: per batch, at the start, and in runs too short to choose in?

Baselines: the textbook schedule for short runs, torch's DataLoader for the first batch. Units: µs a batch, ms
to the first batch, and ratios of run times; above 1, ours is faster. Memory: `benchmarks.compare.resources`.

    python -m benchmarks.placement [--rounds 7] [--only handoff,first,short]

- **handoff**: what the loop thread spends on a batch that is there already; nobody else has work to do. To
  free the batch before it is not counted.
- **first**: from the request for an epoch to its first batch, nothing having been started before.
- **short**: runs of 1, 5 and 20 s in the textbook schedule, against the same with everything at ``auto``. A
  fork server is started by the first of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import describe_machine, interleave, median_interval
from pipeline import Loader, Trainer
from pipeline.settings import Placement

WIDTH = 256
PLACES: tuple[Placement, ...] = ("inline", "thread", "process")


class Rows(Dataset[torch.Tensor]):
    """Samples that are rows of one tensor: next to no work, whatever their size."""

    def __init__(self, count: int, numel: int) -> None:
        self.row, self.count = torch.ones(numel), count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.row


class Tokens(Dataset[tuple[torch.Tensor, int]]):
    """Samples of plain Python, which holds the GIL."""

    def __init__(self, count: int, loops: int) -> None:
        self.count, self.loops = count, loops

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        total = 0
        for number in range(self.loops):
            total += number ^ index
        return torch.full((WIDTH,), total % 7 / 7), index % 10


def handoff_us(place: Placement, batch_bytes: int) -> float:
    """Return the median time of a request for a batch that is there, in µs."""
    samples = 8
    data = Rows(samples * 60, batch_bytes // samples // 4)
    taken: list[float] = []
    with Loader(data, batch_size=samples, placement=place, num_workers=1, depth=4) as loader:
        while place == "process" and not _has_processes(loader):
            for _ in loader:
                pass
        for number in range(2):
            batches = iter(loader)
            for _ in range(60):
                time.sleep(2e-3 + batch_bytes / 1e9)  # more than the worker needs
                began_s = time.perf_counter()
                following = next(batches)
                taken_s = time.perf_counter() - began_s
                batch = following  # to free the one before is no hand-off, and a plain loop does it too
                if number:
                    taken.append(taken_s)
            del batch
    return sorted(taken)[len(taken) // 2] * 1e6


def _has_processes(loader: Loader) -> bool:
    return loader._inbound.is_ready()


def first_ms(make: Callable[[], Iterable[Any]]) -> float:
    """Return the time to the first batch of a loader that is made for it, in ms."""
    began_s = time.perf_counter()
    made = make()
    batches: Iterator[Any] = iter(made)
    next(batches)
    taken_s = time.perf_counter() - began_s
    for _ in batches:
        pass
    if isinstance(made, Loader):
        made.close()
    return taken_s * 1e3


def run_s(num_batches: int, loops: int, **settings: Any) -> float:
    """Return the time that a whole `fit` takes."""
    layers = [layer for _ in range(8) for layer in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU())]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(WIDTH, 10))
    trainer = Trainer(run_dir=None, enable_progress_bar=False, device="cpu", **settings)
    data, optimizer = Tokens(num_batches * 16, loops), torch.optim.AdamW(model.parameters())
    began_s = time.perf_counter()
    trainer.fit(model, optimizer, data, loss_fn=F.cross_entropy, batch_size=16)
    return time.perf_counter() - began_s


def show(name: str, values: list[float], unit: str) -> None:
    """Print a median with its interval."""
    middle, low, high = median_interval(values)
    print(f"{name:36} {middle:9.1f} [{low:.1f}, {high:.1f}] {unit}", flush=True)


def measure_handoff(num_rounds: int) -> None:
    """Print what a batch costs the loop."""
    for batch_bytes in (4_000, 1_000_000, 100_000_000):
        found = interleave({place: partial(handoff_us, place, batch_bytes) for place in PLACES}, num_rounds)
        for place, values in found.items():
            show(f"handoff {place}, {batch_bytes / 1e6:g} MB", values, "µs a batch")


def measure_first(num_rounds: int) -> None:
    """Print how long the first batch takes."""
    data = Tokens(64, 2000)
    variants: dict[str, Callable[[], Iterable[Any]]] = {
        place: partial(Loader, data, batch_size=16, placement=place, num_workers=2) for place in PLACES
    }
    for kind in ("fork", "forkserver"):
        variants[f"DataLoader, 2 workers by {kind}"] = partial(
            DataLoader, data, batch_size=16, num_workers=2, multiprocessing_context=kind
        )
    for name, values in interleave(
        {n: partial(first_ms, v) for n, v in variants.items()}, num_rounds
    ).items():
        show(f"first batch, {name}", values, "ms")


def measure_short(num_rounds: int) -> None:
    """Print how runs go that end before, or soon after, a place is chosen."""
    for loops, job in ((20, "nothing to gain"), (4000, "balanced plain Python")):
        step_s = run_s(60, loops, schedule="textbook") / 60
        for seconds in (1, 5, 20):
            count = int(seconds / step_s)
            variants = {
                "textbook": partial(run_s, count, loops, schedule="textbook"),
                "auto": partial(run_s, count, loops),
            }
            found = interleave(variants, num_rounds if seconds < 20 else max(3, num_rounds // 2))
            ratios = [a / b for a, b in zip(found["textbook"], found["auto"], strict=True)]
            middle, low, high = median_interval(ratios)
            print(f"short {job}, {seconds} s: {middle:.3f} [{low:.3f}, {high:.3f}] times as fast", flush=True)


MEASURES = {
    "handoff": measure_handoff,
    "first": measure_first,
    "short": measure_short,
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default=",".join(MEASURES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(describe_machine())
    for name in options.only.split(","):
        MEASURES[name](options.rounds)


if __name__ == "__main__":
    main()
