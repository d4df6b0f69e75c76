"""Batches from worker processes: the dataset goes there once, batches come back in shared memory."""

from pipeline.workers.dataset_pickle import refuse_in_nursery
from pipeline.workers.process_reader import ProcessReader
from pipeline.workers.processes import Processes

__all__ = ["ProcessReader", "Processes", "refuse_in_nursery"]
