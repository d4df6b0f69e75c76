"""The interpreter's switch interval, for a while."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

SHORT_SWITCH_S = 1e-4


@contextmanager
def short_switch_interval() -> Iterator[None]:
    """Have a thread that wants the GIL ask for it after 0.1 ms, and not 5, for the length of a block.

    It is a setting of the whole process: it is put back afterwards, unless somebody else has changed it
    meanwhile, and left alone where it is shorter already.

    Source:
        `sys.setswitchinterval`. What it wins: `python -m benchmarks.knobs`.
    """
    before = sys.getswitchinterval()
    if before <= SHORT_SWITCH_S:
        yield
        return
    sys.setswitchinterval(SHORT_SWITCH_S)
    ours = sys.getswitchinterval()
    try:
        yield
    finally:
        if sys.getswitchinterval() == ours:
            sys.setswitchinterval(before)
