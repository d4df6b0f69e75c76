"""How many cores this process may use: by its affinity, and by its control group."""

from __future__ import annotations

import contextlib
import math
import os


def available_cores() -> int:
    """Return the cores that this process may use; `os.cpu_count` tells those of the machine.

    Source:
        Linux kernel documentation, "Control Group v2": ``cpu.max`` holds a quota and its period.
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    quota = _group_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _group_quota() -> float | None:
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/cpu.max") as file:
        quota, period = file.read().split()
        return int(quota) / int(period)  # "max" where there is no limit
    return None
