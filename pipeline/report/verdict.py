"""What the figures mean, in words: what binds, what there is to win, the one setting to change next."""

from __future__ import annotations

import math
from collections.abc import Collection

from pipeline.report.ceilings import Ceiling, Prediction, StepCost, Where, headspace_ms
from pipeline.report.possible import ONE_READER, Possible
from pipeline.report.record import Gain

WORTH_RATIO = 0.95  # a prediction below this share of the measured step is worth a change
SMALL_RATIO = 0.05
LARGE_RATIO = 0.3  # of a step: what is no training and takes as much is what to change
ANYTHING = Possible()
BINDS = {
    "device": "the device's own work",
    "loop": "the loop thread's own work",
    "gil": "the GIL, which one thread at a time can hold",
    "host": "the cores, all of them together",
    "belt": "the belt that makes the batches",
    "serial": "that one thread first makes a batch and then trains on it",
}
LIFTS = {
    "device": "only a faster step on the device lifts it: precision, torch.compile, a smaller model",
    "loop": "only a shorter step lifts it: torch.compile, an optimizer with fused=True, larger batches",
    "gil": "work that holds the GIL leaves it only by moving to a process or by going away",
    "host": "more cores lift it, or less work a step",
}
NO_CORES = " (only where making a sample mostly waits: every core has one)"
NOTHING_FASTER = "only less work a sample lifts it: no other place that auto can use is faster"
OVERLAP = "overlap lifts it, where a thread or a process can make batches beside the step"
TRIALS = "; the steps in which auto tried other places count in these means"
UNSETTLED = "none yet: the run ended before auto had settled where batches are made"
SETTINGS: dict[Where, str] = {
    "textbook": "schedule='textbook'",
    "inline": "schedule='overlap', placement='inline'",
    "thread": "placement='thread'",
    "process": "placement='process'",
}


def describe_ceiling(step_ms: float, bounds: tuple[Ceiling, ...], lifts: str | None = None) -> str:
    """Say which ceiling binds, how close the run is to it, and what would lift it.

    A ceiling above the step was made of other moments than the mean of all steps, such as the trials of
    ``auto``; it is then said to be an estimate, and no share of anything.

    Args:
        step_ms: A step as it was.
        bounds: The binding one first.
        lifts: What would, where more is known of the data than the ceiling's name says.
    """
    if not bounds or step_ms <= 0:
        return ""
    binding = binding_of(bounds)
    lifts = lift(binding.name, "textbook", ANYTHING) if lifts is None else lifts
    if binding.step_ms > step_ms:
        figures = f"estimated at {binding.step_ms:,.2f} ms, the steps took {step_ms:,.2f} on average"
    else:
        share = binding.step_ms / step_ms
        figures = f"{binding.step_ms:,.2f} of {step_ms:,.2f} ms a step ({share:.0%})"
    return f"the ceiling is {BINDS[binding.name]}: {figures}; {lifts}"


def binding_of(bounds: tuple[Ceiling, ...]) -> Ceiling:
    """Return what binds: not the turns of loading and training where loading is next to nothing of them."""
    first, *others = bounds
    is_all_step = first.name == "serial" and others and others[0].step_ms > WORTH_RATIO * first.step_ms
    return others[0] if is_all_step else first


def lift(name: str, where: Where, possible: Possible, bound_ms: float = math.inf) -> str:
    """Say what lifts a ceiling, for data and places as they are.

    Args:
        name: Of the ceiling.
        where: Where batches were made.
        possible: What holds for the data.
        bound_ms: The ceiling itself.
    """
    if name == "belt":
        return _lift_belt(where, possible)
    if name == "serial":
        return _lift_serial(possible)
    if name == "gil" and where != "process" and "process" not in possible.places:
        return f"only less Python on any thread lifts it: {_why_not('process', possible)}"
    if name == "loop" and (part := _large_part(possible, LARGE_RATIO, bound_ms)):
        return f"a shorter step lifts it, and {_lift_part(part, possible)}"
    return LIFTS[name]


