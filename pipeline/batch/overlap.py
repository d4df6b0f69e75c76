"""Which tensors and arrays of a batch lie in one another's memory: a write to one is seen in the other.

Inputs and targets may be two views of one row of tokens, a crop a view of its image. A copy that took each by
itself would cut that tie, and a step that writes to one of them would then compute something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy
import torch

from pipeline.batch.tree import reachable

ALIGNMENT_BYTES = 64


class Overlap(NamedTuple):
    """A piece of the host's memory in which several tensors or arrays lie; by its first address and its end.

    The first is rounded down, so that in a copy everything is aligned as it was.
    """

    start: int
    end: int

    def read(self) -> torch.Tensor:
        """Return its bytes, where they are; valid as long as what lies there."""
        size, data = (self.end - self.start,), (self.start, False)
        place = SimpleNamespace(
            __array_interface__={"version": 3, "typestr": "|u1", "shape": size, "data": data}
        )
        return torch.from_numpy(numpy.asarray(place))


class Inside(NamedTuple):
    """How a tensor or an array lies in such memory.

    Args:
        offset: Of its first byte.
        dtype: Torch's or NumPy's, which says what it is.
        shape: As it is.
        strides: In elements for a tensor, in bytes for an array.
        is_writeable: An array's flag.
    """

    offset: int
    dtype: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    is_writeable: bool

    def view(self, memory: torch.Tensor) -> Any:
        """Return it in a copy of the memory; of all that are, each sees what is written to another."""
        steps = [(size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)]
        if isinstance(self.dtype, torch.dtype):
            end = self.offset + (1 + sum(steps)) * self.dtype.itemsize
            return memory[self.offset : end].view(self.dtype).as_strided(self.shape, self.strides)
        first = self.offset - sum(step for step in steps if step < 0)
        made: Any = numpy.ndarray(self.shape, self.dtype, memory.numpy(), first, self.strides)
        made.flags.writeable = self.is_writeable
        return made


def overlaps(batch: Any) -> list[Overlap]:
    """Return the memory that several tensors and arrays of a batch share, as far as they can be reached.

    Left out is what would be a small part of the memory that lies between its first and its last byte.
    """
    leaves = [(extent, each.nbytes) for each in reachable(batch) if (extent := _extent(each)) is not None]
    found: list[tuple[int, int, int, int]] = []  # start, end, bytes of what lies there, how many that are
    for (start, end), nbytes in sorted(leaves) if len(leaves) > 1 else ():
        if found and start < found[-1][1]:
            first, last, sum_bytes, count = found.pop()
            found.append((first, max(last, end), sum_bytes + nbytes, count + 1))
        else:
            found.append((start, end, nbytes, 1))
    return [
        Overlap(start & -ALIGNMENT_BYTES, end)
        for start, end, nbytes, count in found
        if count > 1 and end - start <= 2 * nbytes
    ]


def overlap_of(found: Any, known: Sequence[Overlap]) -> tuple[Overlap, Inside] | None:
    """Return the memory that a tensor or an array shares with others, and how it lies there, if it does."""
    if not known or (extent := _extent(found)) is None:
        return None
    for each in known:
        if each.start <= extent[0] and extent[1] <= each.end:
            is_tensor = isinstance(found, torch.Tensor)
            strides = found.stride() if is_tensor else found.strides
            is_writeable = is_tensor or found.flags.writeable
            return each, Inside(
                extent[0] - each.start, found.dtype, tuple(found.shape), strides, is_writeable
            )
    return None


def _extent(found: Any) -> tuple[int, int] | None:
    """Return the addresses that a tensor or an array spans; None if it is not plain memory of the host."""
    if type(found) is torch.Tensor:
        if not _is_in_one_piece(found):
            return None
        start = found.data_ptr()
        if found.is_contiguous():
            return None if start % found.itemsize else (start, start + found.nbytes)
        last = sum((size - 1) * stride for size, stride in zip(found.shape, found.stride(), strict=True))
        return None if start % found.itemsize else (start, start + (last + 1) * found.itemsize)
    if type(found) is numpy.ndarray and found.nbytes and not found.dtype.hasobject:
        steps = [(size - 1) * stride for size, stride in zip(found.shape, found.strides, strict=True)]
        start = found.__array_interface__["data"][0]
        low = start + sum(step for step in steps if step < 0)
        return low, start + sum(step for step in steps if step > 0) + found.itemsize
    return None


def _is_in_one_piece(tensor: torch.Tensor) -> bool:
    is_unusual = tensor.requires_grad or tensor.is_quantized or tensor.is_nested
    is_here = tensor.layout is torch.strided and tensor.device.type == "cpu"
    return is_here and not is_unusual and tensor.numel() > 0
