"""The report as a table that a person reads in ten seconds."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.errors import counted
from pipeline.report.record import RunReport, StageLine

MIN_SHOWN_MS = 0.0005
OUTSIDE = {
    "validate": "validations",
    "checkpoint": "checkpoints",
    "between": "beginnings and ends of epochs",
}


def to_text(report: RunReport) -> str:
    """Return a report as lines for a terminal."""
    lines = [_headline(report), *_stage_table(report)]
    if outside := outside_words({stage: report.facts.get(f"{stage}_s", 0.0) for stage in OUTSIDE}):
        lines.append(f"besides  {outside}")
    if report.placement is not None:
        lines.append(f"batches  made in {report.placement}")
    if report.ceiling:
        lines.append(f"ceiling  {report.ceiling}")
    if len(report.predictions) > 1:
        places = (f"{each.where} {_span(each.low_ms, each.high_ms)}" for each in report.predictions)
        lines.append(f"predict  ms a step: {', '.join(places)}")
    if report.gain is None and report.settings.get("measure_gain"):
        lines.append(
            "gain     not measured: the run or its epochs were too short; it begins when the place is settled"
        )
    lines.append(f"verdict  {report.verdict}")
    lines.append(f"next     {report.advice or 'nothing to change'}")
    return "\n".join(lines)


def outside_words(spent_s: Mapping[str, float]) -> str:
    """Say what was done between steps, which is in no step's time; empty for nothing worth a word.

    Args:
        spent_s: Seconds by stage.
    """
    return ", ".join(
        f"{OUTSIDE[stage]} {each_s:,.2f} s" for stage, each_s in spent_s.items() if each_s >= 0.005
    )


def _headline(report: RunReport) -> str:
    facts = report.facts
    whose = "seed" if facts.get("is_seed_given", True) else "torch's seed"
    seed = f", {whose} {facts['seed']}" if "seed" in facts else ""  # older reports have none
    which = " outside of the textbook windows" if report.gain is not None else ""
    return (
        f"{counted(facts['num_steps'], 'step')} in {_seconds(facts['train_s'])} s on {facts['device']}: "
        f"{report.step_ms:,.2f} ms a step{which}, {report.samples_per_s:,.0f} samples/s{seed}"
    )


def _seconds(spent_s: float) -> str:
    return f"{spent_s:,.1f}" if spent_s >= 1 else f"{spent_s:.3f}"


def _stage_table(report: RunReport) -> list[str]:
    shown = [line for line in report.stages if line.step_ms >= MIN_SHOWN_MS]
    if not shown:
        return []
    names = f"{'thread':11} {'stage':12} {'ms a step':>9} {'on a core':>9} "
    head = f"{names}{'GIL held':>8} {'waits':>6} {'hidden':>6}"
    return [head, *(_stage_row(line) for line in shown)]


def _stage_row(line: StageLine) -> str:
    return (
        f"{line.thread[:11]:11} {line.stage[:12]:12} {line.step_ms:9.3f} {line.core_ratio:9.0%} "
        f"{_percent(line.held_ratio):>8} {_percent(line.waiting_ratio):>6} {_percent(line.hidden_ratio):>6}"
    )


def _percent(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.0%}"


def _span(low: float, high: float) -> str:
    return f"{high:,.2f}" if high - low < 0.01 * high else f"{low:,.2f}–{high:,.2f}"
