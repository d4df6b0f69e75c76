"""Where rows go: one backend a file."""

from pipeline.loggers.jsonl import JsonlLogger
from pipeline.loggers.progress import ProgressBar

__all__ = ["JsonlLogger", "ProgressBar"]
