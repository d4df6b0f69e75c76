"""From the times of each round to medians with intervals, ratios and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.measure import median_interval

PEERS = ("SPDL", "SPDL process", "nodes", "Lightning", "Accelerate")


@dataclass(frozen=True)
class Result:
    """One workload on one device.

    Args:
        workload: Its name.
        about: What it stands for.
        device: ``cpu`` or ``simulated``.
        step_ms: Each variant's milliseconds a step, one for each round.
        first_ms: Each variant's milliseconds to the first step.
        settings: What tuning chose for each family.
        predicted_ms: What this project predicted for each placement.
        others_ratio: The share of the cores that other programs took meanwhile.
    """

    workload: str
    about: str
    device: str
    step_ms: dict[str, list[float]]
    first_ms: dict[str, list[float]]
    settings: dict[str, str]
    predicted_ms: dict[str, float]
    others_ratio: float = math.nan

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    @property
    def best_peer(self) -> str | None:
        """The peer with the shortest median step, if any was run."""
        there = [name for name in PEERS if name in self.step_ms]
        return min(there, key=lambda name: median_interval(self.step_ms[name])[0], default=None)

    def ratio(self, base: str, variant: str) -> tuple[float, float, float]:
        """Return how many times as fast a variant is, round by round: median and interval."""
        pairs = zip(self.step_ms[base], self.step_ms[variant], strict=True)
        return median_interval([of_base / of_variant for of_base, of_variant in pairs])


def describe(result: Result) -> str:
    """Return the lines of one workload: every variant's time, and this project against each baseline."""
    lines = [f"{result.workload} on {result.device}: {result.about}"]
    if not math.isnan(result.others_ratio):
        lines.append(f"  (other programs took {result.others_ratio:.0%} of the cores meanwhile)")
    for name, values in result.step_ms.items():
        middle, low, high = median_interval(values)
        setting = f" ({result.settings[name]})" if name in result.settings else ""
        first = median_interval(result.first_ms[name])[0]
        predicted = result.predicted_ms.get(name.removeprefix("ours ")) if name.startswith("ours ") else None
        guess = "" if predicted is None else f"  predicted {predicted:7.2f} ({predicted / middle - 1:+.0%})"
        shown = f"{name}{setting}"
        lines.append(
            f"  {shown:26} {middle:7.2f} ms a step [{low:.2f}, {high:.2f}]  first {first:6.0f} ms{guess}"
        )
    return "\n".join(
        [*lines, *(verdict(result, name) for name in result.step_ms if name.startswith("ours "))]
    )


def verdict(result: Result, variant: str) -> str:
    """Return one line: a variant's ratio to the textbook loop, the sensible one, the best peer, the bound."""
    bases: dict[str, str | None] = {
        "textbook": "textbook",
        "sensible": "sensible",
        f"best peer ({result.best_peer})": result.best_peer,
        "headspace": "headspace",
    }
    parts = []
    for name, base in bases.items():
        if base is not None and base in result.step_ms:
            middle, low, high = result.ratio(base, variant)
            parts.append(f"{middle:.2f} [{low:.2f}, {high:.2f}] × {name}")
    return f"  → {variant:14} {', '.join(parts)}"


def summary(results: Sequence[Result]) -> str:
    """Return a table in Markdown, a line for each workload.

    Behind each time of this project are its ratios to the textbook loop, the sensible one and the best peer.
    """
    names = list(
        dict.fromkeys(name for result in results for name in result.step_ms if name.startswith("ours "))
    )
    head = ["workload", "device", "textbook", "sensible", "best peer", "headspace", *names]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for result in results:
        peer = result.best_peer
        cells = [result.workload, result.device, *(_ms(result, name) for name in ("textbook", "sensible"))]
        cells += ["–" if peer is None else f"{_ms(result, peer)} {peer}", _ms(result, "headspace")]
        cells += [_ratios(result, name) for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ms(result: Result, name: str) -> str:
    if name not in result.step_ms:
        return "–"
    setting = f" ({result.settings[name]})" if name in result.settings else ""
    return f"{median_interval(result.step_ms[name])[0]:.2f} ms{setting}"


def _ratios(result: Result, name: str) -> str:
    """Return a variant's time, and its ratios to the textbook loop, the sensible one and the best peer."""
    if name not in result.step_ms:
        return "–"
    bases = [base for base in ("textbook", "sensible", result.best_peer) if base in result.step_ms and base]
    ratios = ", ".join(f"{result.ratio(base, name)[0]:.2f}" for base in bases)
    return f"{median_interval(result.step_ms[name])[0]:.2f} ms: {ratios}"


def read(found: Mapping[str, Any]) -> Result:
    """Return a result from plain values."""
    return Result(**found)
