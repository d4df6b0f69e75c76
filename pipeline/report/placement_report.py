"""What ``placement=auto`` chose, and why."""

from __future__ import annotations

from dataclasses import dataclass, field


def plain_ms(ms: float) -> str:
    """Return milliseconds with three digits or more, and no exponent: ``0.12``, ``22.1``, ``1,034``."""
    return f"{ms:,.0f}" if ms >= 100 else f"{round(ms, 3):.3g}"


@dataclass(frozen=True)
class PlacementReport:
    """Where batches were made in the end, and what was measured on the way.

    Args:
        place: Such as ``process × 2`` or ``process × 2 (4 threads each)``; ``textbook`` is the loop thread
            itself.
        reason: In words.
        tried_ms: Milliseconds from batch to batch in each place that was tried.
        fetch_ms: Making a batch in the textbook loop; None before it was measured, or where the place was
            the user's choice.
        fetch_core_ms: How much of that was on a core.
        step_ms: Training on it there.
        obstacle: Why worker processes, which promised most, could not be tried; empty if that is not so.
        num_workers: Threads or processes; 0 where the place says it all.
        threads_per_worker: Of each process.
        limit: What was found in the data that keeps its batches in the loop; empty if nothing was.
        num_compared: Batches that were made twice, and compared.
        checks_s: Seconds that looking and comparing took.
        is_settled: Whether the place is chosen, and not only tried.
    """

    place: str
    reason: str
    tried_ms: dict[str, float] = field(default_factory=dict)
    fetch_ms: float | None = None
    fetch_core_ms: float | None = None
    step_ms: float | None = None
    obstacle: str = ""
    num_workers: int = 0
    threads_per_worker: int = 1
    limit: str = ""
    num_compared: int = 0
    checks_s: float = 0.0
    is_settled: bool = True

    @property
    def name(self) -> str:
        """The place without its number of workers."""
        return self.place.split()[0]

    def __str__(self) -> str:
        tried = ", ".join(f"{place} {plain_ms(ms)} ms" for place, ms in self.tried_ms.items())
        return f"{self.place}: {self.reason}{'; tried, from batch to batch: ' if tried else ''}{tried}"
