"""The records that travel along the flow, and how a user's batch is reached into, moved, copied, counted."""

from pipeline.batch.count import num_samples
from pipeline.batch.duplicate import copy_memory
from pipeline.batch.layout import dense_array, lay_out
from pipeline.batch.move import keep_objects, move_batch
from pipeline.batch.overlap import Overlap, overlap_of, overlaps
from pipeline.batch.record import Batch, Media, MediaKind, Progress, Row, Scalars
from pipeline.batch.tree import map_batch, map_tensors, reachable, tensors_in

__all__ = [
    "Batch",
    "Media",
    "MediaKind",
    "Overlap",
    "Progress",
    "Row",
    "Scalars",
    "copy_memory",
    "dense_array",
    "keep_objects",
    "lay_out",
    "map_batch",
    "map_tensors",
    "move_batch",
    "num_samples",
    "overlap_of",
    "overlaps",
    "reachable",
    "tensors_in",
]
