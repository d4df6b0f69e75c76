"""What holds for the data and the run at hand: where its batches can be made, and why not elsewhere.

Advice is derived from this. What the data does not admit is neither predicted nor advised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from pipeline.checks import Limits

DataKind: TypeAlias = Literal["map", "iterable", "shards", "workers"]
PLACES = frozenset({"textbook", "inline", "thread", "process"})
NO_LIMITS = Limits()
ONE_READER = "an iterable is read by one thread, in its order"
ONE_CORE = "there is one core, for the loop and for whatever makes batches beside it"


@dataclass(frozen=True)
class Possible:
    """What can be done about a run's batches and steps.

    Args:
        kind: ``map`` for samples that can be shared out, ``iterable`` for what one thread must read,
            ``shards`` for an iterable dataset that is read in parts, ``workers`` for a DataLoader that
            has processes of its own.
        places: Where batches of this data can be made.
        obstacles: Why not, by place, of the others.
        max_workers: The most that can share in them; None for any number.
        parts_ms: Of a step, what is no training: ``log`` and ``callbacks``, each where it was timed.
        slowest_callback: The class of the callback that took most of the loop's time.
        remedy: What to type so that batches can be made elsewhere, and when that is right.
        has_free_cores: Whether there are cores for more workers.
        has_tried: Whether `auto` has settled, and so found nothing faster.
        restarts_workers: Whether a DataLoader starts its workers anew for each epoch.
    """

    kind: DataKind = "map"
    places: frozenset[str] = PLACES
    obstacles: Mapping[str, str] = field(default_factory=dict)
    max_workers: int | None = None
    parts_ms: Mapping[str, float] = field(default_factory=dict)
    slowest_callback: str = ""
    remedy: str = ""
    has_free_cores: bool = True
    has_tried: bool = False
    restarts_workers: bool = False


def places_of(
    kind: DataKind, unhookable: str = "", obstacle: str = "", limits: Limits = NO_LIMITS
) -> tuple[frozenset[str], dict[str, str]]:
    """Return the places for a kind of data, and why not the others.

    Args:
        kind: Of the data; see `Possible`.
        unhookable: What its draws come from that threads would share; empty for none.
        obstacle: Why no process can make its batches; empty for no such reason.
        limits: What was found in the data.
    """
    found: dict[str, str] = {}
    if kind in ("iterable", "workers"):
        found |= {"thread": ONE_READER, "process": ONE_READER}
    if kind == "shards":
        found["thread"] = ONE_READER
    if unhookable:
        drawn = f"its random numbers come from {unhookable}, which threads share"
        found |= {"inline": drawn, "thread": drawn}
    if obstacle:
        found.setdefault("process", obstacle)
    if limits.num_threads is not None:
        found["thread"] = limits.reason
    if limits.num_threads == 0 or (limits.num_threads is not None and kind == "map"):
        found["inline"] = limits.reason
    if not limits.has_processes:
        found["process"] = limits.reason
    return PLACES - set(found), found
