"""From a user's data to host batches: sampler, fetch, collate."""

from pipeline.data.generator_mode import UnhookableDrawError
from pipeline.data.iterable import IterableSource
from pipeline.data.main_module import refuse_in_nursery
from pipeline.data.process_reader import ProcessReader
from pipeline.data.processes import Processes
from pipeline.data.ranks import ranks
from pipeline.data.reader import END, EVALUATION_EPOCH, MapReader, MapSource, Reader, Source
from pipeline.data.shards import ShardedReader, ShardedSource
from pipeline.data.source import as_source, is_shared_out, own_generators

__all__ = [
    "END",
    "EVALUATION_EPOCH",
    "IterableSource",
    "MapReader",
    "MapSource",
    "ProcessReader",
    "Processes",
    "Reader",
    "ShardedReader",
    "ShardedSource",
    "Source",
    "UnhookableDrawError",
    "as_source",
    "is_shared_out",
    "own_generators",
    "ranks",
    "refuse_in_nursery",
]
