"""MLflow, with a local SQLite store unless another is named."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pipeline.batch import Row
from pipeline.loggers.extra import import_extra
from pipeline.protocols import RunInfo

_MAX_METRICS, _MAX_PARAMS, _MAX_LENGTH = 1000, 100, 6000  # of one request; of one parameter's text


class MlflowLogger:
    """Log rows as metrics of an MLflow run, and what describes the run as its parameters.

    Numbers are gathered and written in one request at each flush. Each takes some 80 µs of Python in
    the SQLite store, so with many at every step, move it to a process:
    ``InProcess(MlflowLogger, experiment="digits")``.

    Args:
        experiment: The experiment's name; made if it is not there.
        tracking_uri: The store; ``mlflow.db`` in the working folder unless told.
        run_name: The run's name; the name of the run folder unless told.

    Raises:
        ConfigError: If MLflow is not installed.
    """

    def __init__(
        self,
        experiment: str = "pipeline",
        *,
        tracking_uri: str | None = None,
        run_name: str | None = None,
    ) -> None:
        def module(name: str) -> Any:
            return import_extra(name, extra="mlflow", needed_by=type(self).__name__)

        self._mlflow, self._entities = module("mlflow"), module("mlflow.entities")
        module("sqlalchemy")  # the store's own error names neither the package nor the extra
        # Absolute: MLflow keeps stores by their URI, also when the working folder has changed.
        self._uri = tracking_uri or f"sqlite:///{Path('mlflow.db').resolve()}"
        self._experiment, self._run_name = experiment, run_name
        self._client: Any = None
        self._run_id = ""
        self._metrics: list[Any] = []
        self._status = "FINISHED"

    def open(self, info: RunInfo) -> None:
        self._client = self._mlflow.MlflowClient(tracking_uri=self._uri)
        found = self._client.get_experiment_by_name(self._experiment)
        experiment_id = found.experiment_id if found else self._client.create_experiment(self._experiment)
        name = self._run_name or (info.run_dir.name if info.run_dir else None)
        self._run_id = self._client.create_run(experiment_id, run_name=name).info.run_id
        make = self._entities.Param
        params = [make(name, str(value)[:_MAX_LENGTH]) for name, value in info.flat_hparams().items()]
        for start in range(0, len(params), _MAX_PARAMS):
            self._client.log_batch(self._run_id, params=params[start : start + _MAX_PARAMS])

    def log(self, row: Row) -> None:
        now_ms, make = int(time.time() * 1000), self._entities.Metric
        self._metrics += [make(name, value, now_ms, row.step) for name, value in row.values.items()]
        if len(self._metrics) >= _MAX_METRICS:
            self.flush()

    def flush(self) -> None:
        metrics, self._metrics = self._metrics, []
        for start in range(0, len(metrics), _MAX_METRICS):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + _MAX_METRICS])

    def mark_failed(self) -> None:
        self._status = "FAILED"

    def close(self) -> None:
        if self._client is None:
            return
        try:
            self.flush()
            self._client.set_terminated(self._run_id, self._status)
        finally:
            self._disconnect()

    def _disconnect(self) -> None:
        """Let go of the database: MLflow keeps its connections until the process ends.

        MLflow has no name for it, so where it looks different inside they stay.
        """
        store = getattr(getattr(self._client, "_tracking_client", None), "store", None)
        dispose = getattr(getattr(store, "engine", None), "dispose", None)
        if dispose is not None:
            dispose()
