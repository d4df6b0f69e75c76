"""What the figures mean, in words: what binds, what there is to win, the one setting to change next."""

from __future__ import annotations

from collections.abc import Collection

from pipeline.report.ceilings import Ceiling, Prediction, StepCost, Where, headspace_ms
from pipeline.report.record import Gain

WORTH_RATIO = 0.95  # a prediction below this share of the measured step is worth a change
SMALL_RATIO = 0.05
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
    "host": "more cores lift it, or less work a sample",
    "belt": "more workers lift it, or less work a sample",
    "serial": "overlap lifts it, where a thread or a process can make batches beside the step",
}
SETTINGS: dict[Where, str] = {
    "textbook": "schedule='textbook'",
    "inline": "schedule='overlap', placement='inline'",
    "thread": "placement='thread'",
    "process": "placement='process'",
}


def describe_ceiling(step_ms: float, bounds: tuple[Ceiling, ...]) -> str:
    """Say which ceiling binds, how close the run is to it, and what would lift it."""
    if not bounds:
        return ""
    binding = bounds[0]
    share = min(binding.step_ms / step_ms, 1.0) if step_ms else 0.0
    return (
        f"the ceiling is {BINDS[binding.name]}: {binding.step_ms:.2f} of {step_ms:.2f} ms a step "
        f"({share:.0%}); {LIFTS[binding.name]}"
    )


def describe_gain(gain: Gain) -> str:
    """Say what overlap won, and whether it won anything."""
    figures = (
        f"{gain.ratio:.2f} times the textbook loop [{gain.low:.2f}, {gain.high:.2f}], measured in this run: "
        f"{gain.overlap_ms:.2f} instead of {gain.textbook_ms:.2f} ms a step"
    )
    if gain.low <= 1.0 <= gain.high:
        return f"no gain to be told from chance: {figures}"
    if gain.high < 1.0:
        return f"a loss: {figures}"
    won = "" if gain.won_ratio is None else f", {min(gain.won_ratio, 1.0):.0%} of what there is to win"
    return f"a gain: {figures}{won}"


def describe(
    step_ms: float, data_wait_ms: float, cost: StepCost | None, where: Where, gain: Gain | None
) -> str:
    """Return the verdict on a run.

    Args:
        step_ms: A step as it was.
        data_wait_ms: Of it, waiting for batches.
        cost: What a step costs.
        where: Where its batches were made.
        gain: What was measured in the run, if it was.
    """
    if gain is not None:
        return describe_gain(gain)
    if cost is None or step_ms <= 0:
        return "too short to say"
    share = data_wait_ms / step_ms
    if share < SMALL_RATIO and where != "textbook" and cost.fetch_ms > SMALL_RATIO * step_ms:
        return (
            f"loading is hidden: the loop waits for batches {share:.1%} of the time, while making them takes "
            f"{cost.fetch_ms:.2f} ms beside a step of {step_ms:.2f} ms"
        )
    if share < SMALL_RATIO:
        return (
            f"nothing to gain from loading: the loop waits for batches {share:.1%} of the time, "
            f"{data_wait_ms:.2f} of {step_ms:.2f} ms a step"
        )
    verb = "makes its own batches" if where == "textbook" else "waits for batches"
    possible = step_ms / max(headspace_ms(cost), 1e-9)
    return (
        f"the loop {verb} {share:.0%} of the time, {data_wait_ms:.2f} of {step_ms:.2f} ms a step; with every "
        f"batch already there it would be {possible:.2f} times as fast, and no loader does better"
    )


def advise(
    step_ms: float,
    cost: StepCost | None,
    where: Where,
    predictions: tuple[Prediction, ...],
    settable: Collection[str],
    gain: Gain | None,
) -> str:
    """Return the one setting to change next; empty for none.

    Args:
        step_ms: A step as it was.
        cost: What a step costs.
        where: Where its batches were made.
        predictions: For every place.
        settable: The places that a user can choose.
        gain: What was measured in the run, if it was.
    """
    if cost is None or step_ms <= 0:
        return ""
    if gain is not None and gain.high < 0.98:
        return f"{SETTINGS['textbook']}: overlap loses here"
    by_place = {each.where: each for each in predictions}
    others = [each for each in predictions if each.where != where and each.where in settable]
    worth = [each for each in others if each.high_ms < WORTH_RATIO * step_ms]
    if worth:
        best = min(worth, key=lambda each: each.high_ms)
        return f"{SETTINGS[best.where]}: predicted {_range(best)} ms a step instead of {step_ms:.2f}"
    hopeful = [each for each in others if each.low_ms < WORTH_RATIO * step_ms]
    if hopeful and cost.fetch_held_ms is None:
        best = min(hopeful, key=lambda each: each.low_ms)
        return (
            f"gil='account': {SETTINGS[best.where]} may take {_range(best)} ms a step instead of "
            f"{step_ms:.2f}, depending on how much of the fetch holds the GIL, which it measures"
        )
    if where in by_place and step_ms - headspace_ms(cost) > SMALL_RATIO * step_ms:
        return f"no setting: {LIFTS[by_place[where].ceilings[0].name]}"
    return ""


def _range(found: Prediction) -> str:
    if found.high_ms - found.low_ms < 0.01 * found.high_ms:
        return f"{found.step_ms:.2f}"
    return f"{found.low_ms:.2f} to {found.high_ms:.2f}"
