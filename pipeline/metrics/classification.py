"""Metrics of classifiers: one value per sample."""

from __future__ import annotations

import torch


def accuracy(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Say for each sample whether the class with the highest score is the right one.

    Args:
        outputs: Scores, ``[B, num_classes]``.
        target: Class indices, int64 ``[B]``.

    Returns:
        bool ``[B]``.
    """
    return outputs.argmax(dim=1) == target


def top_k_accuracy(outputs: torch.Tensor, target: torch.Tensor, k: int = 5) -> torch.Tensor:
    """Say for each sample whether the right class is among the `k` with the highest scores.

    ``metrics={"top5": top_k_accuracy, "top3": functools.partial(top_k_accuracy, k=3)}``

    Args:
        outputs: Scores, ``[B, num_classes]``, with at least `k` classes.
        target: Class indices, int64 ``[B]``.
        k: How many guesses count.

    Returns:
        bool ``[B]``.
    """
    return (outputs.topk(k, dim=1).indices == target.unsqueeze(1)).any(dim=1)
