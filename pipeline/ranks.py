"""The processes that train one model together: which one this is, and what they agree on."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch


def ranks() -> tuple[int, int]:
    """Return this process's rank and the number of ranks: ``(0, 1)`` where no process group was made.

    Runs on:
        Any thread; talks to nobody.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def has_ranks() -> bool:
    """Say whether other processes train the same model."""
    return ranks()[1] > 1


def is_rank_zero() -> bool:
    """Say whether this process is the one that writes, among those that train together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


def agreed_to_stop(asked_by: str, reasons: Sequence[str], device: torch.device) -> str:
    """Return why all ranks stop after this step, if any of them was asked to; else an empty text.

    Args:
        asked_by: What asked this rank.
        reasons: All that may ask, an empty text first; of several, the last one counts.
        device: Where the ranks meet, unless they do so on the host.

    Runs on:
        Loop thread, on every rank at the same steps; waits for the others.
    """
    code = reasons.index(asked_by) if asked_by in reasons else 0
    is_on_host = torch.distributed.get_backend() == "gloo"
    asked = torch.tensor(code, device="cpu" if is_on_host else device)
    torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
    return reasons[int(asked.item())]
