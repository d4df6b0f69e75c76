"""From a user's data to host batches: sampler, fetch, collate."""

from pipeline.data.randomness import UnhookableDrawError
from pipeline.data.reader import END, EVALUATION_EPOCH, MapReader, MapSource, Reader, Source
from pipeline.data.source import as_source, own_generators

__all__ = [
    "END",
    "EVALUATION_EPOCH",
    "MapReader",
    "MapSource",
    "Reader",
    "Source",
    "UnhookableDrawError",
    "as_source",
    "own_generators",
]
