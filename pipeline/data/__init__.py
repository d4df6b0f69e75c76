"""From a user's data to host batches: sampler, fetch, collate."""

from pipeline.data.iterable import READS_OURS, IterableReader, IterableSource
from pipeline.data.loader_kinds import is_read_once
from pipeline.data.map_style import MapReader, MapSource
from pipeline.data.reader import END, EVALUATION_EPOCH, Reader, Source
from pipeline.data.several import several_sets_problem
from pipeline.data.shards import ShardedReader, ShardedSource
from pipeline.data.source import as_source, is_shared_out, own_generators

__all__ = [
    "END",
    "EVALUATION_EPOCH",
    "READS_OURS",
    "IterableReader",
    "IterableSource",
    "MapReader",
    "MapSource",
    "Reader",
    "ShardedReader",
    "ShardedSource",
    "Source",
    "as_source",
    "is_read_once",
    "is_shared_out",
    "own_generators",
    "several_sets_problem",
]
