"""What is to be said of a run before its batches: that it saved, waited for the GIL, or was too short."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.loop.run import Run
from pipeline.report.placement_report import PlacementReport
from pipeline.report.text import OUTSIDE, outside_words
from pipeline.report.verdict import LARGE_RATIO, UNSETTLED
from pipeline.settings import Settings

MIN_SAVING_S = 1.0  # less is not worth a word
LONGER = "a longer run; or name a place (placement=…), so that auto need not try any"


class Finding(NamedTuple):
    """What the report says in place of a word on the batches.

    Args:
        verdict: What was found.
        advice: What to change next.
    """

    verdict: str
    advice: str


def finding_of(run: Run, placement: PlacementReport) -> Finding | None:
    """Return what is to be said first; None leaves the word to the batches."""
    return _saving(run) or _convoy(run, placement) or _unsettled(placement)


def outside_s(run: Run) -> dict[str, float]:
    """Return what the loop thread did between steps, which is in no step's time, in seconds by stage."""
    spent_s = {each.stage: each.wall_s for each in run.clock.times()}
    return {stage: spent_s[stage] for stage in OUTSIDE if spent_s.get(stage, 0.0) >= 0.005}


def outside_notes(run: Run) -> tuple[str, ...]:
    """Say the same in words."""
    found = outside_words(outside_s(run))
    return (f"besides the {run.clock.train_s:,.2f} s of training: {found}",) if found else ()


def _saving(run: Run) -> Finding | None:
    spent_s, train_s = outside_s(run), run.clock.train_s
    saving_s, whole_s = spent_s.get("checkpoint", 0.0), train_s + sum(spent_s.values())
    if saving_s < max(MIN_SAVING_S, LARGE_RATIO * whole_s):
        return None
    verdict = (
        f"saving takes {saving_s / whole_s:.0%} of the run: the loop spent {saving_s:,.1f} s on checkpoints "
        f"and {train_s:,.1f} s on training"
    )
    return Finding(verdict, _save_less(run.settings, is_beside=run.outbound.writer_cpu_s is not None))


def _save_less(settings: Settings, *, is_beside: bool) -> str:
    """Return how to save less often, or beside the loop if that is not so yet."""
    more = ("checkpoint_every_n_steps", "checkpoint_every_n_minutes")
    periods = [f"{name}: more than {now}" for name in more if (now := getattr(settings, name)) is not None]
    rarer = " and ".join(periods) or "longer epochs, for each ends with a checkpoint"
    return rarer if is_beside else f"{rarer}; or schedule='overlap', which writes them beside the loop"


def _convoy(run: Run, placement: PlacementReport) -> Finding | None:
    found = run.gil.convoy
    if found is None:
        return None
    if found.holder.startswith("prefetch") and placement.name not in ("inline", "thread"):
        return None  # seen in a place that was left
    when = " (in the second in which it was looked at)" if run.gil.report is None else ""
    return Finding(found.finding + when, found.advice)


def _unsettled(placement: PlacementReport) -> Finding | None:
    return None if placement.is_settled else Finding(UNSETTLED, LONGER)
