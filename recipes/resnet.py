"""A residual network for small images: CIFAR's stem, three stages, batch norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and a way around them.

    Source:
        He et al., "Deep residual learning for image recognition" (2016).
    """

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(num_out),
            nn.ReLU(inplace=True),
            nn.Conv2d(num_out, num_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(num_out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or num_in != num_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out)
            )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(images) + self.shortcut(images))


def build(
    input_shape: Sequence[int],
    num_classes: int,
    width: int = 16,
    blocks_per_stage: int = 1,
    dropout: float = 0.0,
) -> nn.Module:
    """Return the network.

    Args:
        input_shape: ``(C, H, W)`` of one image.
        num_classes: Scores to give.
        width: Channels of the first stage; each further stage has twice as many.
        blocks_per_stage: Residual blocks in each of the three stages.
        dropout: Share of features dropped before the classifier.

    Returns:
        A module that takes float ``[B, C, H, W]`` and gives scores ``[B, num_classes]``.
    """
    num_channels = input_shape[0]
    layers: list[nn.Module] = [
        nn.Conv2d(num_channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    ]
    num_in = width
    for stage in range(3):
        num_out = width * 2**stage
        for block in range(blocks_per_stage):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(ResidualBlock(num_in, num_out, stride))
            num_in = num_out
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(num_in, num_classes)]
    return nn.Sequential(*layers, *head)
