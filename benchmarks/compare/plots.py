"""The comparison as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.compare.table import Result
from benchmarks.measure import median_interval

COLORS = {"textbook": "#9a9fa6", "sensible": "#c49a22", "headspace": "#1d2126"}


def write_plots(folder: Path, results: Sequence[Result]) -> list[Path]:
    """Draw for each device how many times as fast as the textbook loop each variant is; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for device in dict.fromkeys(result.device for result in results):
        path = folder / f"compare_{device}.png"
        _draw([result for result in results if result.device == device], device).savefig(path)
        paths.append(path)
    return paths


def _draw(results: Sequence[Result], device: str) -> Figure:
    figure = Figure(figsize=(10, 1.2 + 0.62 * len(results)), dpi=110, layout="constrained")
    axes = figure.subplots()
    shown: dict[str, str] = {}
    for row, result in enumerate(results):
        for name in result.step_ms:
            middle, low, high = median_interval(
                [a / b for a, b in zip(result.step_ms["textbook"], result.step_ms[name], strict=True)]
            )
            is_ours = name.startswith("ours ")
            color = COLORS.get(name, "#3d6fb4" if is_ours else "#db6a3f")
            mark = {"headspace": "|", "textbook": "|"}.get(name, "o" if is_ours else "x")
            group = {"textbook": "textbook", "sensible": "sensible", "headspace": "headspace"}.get(
                name, "ours, each placement" if is_ours else "peers"
            )
            axes.plot([low, high], [row, row], color=color, linewidth=1, alpha=0.6)
            axes.plot(middle, row, mark, color=color, markersize=14 if mark == "|" else 7,
                      label=None if group in shown else group)  # fmt: skip
            shown[group] = color
    axes.set_yticks(range(len(results)), [result.workload for result in results])
    axes.invert_yaxis()
    axes.set_xscale("log")
    ticks = [0.5, 0.75, 1, 1.5, 2, 3, 4, 8, 16]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(f"times as fast as the textbook loop, on {device}; lines are intervals over the rounds")
    axes.grid(axis="x", color="#e3e4df")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=5, frameon=False)
    return figure
