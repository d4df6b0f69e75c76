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
        self._keys: dict[str, str] = {}  # a name to how it stands in a line: there are few
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
        # By hand it takes a third of what `json.dumps` takes.
        keys, parts = self._keys, [f'{{"step": {row.step}, "epoch": {row.epoch}']
        for name, value in row.values.items():
            key = keys.get(name) or keys.setdefault(name, f", {json.dumps(name)}: ")
            parts.append(key)
            parts.append(repr(float(value)) if isfinite(value) else "null")
        parts.append("}\n")
        return "".join(parts)
