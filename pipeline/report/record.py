"""`RunReport`: everything that the terminal, the page and a comparison show, and its JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.report.ceilings import Ceiling, Prediction, StepCost
from pipeline.report.placement_report import PlacementReport

VERSION = 1


@dataclass(frozen=True)
class StageLine:
    """One stage of one thread.

    Args:
        thread: ``loop``, ``prefetch``, ``writer``, …
        stage: Its name.
        step_ms: Milliseconds a step.
        core_ratio: Share of it on a core, the GIL held or not.
        held_ratio: Share of it with the GIL; None where nobody measured it.
        waiting_ratio: Share of it waiting for the GIL; None where nobody measured it.
        hidden_ratio: Share of it that did not make the loop wait; None where the loop did it itself.
    """

    thread: str
    stage: str
    step_ms: float
    core_ratio: float
    held_ratio: float | None = None
    waiting_ratio: float | None = None
    hidden_ratio: float | None = None


@dataclass(frozen=True)
class Gain:
    """What `overlap` won over `textbook`, measured in the run itself.

    Args:
        ratio: Time of a textbook step over that of a step as it is trained; above 1 is a win.
        low: Lower end of the 95 % interval.
        high: Upper end of it.
        textbook_ms: A step in the textbook windows.
        overlap_ms: A step in the others.
        headspace_ms: A step with its batch already there: no loader does better.
        num_windows: Windows of each kind.
        steps_per_window: Steps in each that were counted.
    """

    ratio: float
    low: float
    high: float
    textbook_ms: float
    overlap_ms: float
    headspace_ms: float
    num_windows: int
    steps_per_window: int

    @property
    def won_ratio(self) -> float | None:
        """The share of the possible gain that was won; None where there is less than 2 % to win."""
        possible_ms = self.textbook_ms - self.headspace_ms
        if possible_ms < 0.02 * self.textbook_ms:
            return None
        return (self.textbook_ms - self.overlap_ms) / possible_ms


@dataclass(frozen=True)
class Lane:
    """What one thread, or the device, did over time.

    Args:
        name: Whose it is.
        kind: ``stages``, or ``states`` where the sampler saw who held the GIL.
        segments: Each ``(what, begin, end)``, in milliseconds from the beginning of the window.
    """

    name: str
    kind: str
    segments: tuple[tuple[str, float, float], ...]


@dataclass(frozen=True)
class Series:
    """The run over time, in at most some hundred points.

    Args:
        at_s: Seconds of training at the end of each point.
        step: The optimizer step at the end of each point.
        step_ms: Mean milliseconds a step.
        data_wait_ms: Mean of them that the loop waited for a batch.
    """

    at_s: tuple[float, ...] = ()
    step: tuple[int, ...] = ()
    step_ms: tuple[float, ...] = ()
    data_wait_ms: tuple[float, ...] = ()


@dataclass(frozen=True)
class RunReport:
    """What a run says of itself when it has ended; ``print(result.report)`` shows it.

    Args:
        facts: What ran where: schedule, device, versions, cores, and the like.
        settings: Of the Trainer; and what else describes the run, such as ``optim.lr``.
        metrics: The last value of each.
        step_ms: Mean time of a step.
        data_wait_ms: How much of it the loop waited for batches.
        samples_per_s: Training samples per second.
        stages: Each thread's stages.
        cost: What a step costs; None for a run too short to say.
        ceilings: The bounds of the run as it was, the binding one first.
        predictions: What a step would take in each placement.
        gain: What overlap won, where it was measured.
        verdict: In words.
        ceiling: The binding one in words, and what would lift it for this data.
        advice: The one setting to change next; empty for none.
        series: The run over time.
        lanes: Who did what when, for a short stretch.
        placement: Where batches were made, and why.
        notes: What logging cost, what to hold against the figures, how to learn more.
    """

    facts: dict[str, Any]
    settings: dict[str, Any]
    metrics: dict[str, float]
    step_ms: float
    data_wait_ms: float
    samples_per_s: float
    stages: tuple[StageLine, ...] = ()
    cost: StepCost | None = None
    ceilings: tuple[Ceiling, ...] = ()
    predictions: tuple[Prediction, ...] = ()
    gain: Gain | None = None
    verdict: str = ""
    ceiling: str = ""
    advice: str = ""
    series: Series = field(default_factory=Series)
    lanes: tuple[Lane, ...] = ()
    placement: PlacementReport | None = None
    notes: tuple[str, ...] = ()
    version: int = VERSION

    def __str__(self) -> str:
        from pipeline.report.text import to_text  # it renders this class

        return to_text(self)


def to_dict(report: RunReport) -> dict[str, Any]:
    """Return a report as plain values; numbers that are none (NaN) are None."""
    found = _plain(dataclasses.asdict(report))
    if report.gain is not None:
        found["gain"]["won_ratio"] = report.gain.won_ratio
    return dict(found)


def to_json(report: RunReport) -> str:
    """Return a report as JSON text."""
    return json.dumps(to_dict(report), allow_nan=False)


def load(path: str | Path) -> RunReport:
    """Read the report of a run.

    Args:
        path: A run folder, or its ``report.json``.

    Raises:
        ConfigError: If there is none, or none that this version reads.
    """
    file = Path(path) / "report.json" if Path(path).is_dir() else Path(path)
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} must be the folder of a run that has ended, but {file.name} cannot be read ({error}). "
            "Give a folder below runs/, or one of your run_dir=."
        ) from error
    if not isinstance(found, dict) or found.get("version") != VERSION:
        version = found.get("version") if isinstance(found, dict) else None
        raise ConfigError(f"{file} must be a report of version {VERSION}, got {version}. Run it again.")
    return _from_dict(found)


def _from_dict(found: dict[str, Any]) -> RunReport:
    gain, cost = found["gain"], found["cost"]
    if gain is not None:
        gain = Gain(**{name: value for name, value in gain.items() if name != "won_ratio"})
    return RunReport(
        **{
            **found,
            "stages": tuple(StageLine(**each) for each in found["stages"]),
            "cost": None if cost is None else StepCost(**cost),
            "ceilings": _ceilings(found["ceilings"]),
            "predictions": tuple(
                Prediction(**{**each, "ceilings": _ceilings(each["ceilings"])})
                for each in found["predictions"]
            ),
            "gain": gain,
            "series": Series(**{name: tuple(values) for name, values in found["series"].items()}),
            "lanes": tuple(
                Lane(each["name"], each["kind"], tuple((w, b, e) for w, b, e in each["segments"]))
                for each in found["lanes"]
            ),
            "placement": None if found["placement"] is None else PlacementReport(**found["placement"]),
            "notes": tuple(found["notes"]),
        }
    )


def _ceilings(found: list[dict[str, Any]]) -> tuple[Ceiling, ...]:
    return tuple(Ceiling(**each) for each in found)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value if isinstance(value, (int, str, bool, type(None))) else str(value)
