"""TensorBoard: one event a step, whatever it holds, and no thread of its own.

`SummaryWriter.add_scalar` makes an event, a queue entry and two checksums of each number; five of them
took 360 µs of Python on a machine where one event with five values takes 35.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from pipeline.batch import Media, Row
from pipeline.loggers.extra import import_extra
from pipeline.protocols import RunInfo

_FILE_VERSION = "brain.Event:2"


class TensorBoardLogger:
    """Write an event file: scalars, images, histograms, texts, the run's settings and its hparams.

    The settings are there as a text, ``config``, and in the hparams tab with the last value of each
    metric of an epoch or a validation.

    Args:
        folder: Where the event file goes; ``tensorboard`` in the run folder unless told.

    Raises:
        ConfigError: If TensorBoard is not installed.

    Source:
        The record format of TensorFlow: length, checksum, data, checksum.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        def module(name: str) -> Any:
            return import_extra(name, extra="tensorboard", needed_by=type(self).__name__)

        self._folder = None if folder is None else Path(folder)
        self._event: Any = module("tensorboard.compat.proto.event_pb2").Event
        self._summary: Any = module("tensorboard.compat.proto.summary_pb2").Summary
        self._record_writer: Any = module("tensorboard.summary.writer.record_writer").RecordWriter
        self._make: Any = module("torch.utils.tensorboard.summary")
        self._records: Any = None
        self._hparams: dict[str, Any] = {}
        self._last: dict[str, float] = {}

    def open(self, info: RunInfo) -> None:
        folder = self._folder or (info.run_dir or Path()) / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns():020d}.{socket.gethostname()}.{os.getpid()}"
        self._records = self._record_writer((folder / name).open("xb"))
        self._write(file_version=_FILE_VERSION)
        if info.hparams:
            self._hparams = info.flat_hparams()
            listing = json.dumps(info.hparams, indent=2, default=str)
            code = "\n".join(f"    {line}" for line in listing.splitlines())  # Markdown's code
            self._write(summary=self._make.text("config", code))

    def log(self, row: Row) -> None:
        value = self._summary.Value
        values = [value(tag=name, simple_value=number) for name, number in row.values.items()]
        self._write(step=row.step, summary=self._summary(value=values))
        if "train/loss" not in row.values:
            self._last |= row.values

    def log_media(self, media: Media) -> None:
        make = {"image": self._image, "histogram": self._histogram, "text": self._make.text}[media.kind]
        self._write(step=media.step, summary=make(media.name, media.data))

    def flush(self) -> None:
        if self._records is not None:
            self._records.flush()

    def close(self) -> None:
        if self._records is None:
            return
        try:
            if self._hparams and self._last:
                for summary in self._make.hparams(self._hparams, self._last):
                    self._write(summary=summary)
        finally:
            self._records.close()

    def _image(self, name: str, image: Any) -> Any:
        return self._make.image(name, image, dataformats="CHW")

    def _histogram(self, name: str, values: Any) -> Any:
        return self._make.histogram(name, values.float(), bins="auto")

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
