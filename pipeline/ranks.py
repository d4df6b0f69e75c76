"""Which of the processes that train together this one is."""

from __future__ import annotations

import torch


def ranks() -> tuple[int, int]:
    """Return this process's rank and the number of ranks: ``(0, 1)`` where no process group was made.

    Runs on:
        Any thread; talks to nobody.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
