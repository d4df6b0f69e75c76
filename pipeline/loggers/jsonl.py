"""One JSON object a line: `metrics.jsonl`."""

from __future__ import annotations

import json
import math
from pathlib import Path

from pipeline.batch import Row


class JsonlLogger:
    """Append rows to a file as ``{"step": 12, "epoch": 0, "train/loss": 0.53, …}``.

    A number that JSON cannot hold (NaN, infinity) is written as null.

    Args:
        path: The file; its folder must exist.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1 << 16)
        self._encode = json.JSONEncoder(allow_nan=False).encode

    def log(self, row: Row) -> None:
        line = {"step": row.step, "epoch": row.epoch, **row.values}
        try:
            text = self._encode(line)
        except ValueError:
            text = self._encode({name: _or_null(value) for name, value in line.items()})
        self._file.write(text + "\n")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None
