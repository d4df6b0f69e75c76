"""Several runs side by side: found in their folders, as a table, as PNG plots, as one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.report.page.render import to_html
from pipeline.report.record import RunReport, load, to_dict

SHOWN_METRICS = ("train/epoch_loss", "val/loss", "val/accuracy")


def find_runs(paths: Sequence[str | Path]) -> list[tuple[str, RunReport]]:
    """Return the runs below these folders, each with a name that tells it from the others.

    Args:
        paths: Run folders, ``report.json`` files, or folders that hold run folders, such as a sweep's.

    Raises:
        ConfigError: If there is none in one of them, or one that cannot be read.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        below = [path] if path.is_file() else sorted(path.rglob("report.json"))
        if not below:
            raise ConfigError(
                f"{path} holds no report.json: give the folder of a run that has ended, or a folder of such."
            )
        files += below
    folders = [file.resolve().parent for file in dict.fromkeys(files)]
    return [(_name(folder, folders), load(folder)) for folder in folders]


def _name(folder: Path, others: Sequence[Path]) -> str:
    """Return the shortest end of a path that no other one has."""
    for length in range(1, len(folder.parts)):
        end = folder.parts[-length:]
        if sum(other.parts[-length:] == end for other in others) == 1:
            return "/".join(end)
    return str(folder)


def to_table(runs: Sequence[tuple[str, RunReport]]) -> str:
    """Return a line for each run, with the settings in which they differ."""
    names = differing_settings([report for _, report in runs])
    metrics = [name for name in SHOWN_METRICS if any(name in report.metrics for _, report in runs)]
    rows = [["run", "where", *names, "ms a step", "samples/s", "waiting", "ceiling", "gain", *metrics]]
    for name, report in runs:
        share = report.data_wait_ms / report.step_ms if report.step_ms else 0.0
        gain = report.gain
        rows.append(
            [
                name,
                str(report.facts["placement"]),
                *(str(report.settings.get(each, "–")) for each in names),
                f"{report.step_ms:.2f}",
                f"{report.samples_per_s:,.0f}",
                f"{share:.0%}",
                report.ceilings[0].name if report.ceilings else "–",
                "–" if gain is None else f"{gain.ratio:.2f} [{gain.low:.2f}, {gain.high:.2f}]",
                *(_number(report.metrics.get(each)) for each in metrics),
            ]
        )
    num_texts = 2 + len(names)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column < num_texts else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def differing_settings(reports: Sequence[RunReport]) -> list[str]:
    """Return the settings that are not the same in all runs, the run folder left out."""
    names = dict.fromkeys(name for report in reports for name in report.settings if name != "run_dir")
    return [name for name in names if len({repr(report.settings.get(name)) for report in reports}) > 1]


def write_page(path: Path, runs: Sequence[tuple[str, RunReport]]) -> None:
    """Write one page for all of them."""
    path.write_text(to_html([(name, to_dict(report)) for name, report in runs]), encoding="utf-8")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
