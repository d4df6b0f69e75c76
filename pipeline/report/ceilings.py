"""The three ceilings of a step, and from them the time that a step would take in each placement.

With ``d`` the time of the device, ``g`` the time that this process holds the GIL (all of its threads)
and ``c`` the work of the host over its ``n`` cores, each a step:

    time per step ≥ max(d, g, c / n)

Further bounds belong to how the work is cut, not to its amount: the loop thread does its own part one
thing after the other (``loop``), a belt of ``w`` workers brings a batch every ``fetch / w`` (``belt``), and
the textbook loop makes a batch and then trains on it (``serial``). Threads hold the GIL of their process in
turn: with several in each of ``p`` worker processes, a batch comes no sooner than every ``held / p``.
A *prediction* adds what crossing between threads costs: hand-offs, and the convoy, in which the loop
waits for the GIL as long as a thread of plain Python holds it.

Everything here is arithmetic on measurements that are passed in; nothing is measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

Where: TypeAlias = Literal["textbook", "inline", "thread", "process"]
WHERE: tuple[Where, ...] = ("textbook", "inline", "thread", "process")

# A batch that crosses to the loop, in ms: `python -m benchmarks.overhead` and `benchmarks.compare`.
HANDOFF_MS: dict[Where, float] = {"textbook": 0.0, "inline": 0.02, "thread": 0.03, "process": 0.15}


@dataclass(frozen=True)
class StepCost:
    """What one optimizer step costs, by who pays; all in milliseconds a step.

    Args:
        loop_ms: The loop thread's own work, one thing after the other: forward, backward, optimizer, the
            log; without waiting for a batch, for the GIL, or for the device.
        fetch_ms: Making the step's batches on one thread, the time that it takes if nothing disturbs it.
        fetch_core_ms: How much of that is on a core; the rest is latency, which threads can have at once.
        fetch_held_ms: How much of it holds the GIL; None where nobody measured it.
        loop_held_ms: How much of `loop_ms` holds the GIL; None where nobody measured it.
        device_ms: The device's own time; 0 where the host is the device.
        other_held_ms: The GIL held by other threads, such as the writer's.
        is_remote: Whether the batches come from processes already, as a DataLoader's do: then
            `fetch_ms` is no work of this process.
    """

    loop_ms: float
    fetch_ms: float
    fetch_core_ms: float
    fetch_held_ms: float | None = None
    loop_held_ms: float | None = None
    device_ms: float = 0.0
    other_held_ms: float = 0.0
    is_remote: bool = False


@dataclass(frozen=True)
class Ceiling:
    """One bound of the time of a step.

    Args:
        name: ``device``, ``gil``, ``host``, ``loop``, ``belt`` or, in the textbook loop, ``serial``.
        step_ms: No step is shorter than this.
    """

    name: str
    step_ms: float


@dataclass(frozen=True)
class Prediction:
    """What a step would take.

    Args:
        where: Where batches are made.
        step_ms: The likely time.
        low_ms: The least, if what nobody measured (how much of the fetch holds the GIL) is in favour.
        high_ms: The most, if it is not.
        ceilings: Its bounds, the binding one first.
    """

    where: Where
    step_ms: float
    low_ms: float
    high_ms: float
    ceilings: tuple[Ceiling, ...]


def ceilings(
    cost: StepCost, where: Where, *, num_cores: int, num_workers: int = 1, threads_per_worker: int = 1
) -> tuple[Ceiling, ...]:
    """Return the bounds of a step, the binding one first.

    Args:
        cost: Of a step.
        where: Where its batches are made.
        num_cores: Cores that the host's work may use.
        num_workers: Threads or processes that make batches, in those two placements.
        threads_per_worker: Of each process.
    """
    found = [
        Ceiling("device", cost.device_ms),
        Ceiling("loop", cost.loop_ms),
        Ceiling("host", _host_ms(cost) / num_cores),
    ]
    if (held_ms := _held_ms(cost, where)) is not None:
        found.append(Ceiling("gil", held_ms))
    if where == "textbook":
        found.append(Ceiling("serial", cost.fetch_ms + headspace_ms(cost)))
    else:
        found.append(Ceiling("belt", _belt_ms(cost, where, num_workers, threads_per_worker)))
    return tuple(sorted((each for each in found if each.step_ms > 0), key=lambda each: -each.step_ms))


def predict(
    cost: StepCost, where: Where, *, num_cores: int, num_workers: int = 1, threads_per_worker: int = 1
) -> Prediction:
    """Return what a step would take with its batches made there.

    Args:
        cost: Of a step.
        where: Where its batches would be made.
        num_cores: Cores that the host's work may use.
        num_workers: Threads or processes that make batches, in those two placements.
        threads_per_worker: Of each process.
    """
    counts = {"num_cores": num_cores, "num_workers": num_workers, "threads_per_worker": threads_per_worker}
    bounds = ceilings(cost, where, **counts)
    if cost.fetch_held_ms is not None:
        step_ms = _step_ms(cost, where, bounds)
        return Prediction(where, step_ms, step_ms, step_ms, bounds)
    free, holding = (replace(cost, fetch_held_ms=held_ms) for held_ms in (0.0, cost.fetch_core_ms))
    low, high = (_step_ms(each, where, ceilings(each, where, **counts)) for each in (free, holding))
    return Prediction(where, (low + high) / 2, low, high, bounds)


def predict_all(
    cost: StepCost, *, num_cores: int, num_workers: int = 1, threads_per_worker: int = 1
) -> tuple[Prediction, ...]:
    """Return the predictions for every place, the textbook loop first; see `predict`."""
    counts = {"num_cores": num_cores, "num_workers": num_workers, "threads_per_worker": threads_per_worker}
    places = WHERE[:2] if cost.is_remote else WHERE
    return tuple(predict(cost, where, **counts) for where in places)


def headspace_ms(cost: StepCost) -> float:
    """Return what a step takes with its batch already there: no loader does better."""
    return max(cost.loop_ms, cost.device_ms)


def _step_ms(cost: StepCost, where: Where, bounds: tuple[Ceiling, ...]) -> float:
    if where == "textbook":
        return cost.fetch_ms + headspace_ms(cost)
    loop_ms = cost.loop_ms + HANDOFF_MS[where] + _convoy_ms(cost, where)
    return max(loop_ms, *(bound.step_ms for bound in bounds))


def _convoy_ms(cost: StepCost, where: Where) -> float:
    """Return how long the loop waits for the GIL.

    An operation of torch gives the GIL away, and behind a thread of plain Python gets it back an
    interval of some 5 ms later. A step has hundreds of them, so it waits as long as the other thread
    holds the GIL at all: all of `fetch_held_ms`. A thread that holds it in short pieces, and lets go
    of it between them, is met in one of them as often as its share of holding says, so it costs that
    share of `fetch_held_ms`; between the two lies a parabola, which is a fit, and no law. With a device
    that is slower than the loop, the wait eats the loop's slack first: see the maximum over the bounds.
    """
    if where == "process" or cost.is_remote or not cost.fetch_held_ms:
        return 0.0
    return cost.fetch_held_ms * min(cost.fetch_held_ms / cost.fetch_ms, 1.0)


def _belt_ms(cost: StepCost, where: Where, num_workers: int, threads_per_worker: int) -> float:
    if cost.is_remote:
        return cost.fetch_ms
    # Threads hold the GIL in turn, however many they are.
    held_ms = cost.fetch_held_ms or 0.0
    if where == "process":
        return max(cost.fetch_ms / threads_per_worker, held_ms) / num_workers
    return max(cost.fetch_ms / (num_workers if where == "thread" else 1), held_ms)


def _held_ms(cost: StepCost, where: Where) -> float | None:
    if cost.loop_held_ms is None or cost.fetch_held_ms is None:
        return None
    fetch_ms = 0.0 if where == "process" or cost.is_remote else cost.fetch_held_ms
    return cost.loop_held_ms + fetch_ms + cost.other_held_ms


def _host_ms(cost: StepCost) -> float:
    return cost.loop_ms + (0.0 if cost.is_remote else cost.fetch_core_ms) + cost.other_held_ms
