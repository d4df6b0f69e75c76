"""Data for the recipes: digits that ship with them, CIFAR-10, folders of images, random images."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset
from torchvision import datasets
from torchvision.transforms import v2

from pipeline import ConfigError, Datasets

_NUM_DIGITS_TRAIN = 1437
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CIFAR10_MEAN, _CIFAR10_STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


class TransformedDataset(Dataset[tuple[torch.Tensor, int]]):
    """Images and labels in memory, with a transform for each image.

    Args:
        images: ``[N, C, H, W]``.
        labels: int64 ``[N]``.
        transform: Applied to one image ``[C, H, W]``.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, transform: Any) -> None:
        self._images, self._labels, self._transform = images, labels.tolist(), transform

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._transform(self._images[index]), self._labels[index]


def digits(augment: bool = True) -> Datasets:
    """Return the handwritten digits that ship with the recipes: 1,437 to train with, 360 to test.

    Args:
        augment: Shift and turn the training images a little at random.

    Source:
        Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI (1998), CC BY 4.0. The
        last 360 images, which other people wrote than the first, are held out.
    """
    with (resources.files("recipes") / "assets" / "digits.npz").open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        images = torch.from_numpy(arrays["images"]).float().div(8.0).sub(1.0).unsqueeze(1)
        labels = torch.from_numpy(arrays["labels"]).long()
    split = _NUM_DIGITS_TRAIN
    train: Dataset[Any] = TensorDataset(images[:split], labels[:split])
    if augment:
        # Small images: a shift of one pixel is an eighth of the width; -1 is the background.
        move = v2.RandomAffine(
            degrees=10, translate=(0.125, 0.125), fill=-1.0, interpolation=v2.InterpolationMode.BILINEAR
        )
        train = TransformedDataset(images[:split], labels[:split], move)
    return Datasets(train, TensorDataset(images[split:], labels[split:]), (1, 8, 8), 10)


def cifar10(root: str) -> Datasets:
    """Return CIFAR-10 from a folder that torchvision has filled: random crops and flips to train with.

    Args:
        root: The folder that holds ``cifar-10-batches-py``.

    Raises:
        ConfigError: If it is not there.
    """
    augment = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
    try:
        train = datasets.CIFAR10(root, train=True, transform=_tensor(_CIFAR10_MEAN, _CIFAR10_STD, augment))
        val = datasets.CIFAR10(root, train=False, transform=_tensor(_CIFAR10_MEAN, _CIFAR10_STD))
    except RuntimeError as error:
        raise ConfigError(
            f"data.root must be a folder with CIFAR-10 in it, and {str(root)!r} has none "
            f"(or a damaged one). Download it there once, 170 MB:\n"
            f'  python -c "from torchvision.datasets import CIFAR10; CIFAR10({str(root)!r}, download=True)"'
        ) from error
    return Datasets(train, val, (3, 32, 32), 10)


def imagefolder(root: str, image_size: int = 224) -> Datasets:
    """Return folders of images, one for each class, under ``root/train`` and ``root/val``.

    Training images are decoded, cropped at random, resized, flipped and normalised; those for
    validation are cropped at the centre.

    Args:
        root: Holds ``train/<class>/*.jpg`` and ``val/<class>/*.jpg``.
        image_size: Height and width in pixels.

    Raises:
        ConfigError: If the folders are not there, hold no images, or hold different classes.
    """
    augment = v2.Compose([v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip()])
    centre = v2.Compose([v2.Resize(image_size * 8 // 7), v2.CenterCrop(image_size)])
    train = _image_folder(Path(root) / "train", _tensor(_IMAGENET_MEAN, _IMAGENET_STD, augment))
    val = _image_folder(Path(root) / "val", _tensor(_IMAGENET_MEAN, _IMAGENET_STD, centre))
    if train.classes != val.classes:
        raise ConfigError(
            f"{root}/train and {root}/val must have the same class folders, got {train.classes} and "
            f"{val.classes}."
        )
    return Datasets(train, val, (3, image_size, image_size), len(train.classes))


def synthetic(
    num_samples: int = 2048,
    input_shape: tuple[int, ...] = (3, 32, 32),
    num_classes: int = 10,
    seed: int = 0,
) -> Datasets:
    """Return random images whose label can be learned: each class has a mean image of its own."""
    generator = torch.Generator().manual_seed(seed)
    shape = tuple(input_shape)
    means = torch.randn(num_classes, *shape, generator=generator)
    labels = torch.randint(0, num_classes, (num_samples,), generator=generator)
    images = means[labels] + torch.randn(num_samples, *shape, generator=generator)
    split = max(1, num_samples * 4 // 5)
    return Datasets(
        TensorDataset(images[:split], labels[:split]),
        TensorDataset(images[split:], labels[split:]),
        shape,
        num_classes,
    )


def _tensor(mean: tuple[float, ...], std: tuple[float, ...], augment: Any = None) -> Any:
    steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std), v2.ToPureTensor()]
    return v2.Compose([augment, *steps] if augment is not None else steps)


def _image_folder(folder: Path, transform: Any) -> datasets.ImageFolder:
    try:
        return datasets.ImageFolder(str(folder), transform)
    except FileNotFoundError as error:
        raise ConfigError(
            f"data.root must hold train/<class>/*.jpg and val/<class>/*.jpg, but {folder} is not such "
            f"a folder ({error}). Type data.root=/path/to/images."
        ) from error
