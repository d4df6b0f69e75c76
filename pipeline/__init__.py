"""A training loop for PyTorch that knows about the GIL.

sampler → fetch → collate → pin + H2D  ⇒  step → metrics → deferred read  ⇒  loggers, progress
       (prefetch thread)                       (loop thread)                  (writer thread)
"""

from pipeline.batch import Media, Row
from pipeline.device import SimulatedBackend
from pipeline.errors import (
    CheckpointError,
    ConfigError,
    NonFiniteError,
    PipelineError,
    StageError,
    WorkerDiedError,
)
from pipeline.every import Every
from pipeline.loop.callback import (
    Callback,
    EarlyStopping,
    EpochFinished,
    FitFailed,
    FitFinished,
    FitStarted,
    StepFinished,
    StepRead,
    Validated,
)
from pipeline.loop.prefetch import prefetch
from pipeline.loop.profiler import ProfilerWindow
from pipeline.loop.reads import DeferredReads
from pipeline.protocols import Datasets, Logger
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
    "Logger",
    "Media",
    "NonFiniteError",
    "PipelineError",
    "ProfilerWindow",
    "Row",
    "SimulatedBackend",
    "StageError",
    "StepFinished",
    "StepRead",
    "Trainer",
    "Validated",
    "WorkerDiedError",
    "prefetch",
]
