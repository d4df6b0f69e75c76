"""One JSON object a line: `metrics.jsonl`."""

from __future__ import annotations

import json
import os
from math import isfinite
from pathlib import Path

from pipeline.batch import Row

_BURST = 64


class JsonlLogger:
    """Append rows to a file as ``{"step": 12, "epoch": 0, "train/loss": 0.53, …}``.

    A number that JSON cannot hold (NaN, infinity) is written as null.

    Args:
        path: The file; its folder must exist.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1 << 16)
        self._templates: dict[tuple[str, ...], str] = {}  # of the names in a row: there are few
        self._rows: list[Row] = []

    def log(self, row: Row) -> None:
        # Lines are made in bursts: between two steps each would find nothing of this in the caches.
        self._rows.append(row)
        if len(self._rows) == _BURST:
            self._write()

    def sync(self) -> int:
        """Have the disk hold every row so far; return how many bytes they are."""
        self.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def flush(self) -> None:
        self._write()
        self._file.flush()

    def close(self) -> None:
        try:
            self._write()
        finally:
            self._file.close()

    def _write(self) -> None:
        rows, self._rows = self._rows, []
        self._file.write("".join(map(self._line, rows)))

    def _line(self, row: Row) -> str:
        # By hand it takes a quarter of what `json.dumps` takes.
        names = tuple(row.values)
        if (template := self._templates.get(names)) is None:
            keys = [json.dumps(name).replace("%", "%%") for name in names]
            fields = "".join(f", {key}: %s" for key in keys)
            template = self._templates[names] = f'{{"step": %d, "epoch": %d{fields}}}\n'
        values = [repr(float(each)) if isfinite(each) else "null" for each in row.values.values()]
        return template % (row.step, row.epoch, *values)
