"""Where rows go: one backend a file."""

from pipeline.loggers.group import LoggerGroup, LoggerTime
from pipeline.loggers.jsonl import JsonlLogger
from pipeline.loggers.progress import ProgressBar

__all__ = ["JsonlLogger", "LoggerGroup", "LoggerTime", "ProgressBar"]