def _lift_belt(where: Where, possible: Possible) -> str:
    if possible.kind == "workers":
        more = "a higher num_workers" + ("" if possible.has_free_cores else NO_CORES)
        kept = ", persistent_workers=True" if possible.restarts_workers else ""
        return (
            "the DataLoader's own workers make them: less work a sample lifts it, a larger "
            f"prefetch_factor{kept}, or {more}"
        )
    if possible.kind == "iterable":
        return f"{ONE_READER}: only less work a batch lifts it, or a dataset with indices"
    others = [SETTINGS[place] for place in ("thread", "process") if place in possible.places]
    if where in ("thread", "process"):
        if possible.max_workers is not None:
            return (
                f"less work a sample lifts it, or more shards: no more than {possible.max_workers} can share"
            )
        if possible.has_tried:
            return NOTHING_FASTER
        more = f"more workers, {SETTINGS[where]} with a higher num_workers"
        return f"less work a sample lifts it, or {more}{'' if possible.has_free_cores else NO_CORES}"
    if not others:
        return f"only less work a sample lifts it: {_why_not('process', possible)}"
    if possible.has_tried:
        return NOTHING_FASTER
    if possible.has_free_cores:
        return f"more workers lift it, with {' or '.join(others)}, or less work a sample"
    return f"less work a sample lifts it, or {others[0]}{NO_CORES}"


def _lift_serial(possible: Possible) -> str:
    if possible.kind == "workers":
        return _lift_belt("textbook", possible)
    if possible.remedy:
        return possible.remedy
    if not possible.places - {"textbook"}:
        return f"only less work a sample lifts it: {_why_not('inline', possible)}"
    return NOTHING_FASTER if possible.has_tried else OVERLAP


def _why_not(place: str, possible: Possible) -> str:
    return possible.obstacles.get(place, "nothing else can make these batches")


def _large_part(possible: Possible, ratio: float, step_ms: float) -> str:
    """Return which of `parts_ms` takes that share of a step and the most of them; empty for none."""
    large = {name: ms for name, ms in possible.parts_ms.items() if ms > ratio * step_ms}
    return max(large, key=large.__getitem__) if large else ""


def _lift_part(part: str, possible: Possible) -> str:
    ms = possible.parts_ms[part]
    if part == "callbacks":
        which = possible.slowest_callback or "they"
        return (
            f"callbacks take {ms:,.2f} ms of it, {which} most: tell it of fewer steps with its every=, or "
            "read numbers in on_step_read, which runs where the loggers do"
        )
    return f"logging takes {ms:,.2f} ms of it: set log_every_n_steps higher"


def describe_gain(gain: Gain) -> str:
    """Say what overlap won, and whether it won anything."""
    figures = (
        f"{gain.ratio:.2f} times the textbook loop [{gain.low:.2f}, {gain.high:.2f}], measured in this run: "
        f"{gain.overlap_ms:,.2f} instead of {gain.textbook_ms:,.2f} ms a step"
    )
    if gain.low <= 1.0 <= gain.high:
        return f"no gain to be told from chance: {figures}"
    if gain.high < 1.0:
        return f"a loss: {figures}"
    won = "" if gain.won_ratio is None else f", {min(gain.won_ratio, 1.0):.0%} of what there is to win"
    return f"a gain: {figures}{won}"


