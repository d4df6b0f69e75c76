"""One table: `metrics.csv`, a column for each name."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import IO

from pipeline.batch import Row
from pipeline.protocols import RunInfo


class CsvLogger:
    """Write rows as a table with a header; a cell is empty where a row has no such number.

    A name that was not there before becomes a column at the right. The file is then written anew once,
    which takes as long as copying it: names come with the first step, epoch and validation, and hardly
    later.

    Args:
        path: The file; ``metrics.csv`` in the run folder unless told. It must not hold a run already,
            but for one that is resumed, whose rows of later steps are cut.

    Raises:
        FileExistsError: At the first row, if the file is there already.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self._path = None if path is None else Path(path)
        self._file: IO[str] | None = None
        self._names: dict[str, None] = {}  # a set that keeps its order

    def open(self, info: RunInfo) -> None:
        self._path = self._path or (info.run_dir or Path()) / "metrics.csv"
        if info.resumed_step is not None and self._path.exists():
            self._take_up(self._path, info.resumed_step)
        else:
            self._file = self._path.open("x", encoding="utf-8", newline="")

    def log(self, row: Row) -> None:
        assert self._file is not None
        if not row.values.keys() <= self._names.keys():
            self._widen(row)
        values = row.values
        cells = [repr(float(values[name])) if name in values else "" for name in self._names]
        self._file.write(f"{row.step},{row.epoch},{','.join(cells)}\n")  # numbers need no quotes

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _take_up(self, path: Path, step: int) -> None:
        """Go on with the file of the run that is resumed, without the rows that come again."""
        kept = path.with_name(f".{path.name}.kept")
        with path.open(encoding="utf-8", newline="") as before:
            rows = list(csv.reader(before))
        self._file = kept.open("w", encoding="utf-8", newline="")
        if rows:
            self._names = dict.fromkeys(rows[0][2:])
            earlier = [row for row in rows[1:] if len(row) == len(rows[0]) and int(row[0]) <= step]
            csv.writer(self._file, lineterminator="\n").writerows([rows[0], *earlier])
        self._file.flush()
        os.replace(kept, path)

    def _widen(self, row: Row) -> None:
        """Put a new header before the lines so far, and empty cells behind them."""
        assert self._path is not None
        assert self._file is not None
        self._file.close()
        num_before = len(self._names)
        self._names |= dict.fromkeys(row.values)
        padding = "," * (len(self._names) - num_before)
        wider = self._path.with_name(f".{self._path.name}.wider")
        self._file = wider.open("x", encoding="utf-8", newline="")
        csv.writer(self._file, lineterminator="\n").writerow(["step", "epoch", *self._names])
        with self._path.open(encoding="utf-8", newline="") as narrow:
            if num_before:
                csv.DictReader(narrow).fieldnames  # noqa: B018  (read the header, which may have line breaks)
            self._file.writelines(f"{line[:-1]}{padding}\n" for line in narrow)
        self._file.flush()
        os.replace(wider, self._path)  # the handle goes on in the file under its new name
