"""Where rows go: one backend a file."""

from pipeline.loggers.csv import CsvLogger
from pipeline.loggers.group import LoggerGroup, LoggerTime
from pipeline.loggers.jsonl import JsonlLogger
from pipeline.loggers.mlflow import MlflowLogger
from pipeline.loggers.process import InProcess
from pipeline.loggers.progress_bar import ProgressBar
from pipeline.loggers.tensorboard import TensorBoardLogger
from pipeline.loggers.wandb import WandbLogger

__all__ = [
    "CsvLogger",
    "InProcess",
    "JsonlLogger",
    "LoggerGroup",
    "LoggerTime",
    "MlflowLogger",
    "ProgressBar",
    "TensorBoardLogger",
    "WandbLogger",
]
