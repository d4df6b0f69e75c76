"""A training loop for PyTorch that knows about the GIL.

sampler → fetch → collate → pin + H2D  ⇒  step → metrics → deferred read  ⇒  loggers, progress
       (prefetch thread)                       (loop thread)                  (writer thread)
"""

from pipeline.device import SimulatedBackend
from pipeline.errors import (
    CheckpointError,
    ConfigError,
    NonFiniteError,
    PipelineError,
    StageError,
)
from pipeline.loop.callback import Callback, EarlyStopping
from pipeline.loop.prefetch import prefetch
from pipeline.loop.reads import DeferredReads
from pipeline.protocols import Datasets, Logger
from pipeline.result import FitResult
from pipeline.trainer import Trainer

__all__ = [
    "Callback",
    "CheckpointError",
    "ConfigError",
    "Datasets",
    "DeferredReads",
    "EarlyStopping",
    "FitResult",
    "Logger",
    "NonFiniteError",
    "PipelineError",
    "SimulatedBackend",
    "StageError",
    "Trainer",
    "prefetch",
]
