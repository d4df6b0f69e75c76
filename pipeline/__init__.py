"""A training loop for PyTorch that knows about the GIL.

sampler → fetch → collate → pin + H2D  ⇒  step → metrics → deferred read  ⇒  loggers, progress
       (prefetch thread)                       (loop thread)                  (writer thread)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.batch import Media, Row
    from pipeline.callbacks.early_stopping import EarlyStopping
    from pipeline.callbacks.events import (
        Callback,
        EpochFinished,
        FitFailed,
        FitFinished,
        FitStarted,
        StepFinished,
        StepRead,
        Validated,
    )
    from pipeline.callbacks.profiler import ProfilerWindow
    from pipeline.device import SimulatedBackend
    from pipeline.errors import (
        CheckpointError,
        ConfigError,
        GilAccountError,
        NonFiniteError,
        PipelineError,
        StageError,
        StallError,
        WorkerDiedError,
    )
    from pipeline.every import Every
    from pipeline.gil import GilReport, gil_account, stage
    from pipeline.inbound.loader import Loader
    from pipeline.inbound.prefetch import prefetch
    from pipeline.outbound.reads import DeferredReads
    from pipeline.protocols import Datasets, Logger
    from pipeline.report.placement_report import PlacementReport
    from pipeline.result import FitResult
    from pipeline.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "Callback",
    "CheckpointError",
    "ConfigError",
    "Datasets",
    "DeferredReads",
    "EarlyStopping",
    "EpochFinished",
    "Every",
    "FitFailed",
    "FitFinished",
    "FitResult",
    "FitStarted",
    "GilAccountError",
    "GilReport",
    "Loader",
    "Logger",
    "Media",
    "NonFiniteError",
    "PipelineError",
    "PlacementReport",
    "ProfilerWindow",
    "Row",
    "SimulatedBackend",
    "StageError",
    "StallError",
    "StepFinished",
    "StepRead",
    "Trainer",
    "Validated",
    "WorkerDiedError",
    "gil_account",
    "prefetch",
    "stage",
]

# Where each name lives. It is imported when it is asked for: `pipeline.gil` runs scripts that have
# not imported torch yet, and its sampler's process never does.
_HOMES = {
    "batch": ["Media", "Row"],
    "device": ["SimulatedBackend"],
    "errors": [
        "CheckpointError",
        "ConfigError",
        "GilAccountError",
        "NonFiniteError",
        "PipelineError",
        "StageError",
        "StallError",
        "WorkerDiedError",
    ],
    "every": ["Every"],
    "gil": ["GilReport", "gil_account", "stage"],
    "callbacks.early_stopping": ["EarlyStopping"],
    "callbacks.events": [
        "Callback",
        "EpochFinished",
        "FitFailed",
        "FitFinished",
        "FitStarted",
        "StepFinished",
        "StepRead",
        "Validated",
    ],
    "inbound.loader": ["Loader"],
    "inbound.prefetch": ["prefetch"],
    "report.placement_report": ["PlacementReport"],
    "callbacks.profiler": ["ProfilerWindow"],
    "outbound.reads": ["DeferredReads"],
    "protocols": ["Datasets", "Logger"],
    "result": ["FitResult"],
    "trainer": ["Trainer"],
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(f"pipeline.{home}"), name)
            globals()[name] = value
            return value
    try:
        return import_module(f"pipeline.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"pipeline.{name}":
            raise
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return [*globals(), *__all__]
