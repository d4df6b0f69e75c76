"""The page: one self-contained file, with its data, its style and its script inside; nothing is loaded."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PARTS = Path(__file__).parent
_SCRIPTS = ("page.js", "page_time.js", "page_run.js")


def to_html(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Return the page of one run or of several.

    Args:
        runs: Each run's name and its report as plain values, see `pipeline.report.record.to_dict`.
    """
    data = json.dumps(
        [{"name": name, "report": _for_browsers(report)} for name, report in runs], allow_nan=False
    )
    title = runs[0][0] if len(runs) == 1 else f"{len(runs)} runs"
    return (
        _part("page.html")
        .replace("{title}", html.escape(title))
        .replace("{style}", _part("page.css"))
        .replace("{script}", "\n".join(map(_part, _SCRIPTS)))
        .replace("{runs}", data.replace("</", "<\\/"))  # last: nothing in it is taken for a part
    )


def _for_browsers(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report whose settings a browser can show: its numbers have 53 bits, and a seed may have 64."""
    settings = {
        name: str(value) if isinstance(value, int) and abs(value) >> 53 else value
        for name, value in report["settings"].items()
    }
    return {**report, "settings": settings}


def _part(name: str) -> str:
    return (_PARTS / name).read_text(encoding="utf-8")
