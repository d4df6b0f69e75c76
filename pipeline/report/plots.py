"""The charts of a comparison as PNG files, by matplotlib.

pip install 'beltloop[report]'
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_utilities.core.imports import RequirementCache

from pipeline.errors import ConfigError
from pipeline.report.record import RunReport

INK, WAIT, STEP, SOFT = "#1d2126", "#db6a3f", "#3d6fb4", "#9a9fa6"
HAS_MATPLOTLIB = RequirementCache("matplotlib")
STAGE_COLORS = {
    "data_wait": WAIT,
    "forward": STEP,
    "backward": "#274b82",
    "optimizer": "#8467b0",
    "log": SOFT,
}


def write_plots(folder: Path, runs: Sequence[tuple[str, RunReport]]) -> list[Path]:
    """Write ``steps.png``, ``ceilings.png`` and ``over_time.png``; return where they are.

    Raises:
        ConfigError: If matplotlib is not there.
    """
    if not HAS_MATPLOTLIB:
        raise ConfigError("plots need matplotlib: pip install 'beltloop[report]'.")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {"steps": _steps, "ceilings": _ceilings, "over_time": _over_time}
    return [_draw(folder / f"{name}.png", draw, runs) for name, draw in drawn.items()]


def _draw(path: Path, draw: Any, runs: Sequence[tuple[str, RunReport]]) -> Path:
    from matplotlib.figure import Figure  # without pyplot: no window, no state of the process

    figure = Figure(figsize=(9, 1.6 + 0.5 * max(len(runs), 4)), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes, runs)
    figure.savefig(path)
    return path


def _steps(axes: Any, runs: Sequence[tuple[str, RunReport]]) -> None:
    """Draw the loop thread's stages of each run, one after the other."""
    for row, (_, report) in enumerate(runs):
        at_ms = 0.0
        for line in report.stages:
            if line.thread != "loop":
                continue
            color = STAGE_COLORS.get(line.stage, INK)
            axes.barh(row, line.step_ms, left=at_ms, color=color, label=line.stage if row == 0 else None)
            at_ms += line.step_ms
    _name_rows(axes, runs)
    axes.set_xlabel("loop thread, ms a step")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=5, frameon=False)


def _ceilings(axes: Any, runs: Sequence[tuple[str, RunReport]]) -> None:
    """Draw each run's bounds as marks, and its step as a bar."""
    marks = {
        "device": "D",
        "loop": "o",
        "gil": "s",
        "host": "^",
        "belt": "v",
        "serial": "P",
    }
    for row, (_, report) in enumerate(runs):
        axes.barh(row, report.step_ms, color="#dfe1dc", label="measured" if row == 0 else None)
        for each in report.ceilings:
            axes.plot(each.step_ms, row, marks[each.name], color=INK, markersize=7)
    for name, mark in marks.items():
        axes.plot([], [], mark, color=INK, label=name)
    _name_rows(axes, runs)
    axes.set_xlabel("ms a step; no step is shorter than its rightmost mark")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=7, frameon=False)


def _over_time(axes: Any, runs: Sequence[tuple[str, RunReport]]) -> None:
    """Draw each run's throughput."""
    for name, report in runs:
        rates = [1e3 / each if each else 0.0 for each in report.series.step_ms]
        axes.step(report.series.at_s, rates, where="pre", linewidth=1.2, label=name)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("steps a second")
    axes.legend(frameon=False)


def _name_rows(axes: Any, runs: Sequence[tuple[str, RunReport]]) -> None:
    axes.set_yticks(range(len(runs)), [name for name, _ in runs])
    axes.invert_yaxis()
