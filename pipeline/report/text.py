"""The report as a table that a person reads in ten seconds."""

from __future__ import annotations

from pipeline.report.record import RunReport, StageLine

MIN_SHOWN_MS = 0.0005


def to_text(report: RunReport) -> str:
    """Return a report as lines for a terminal."""
    lines = [_headline(report), *_stage_table(report)]
    if report.placement is not None:
        lines.append(f"batches  made in {report.placement}")
    if report.ceiling:
        lines.append(f"ceiling  {report.ceiling}")
    if report.predictions:
        places = (f"{each.where} {_span(each.low_ms, each.high_ms)}" for each in report.predictions)
        lines.append(f"predict  ms a step: {', '.join(places)}")
    if report.gain is None and report.settings.get("measure_gain"):
        lines.append(
            "gain     not measured: the run or its epochs were too short; it begins when the place is settled"
        )
    lines.append(f"verdict  {report.verdict}")
    lines.append(f"next     {report.advice or 'nothing to change'}")
    return "\n".join(lines)


def _headline(report: RunReport) -> str:
    facts = report.facts
    whose = "seed" if facts.get("is_seed_given", True) else "torch's seed"
    seed = f", {whose} {facts['seed']}" if "seed" in facts else ""  # older reports have none
    return (
        f"{facts['num_steps']} steps in {facts['train_s']:.1f} s on {facts['device']}: "
        f"{report.step_ms:.2f} ms a step, {report.samples_per_s:,.0f} samples/s{seed}"
    )


def _stage_table(report: RunReport) -> list[str]:
    shown = [line for line in report.stages if line.step_ms >= MIN_SHOWN_MS]
    if not shown:
        return []
    names = f"{'thread':10} {'stage':12} {'ms a step':>9} {'on a core':>9} "
    head = f"{names}{'GIL held':>8} {'waits':>6} {'hidden':>6}"
    return [head, *(_stage_row(line) for line in shown)]


def _stage_row(line: StageLine) -> str:
    return (
        f"{line.thread[:10]:10} {line.stage[:12]:12} {line.step_ms:9.3f} {line.core_ratio:9.0%} "
        f"{_percent(line.held_ratio):>8} {_percent(line.waiting_ratio):>6} {_percent(line.hidden_ratio):>6}"
    )


def _percent(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.0%}"


def _span(low: float, high: float) -> str:
    return f"{high:.2f}" if high - low < 0.01 * high else f"{low:.2f}–{high:.2f}"
