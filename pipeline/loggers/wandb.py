"""Weights & Biases, without a network unless it is asked for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pipeline.batch import Media, Row
from pipeline.loggers.extra import import_extra
from pipeline.protocols import RunInfo

_ERROR_REPORTS = "WANDB_ERROR_REPORTING"


class WandbLogger:
    """Log rows, images, histograms and texts to a run of Weights & Biases.

    In ``offline`` mode everything is written under ``wandb/`` in the run folder; ``wandb sync`` with
    that folder sends it later. Its reports of its own errors are off then, unless the environment
    turns them on: they need a network, and two threads that never end. `wandb` has threads and a
    service process of its own, which end when the run is closed.

    Args:
        project: The project's name.
        mode: ``offline``, or ``online``, which needs an account and a network.
        folder: What holds the folder ``wandb``; the run folder unless told.
        init: Further arguments of `wandb.init`, such as ``name``, ``tags`` or ``entity``.

    Raises:
        ConfigError: If `wandb` is not installed.
    """

    def __init__(
        self,
        project: str | None = None,
        *,
        mode: Literal["offline", "online"] = "offline",
        folder: str | Path | None = None,
        **init: Any,
    ) -> None:
        self._wandb = import_extra("wandb", extra="wandb", needed_by=type(self).__name__)
        self._init = {"project": project, "mode": mode, **init}
        self._run: Any = None
        self._folder, self._exit_code = folder, 0

    def open(self, info: RunInfo) -> None:
        # console="off": otherwise it takes standard output and error for the length of the run.
        defaults = {"settings": self._wandb.Settings(console="off", silent=True), "config": info.hparams}
        folder = str(self._folder or info.run_dir or Path())
        with _without_error_reports(self._init["mode"] == "offline"):
            self._run = self._wandb.init(dir=folder, **{**defaults, **self._init})

    def log(self, row: Row) -> None:
        self._run.log({**row.values, "epoch": row.epoch}, step=row.step)

    def log_media(self, media: Media) -> None:
        self._run.log({media.name: self._converted(media)}, step=media.step)

    def flush(self) -> None: ...

    def mark_failed(self) -> None:
        self._exit_code = 1

    def close(self) -> None:
        if self._run is not None:
            self._run.finish(exit_code=self._exit_code)
            self._wandb.teardown()  # or its service would stay until this process ends

    def _converted(self, media: Media) -> Any:
        if isinstance(media.data, str):
            return self._wandb.Html(media.data, inject=False)
        if media.kind == "image":
            return self._wandb.Image(media.data)
        return self._wandb.Histogram(media.data.float().numpy())


@contextlib.contextmanager
def _without_error_reports(is_offline: bool) -> Iterator[None]:
    """Turn off what would call home, for as long as `wandb` looks at the environment."""
    if not is_offline or _ERROR_REPORTS in os.environ:
        yield
        return
    os.environ[_ERROR_REPORTS] = "false"
    try:
        yield
    finally:
        del os.environ[_ERROR_REPORTS]