def describe(
    step_ms: float,
    data_wait_ms: float,
    cost: StepCost | None,
    where: Where,
    gain: Gain | None,
    possible: Possible = ANYTHING,
) -> str:
    """Return the verdict on a run.

    Args:
        step_ms: A step as it was.
        data_wait_ms: Of it, waiting for batches.
        cost: What a step costs.
        where: Where its batches were made.
        gain: What was measured in the run, if it was.
        possible: What holds for the data.
    """
    if gain is not None:
        return describe_gain(gain)
    if cost is None or step_ms <= 0:
        return "too short to say"
    share = data_wait_ms / step_ms
    if share < SMALL_RATIO and cost.is_remote:
        makers = "the DataLoader's workers" if possible.kind == "workers" else "worker processes"
        return (
            f"loading is hidden: {makers} make the batches, and the loop waits for them {share:.1%} of the "
            f"time, {data_wait_ms:,.2f} of {step_ms:,.2f} ms a step"
        )
    if share < SMALL_RATIO and where != "textbook" and cost.fetch_ms > SMALL_RATIO * step_ms:
        return (
            f"loading is hidden: the loop waits for batches {share:.1%} of the time, while making them takes "
            f"{cost.fetch_ms:,.2f} ms beside a step of {step_ms:,.2f} ms"
        )
    if share < SMALL_RATIO:
        return (
            f"nothing to gain from loading: the loop waits for batches {share:.1%} of the time, "
            f"{data_wait_ms:,.2f} of {step_ms:,.2f} ms a step"
        )
    verb = "makes its own batches" if where == "textbook" else "waits for batches"
    if possible.kind == "workers":
        verb = "waits for the DataLoader's workers"
    speedup = step_ms / max(headspace_ms(cost), 1e-9)
    return (
        f"the loop {verb} {share:.0%} of the time, {data_wait_ms:,.2f} of {step_ms:,.2f} ms a step; with "
        f"every batch already there it would be {speedup:.2f} times as fast, and no loader does better"
    )


def advise(
    step_ms: float,
    cost: StepCost | None,
    where: Where,
    predictions: tuple[Prediction, ...],
    settable: Collection[str],
    gain: Gain | None,
    possible: Possible = ANYTHING,
    bounds: tuple[Ceiling, ...] = (),
) -> str:
    """Return the one setting to change next; empty for none.

    Args:
        step_ms: A step as it was.
        cost: What a step costs.
        where: Where its batches were made.
        predictions: For every place.
        settable: The places that a user can choose.
        gain: What was measured in the run, if it was.
        possible: What holds for the data: no other place is advised.
        bounds: Of the run as it was, where no prediction has them.
    """
    if cost is None or step_ms <= 0:
        return ""
    if gain is not None and gain.high < 0.98:
        return f"{SETTINGS['textbook']}: overlap loses here"
    part = _large_part(possible, LARGE_RATIO, step_ms)
    if part and possible.parts_ms[part] > step_ms - headspace_ms(cost):
        return f"no placement: {_lift_part(part, possible)}"
    by_place = {each.where: each for each in predictions}
    others = [
        each for each in predictions if each.where != where and each.where in {*settable} & possible.places
    ]
    worth = [each for each in others if each.high_ms < WORTH_RATIO * step_ms]
    if worth:
        best = min(worth, key=lambda each: each.high_ms)
        return f"{SETTINGS[best.where]}: predicted {_range(best)} ms a step instead of {step_ms:,.2f}"
    hopeful = [each for each in others if each.low_ms < WORTH_RATIO * step_ms]
    if hopeful and cost.fetch_held_ms is None:
        best = min(hopeful, key=lambda each: each.low_ms)
        return (
            f"gil='account': {SETTINGS[best.where]} may take {_range(best)} ms a step instead of "
            f"{step_ms:,.2f}, depending on how much of the fetch holds the GIL, which it measures"
        )
    bounds = by_place[where].ceilings if where in by_place else bounds
    if bounds and step_ms - headspace_ms(cost) > SMALL_RATIO * step_ms:
        bound = binding_of(bounds)
        if possible.remedy and bound.name in ("serial", "belt"):
            return possible.remedy
        return f"no setting: {lift(bound.name, where, possible, bound.step_ms)}"
    return ""


def _range(found: Prediction) -> str:
    if found.high_ms - found.low_ms < 0.01 * found.high_ms:
        return f"{found.step_ms:,.2f}"
    return f"{found.low_ms:,.2f} to {found.high_ms:,.2f}"
