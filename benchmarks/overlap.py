"""What does overlap win, or lose, against the textbook schedule on the CPU?

Baseline: the same Trainer with ``schedule=textbook``. Unit: ratio of steps per second, above 1 is a win.
Workload: an 8-layer MLP with AdamW on one intra-op thread, some 10 ms a step, batches of 32, and five
loaders. Both bounds are printed: the step with its batches ready, and the loader by itself.

    python -m benchmarks.overlap [--rounds 9] [--batches 40]

A thread hides only what releases the GIL, so the pure-Python loader cannot win, and may lose: that is
why ``schedule=auto`` stays with textbook on the CPU.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.measure import describe_machine, interleave, median_interval
from pipeline import Trainer

BATCH_SIZE, WIDTH = 32, 512


def jpeg() -> bytes:
    """Return a JPEG of 128×128 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


class Made(Dataset[tuple[torch.Tensor, int]]):
    """A dataset whose samples are made by a function."""

    def __init__(self, make: Callable[[int], torch.Tensor], num_samples: int) -> None:
        self.make, self.num_samples = make, num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.make(index), index % 10


def pure_python(index: int) -> torch.Tensor:
    """Hold the GIL for some 0.5 ms."""
    total = 0
    for number in range(10_000):
        total += number ^ index
    return torch.full((WIDTH,), total % 7 / 7)


def decode(encoded: bytes, index: int) -> torch.Tensor:
    """Decode a JPEG, which releases the GIL."""
    pixels = np.asarray(Image.open(io.BytesIO(encoded)).convert("L").resize((32, 16)))
    return torch.from_numpy(pixels.reshape(-1).astype(np.float32) / 255)


def wait(index: int) -> torch.Tensor:
    """Wait 0.3 ms, as for a disk or a network."""
    time.sleep(0.3e-3)
    return torch.full((WIDTH,), index % 7 / 7)


def loaders(num_batches: int) -> dict[str, Dataset[Any]]:
    """Return the datasets by name."""
    count = num_batches * BATCH_SIZE
    tensors = torch.randn(count, WIDTH), torch.randint(0, 10, (count,))
    return {
        "nothing to load": TensorDataset(*tensors),
        "collate only": Made(lambda index: tensors[0][index], count),
        "JPEG decode": Made(partial(decode, jpeg()), count),
        "latency 0.3 ms": Made(wait, count),
        "pure Python": Made(pure_python, count),
    }


def fit(data: Any, schedule: str) -> float:
    """Return ms per step."""
    layers = [layer for _ in range(8) for layer in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU())]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(WIDTH, 10))
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = Trainer(schedule=schedule, run_dir=None, enable_progress_bar=False, device="cpu")
    batch_size = None if isinstance(data, list) else BATCH_SIZE
    result = trainer.fit(model, optimizer, data, loss_fn=F.cross_entropy, batch_size=batch_size)
    return result.train_s / result.num_steps * 1e3


def load(data: Dataset[Any]) -> float:
    """Return ms per batch of the loader by itself."""
    started_s = time.perf_counter()
    count = sum(1 for _ in DataLoader(data, BATCH_SIZE))
    return (time.perf_counter() - started_s) / count * 1e3


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(describe_machine())
    for name, data in loaders(arguments.batches).items():
        found = interleave(
            {
                "textbook": partial(fit, data, "textbook"),
                "overlap": partial(fit, data, "overlap"),
                "step": partial(fit, list(DataLoader(data, BATCH_SIZE)), "textbook"),
                "loader": partial(load, data),
            },
            arguments.rounds,
        )
        ratios = [a / b for a, b in zip(found["textbook"], found["overlap"], strict=True)]
        middle, low, high = median_interval(ratios)
        times = {variant: median_interval(values)[0] for variant, values in found.items()}
        print(
            f"{name:16} textbook {times['textbook']:6.1f} ms  overlap {times['overlap']:6.1f} ms  "
            f"step {times['step']:6.1f}  loader {times['loader']:6.1f}  "
            f"ratio {middle:.2f} [{low:.2f}, {high:.2f}]"
        )


if __name__ == "__main__":
    main()
