"""Datasets as people have them, each a function of its index: nothing in them may keep a run in the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.compare.workloads import tokenise

WIDTH = 512


class Mapped(Dataset[Any]):
    """Rows of a file that is mapped into memory, with some arithmetic of NumPy."""

    def __init__(self, path: str) -> None:
        self.rows = np.memmap(path, np.float32, "r", shape=(1600, WIDTH))

    def __len__(self) -> int:
        return 1600

    def __getitem__(self, index: int) -> Any:
        row = np.asarray(self.rows[index])
        for _ in range(20):
            row = np.sort(np.abs(np.sin(row)))
        return torch.from_numpy(np.ascontiguousarray(row)), index % 10


class Transformed(Dataset[Any]):
    """Plain Python, and a function that a process cannot be given."""

    def __init__(self) -> None:
        self.transform = lambda sample: (sample[0] * 2, sample[1])

    def __len__(self) -> int:
        return 1600

    def __getitem__(self, index: int) -> Any:
        return self.transform(tokenise(index))


class Cached(Dataset[Any]):
    """Plain Python whose result is kept for half of the samples."""

    def __init__(self) -> None:
        self.cache: dict[int, Any] = {}

    def __len__(self) -> int:
        return 1600

    def __getitem__(self, index: int) -> Any:
        if index % 2:
            return tokenise(index)
        if index not in self.cache:
            self.cache[index] = tokenise(index)
        return self.cache[index]


class Tokenised(Dataset[Any]):
    """A table of Hugging Face's `datasets`, from which a row is taken and tokenised."""

    def __init__(self) -> None:
        from datasets import Dataset as Table

        self.table = Table.from_dict({"number": list(range(1600))})

    def __len__(self) -> int:
        return 1600

    def __getitem__(self, index: int) -> Any:
        return tokenise(self.table[index]["number"])


def flattened(image: torch.Tensor) -> torch.Tensor:
    """Return 512 numbers of an image."""
    return image.reshape(-1)[:WIDTH]


def images(folder: str) -> ImageFolder:
    """Return a folder of JPEGs with torchvision's usual transforms."""
    for number in range(160):
        place = Path(folder) / "ab"[number % 2]
        place.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (160, 160, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.jpg", "JPEG")
    steps = [transforms.RandomResizedCrop(64), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    return ImageFolder(folder, transforms.Compose([*steps, transforms.Lambda(flattened)]))


def mapped(folder: str) -> Mapped:
    """Return rows of a file."""
    path = f"{folder}/rows"
    np.random.default_rng(0).standard_normal((1600, WIDTH), dtype=np.float32).tofile(path)
    return Mapped(path)


EVERYDAY = {
    "image folder": images,
    "memory map": mapped,
    "lambda": lambda folder: Transformed(),
    "dict cache": lambda folder: Cached(),
    "hugging face": lambda folder: Tokenised(),
}
