"""Ten workloads, each with what it stands for; everything in them can be pickled, for worker processes."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate

WIDTH = 512
WORDS = "the loop waits for a batch while another thread holds the lock that it wants to have back " * 11


class Samples(Dataset[Any]):
    """Samples that a function makes of their index."""

    def __init__(self, make: Callable[[int], Any], num_samples: int) -> None:
        self.make, self.num_samples = make, num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


def ready(index: int) -> tuple[torch.Tensor, int]:
    """Return a sample that is there already."""
    return _features()[index % 64], index % 10


def tokenise(index: int) -> tuple[torch.Tensor, int]:
    """Turn words into numbers in plain Python, the GIL held all the time."""
    counts = [0.0] * WIDTH
    for number, word in enumerate(WORDS.split()):
        slot = index
        for letter in word:
            slot = (slot * 31 + ord(letter)) % 65521
        counts[(slot + number) % WIDTH] += 1.0
    return torch.tensor(counts), index % 10


def decode(index: int) -> tuple[torch.Tensor, int]:
    """Decode a JPEG and augment it with Pillow, the GIL released most of the time."""
    image = Image.open(io.BytesIO(_jpeg())).convert("L").crop((index % 16, 4, 112, 112))
    if index % 2:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(image.resize((32, 16), Image.Resampling.BILINEAR), dtype=np.float32)
    return torch.from_numpy(pixels.reshape(-1) / 255), index % 10


def augment(index: int) -> tuple[torch.Tensor, int]:
    """Normalise and mix arrays with NumPy, in operations of some 50 µs."""
    signal = _signal()
    mixed = np.sqrt(np.abs(signal + np.roll(signal, index))) * np.float32(0.7) + signal[::-1] * np.float32(
        0.3
    )
    mixed = (mixed - mixed.mean()) / (mixed.std() + 1e-6)
    return torch.from_numpy(mixed[: 128 * WIDTH].reshape(WIDTH, 128).mean(axis=1)), index % 10


def store(index: int) -> tuple[torch.Tensor, int]:
    """Wait 2 to 20 ms, as for storage over a network."""
    time.sleep((2 + index * 7919 % 19) * 1e-3)
    return ready(index)


def ragged(index: int) -> dict[str, Any]:
    """Return a nested sample of many small tensors, the sequences of different lengths."""
    length = 5 + index * 7 % 11
    return {
        "words": torch.arange(length) % 97,
        "parts": {f"part_{number}": torch.full((3,), float(number)) for number in range(24)},
        "features": ready(index)[0],
        "target": index % 10,
    }


def pad(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Pad the sequences, and stack the rest."""
    words = torch.nn.utils.rnn.pad_sequence([sample.pop("words") for sample in samples], batch_first=True)
    return {"words": words, **default_collate(samples)}


def large(index: int) -> tuple[torch.Tensor, int]:
    """Return 12.5 MB of floats."""
    return torch.full((6104, WIDTH), float(index % 7)), index % 10


@dataclass(frozen=True)
class Workload:
    """One job.

    Args:
        name: What the table calls it.
        about: What it stands for.
        make: Makes a sample of its index.
        batch_size: Samples a batch.
        num_batches: Batches an epoch.
        num_epochs: How often they are gone through.
        collate_fn: Samples to batch.
        num_layers: Of the model: its step is some 2 ms a layer on one core.
        width: Of its layers.
        num_launches: Kernels a step on the simulated device, 20 µs of host time each.
        device_ms: Their time there.
        num_logged: Further numbers that are logged at each step.
        counts_start: Whether the time to the first step counts.
    """

    name: str
    about: str
    make: Callable[[int], Any]
    batch_size: int = 16
    num_batches: int = 100
    num_epochs: int = 1
    collate_fn: Callable[[list[Any]], Any] | None = None
    num_layers: int = 3
    width: int = WIDTH
    num_launches: int = 100
    device_ms: float = 6.0
    num_logged: int = 0
    counts_start: bool = False

    @property
    def num_steps(self) -> int:
        """Steps of all epochs."""
        return self.num_batches * self.num_epochs

    def dataset(self) -> Samples:
        """Return its data."""
        return Samples(self.make, self.num_batches * self.batch_size)


WORKLOADS = (
    Workload("python", "pure-Python samples: tokenising, parsing", tokenise),
    Workload(
        "balanced", "pure Python that takes as long as the step", tokenise, batch_size=48, num_layers=5
    ),
    Workload("jpeg", "JPEG decode and augment", decode),
    Workload("numpy", "NumPy augment", augment),
    Workload("storage", "storage with 2 to 20 ms a sample", store, batch_size=8, num_batches=16),
    Workload("collate", "ragged sequences, nested dicts, hundreds of small tensors", ragged, collate_fn=pad),
    Workload("large", "batches of 100 MB", large, batch_size=8, num_batches=12, num_layers=6),
    Workload(
        "tiny", "many tiny steps", ready,
        num_batches=800, num_layers=1, width=64, num_launches=20, device_ms=0.5,
    ),
    Workload(
        "epochs", "short epochs: the start counts", tokenise, num_batches=10, num_epochs=10, counts_start=True
    ),
    Workload("nothing", "nothing to gain", ready),
    Workload(
        "logging", "20 numbers logged at each step", ready, num_batches=400, num_layers=1, num_logged=20
    ),
)  # fmt: skip


@cache
def _features() -> torch.Tensor:
    return torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0))


@cache
def _signal() -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal(128 * WIDTH, dtype=np.float32)


@cache
def _jpeg() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()
