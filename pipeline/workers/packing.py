"""Batches in shared memory: tensors and arrays lie there as they are, the rest is pickled beside them.

What is pickled is the batch's skeleton: its containers, strings and numbers, with each tensor or array
replaced by where it lies. A tensor that was made in the memory (see `Arena.tensor`) is not copied at all;
another is copied once. Whatever does not fit goes to a second file, made for this one batch. Tensors of an
unusual kind (sparse, of a class of their own, with a gradient or attributes) are pickled whole.
"""

from __future__ import annotations

import io
import os
import pickle
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy
import torch

from pipeline.batch import Batch, Overlap, dense_array, keep_objects, lay_out, map_batch, overlap_of, overlaps
from pipeline.concurrency import view_file
from pipeline.workers.reduction import reduce_tensor

ALIGNMENT_BYTES = 64
Buffer: TypeAlias = Any
"""Something with the buffer protocol: a memory map, or what `SlotFile.lend` returns."""


class Arena:
    """Hands out pieces of a buffer, one behind the other.

    Args:
        buffer: Writable memory; None has room for nothing.
        start: The bytes at the beginning that are left alone.
    """

    def __init__(self, buffer: Buffer | None, start: int = 0) -> None:
        self.buffer, self._first = buffer, start
        self.nbytes = 0 if buffer is None else len(buffer)
        self._start = _address(buffer) if self.nbytes else 0
        self._used = start

    def take(self, nbytes: int) -> int | None:
        """Return the offset of a piece of so many bytes, or None if there is no room."""
        offset = -(-self._used // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if offset + nbytes > self.nbytes:
            return None
        self._used = offset + nbytes
        return offset

    def takes(self, nbytes: int) -> bool:
        """Say that a tensor of any size is to lie in it, as long as there is room."""
        return True

    def clear(self) -> None:
        """Begin again at the start."""
        self._used = self._first

    def tensor(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor | None:
        """Return an uninitialised tensor in the buffer, or None if there is no room."""
        count = shape.numel()
        offset = self.take(count * dtype.itemsize) if count else None
        return None if offset is None else view(self.buffer, offset, dtype, count).view(shape)

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Return where a tensor lies in the buffer, or None if it lies elsewhere."""
        offset = tensor.data_ptr() - self._start
        return offset if self.nbytes and 0 <= offset < self._used else None


def view(buffer: Any, offset: int, dtype: torch.dtype, count: int) -> torch.Tensor:
    """Return a flat tensor over a piece of a buffer, which lives as long as the tensor."""
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset)


def _address(buffer: Any) -> int:
    return torch.frombuffer(buffer, dtype=torch.uint8, count=1).data_ptr()


@dataclass(slots=True)
class Packed:
    """A packed object.

    Args:
        offset: Where its skeleton lies; in the arena, or in the overflow if there is one.
        nbytes: The skeleton's length.
        overflow: A descriptor of the file with what did not fit the arena, or -1.
        wanted_bytes: How large an arena it would have fitted.
    """

    offset: int
    nbytes: int
    overflow: int
    wanted_bytes: int


@dataclass(slots=True)
class _Overflow:
    """What did not fit, and where it will lie."""

    pieces: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    used: int = 0

    def add(self, flat: torch.Tensor) -> int:
        offset = -(-self.used // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self.pieces.append((offset, flat))
        self.used = offset + flat.nbytes
        return offset


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, arena: Arena, shared: list[Overlap]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._arena, self.overflow, self._shared = arena, _Overflow(), shared
        self._numbers: dict[int, tuple[int, Any]] = {}  # what is one object here is one there
        # What was put, by address and bytes: what shares its memory here shares it there, so that a step
        # which writes to one sees it in the other. The tensors are kept, or an address would be used again.
        self._put_before: dict[tuple[int, int], tuple[torch.Tensor, tuple[bool, int]]] = {}

    def persistent_id(self, found: Any) -> Any:
        is_array = type(found) is numpy.ndarray and not found.dtype.hasobject
        if not is_array and not (type(found) is torch.Tensor and is_plain(found)):
            return None
        number, _ = self._numbers.setdefault(id(found), (len(self._numbers), found))
        return number, self._where(found, is_array)

    def _where(self, found: Any, is_array: bool) -> Any:
        if (shared := overlap_of(found, self._shared)) is not None:
            memory = shared[0].read()
            return "among others", *self._put(memory), shared[1], len(memory), None, None
        if not is_array:
            flat, stride = _flat(found)
            return "tensor", *self._put(flat), found.dtype, flat.numel(), found.shape, stride
        dense, layout = dense_array(found)
        flat = torch.frombuffer(_readable(dense), dtype=torch.uint8) if dense.nbytes else _EMPTY
        return "array", *self._put(flat), found.dtype, len(flat) and dense.size, dense.shape, layout

    def reducer_override(self, found: Any) -> Any:
        return reduce_tensor(found) if isinstance(found, torch.Tensor) else NotImplemented

    def _put(self, flat: torch.Tensor) -> tuple[bool, int]:
        """Put it into memory; return whether that is the overflow, and the offset."""
        if not flat.numel():
            return False, 0
        key = flat.data_ptr(), flat.nbytes
        if key not in self._put_before:
            self._put_before[key] = flat, self._put_first(flat)
        return self._put_before[key][1]

    def _put_first(self, flat: torch.Tensor) -> tuple[bool, int]:
        if (offset := self._arena.offset_of(flat)) is not None:
            return False, offset
        if (offset := self._arena.take(flat.nbytes)) is not None:
            view(self._arena.buffer, offset, flat.dtype, flat.numel()).copy_(flat)
            return False, offset
        return True, self.overflow.add(flat)


_EMPTY = torch.empty(0, dtype=torch.uint8)


def pack(packed: Any, arena: Arena) -> Packed:
    """Put an object into an arena, and what does not fit into a file of its own.

    Raises:
        Exception: What pickling raises, of which the object's own methods are a part.
    """
    file = io.BytesIO()
    packer = _Packer(file, arena, overlaps(packed))
    packer.dump(packed)
    skeleton = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
    overflow, nbytes = packer.overflow, len(skeleton)
    offset = None if overflow.pieces else arena.take(nbytes)
    if offset is not None:
        view(arena.buffer, offset, torch.uint8, nbytes).copy_(skeleton)
        return Packed(offset, nbytes, -1, 0)
    offset = overflow.add(skeleton)
    # Twice the alignment: pieces that fit one behind the other here may not, in another order.
    wanted = arena.nbytes + overflow.used + ALIGNMENT_BYTES * (2 + len(overflow.pieces))
    return Packed(offset, nbytes, _write(overflow), wanted)


def unpack(
    packed: Packed, buffer: Buffer, *, is_private: bool = False, views: list[Any] | None = None
) -> Any:
    """Return the packed object; its tensors and arrays are views, and keep what they view alive.

    Args:
        packed: As `pack` returned it, the descriptor being one of this process.
        buffer: Over the arena's memory.
        is_private: Writing to a view of the overflow is seen by no other process.
        views: Gets each tensor and array that is a view, wherever in the object it is.
    """
    overflow = None if packed.overflow < 0 else view_file(packed.overflow, is_private=is_private)
    place = buffer if overflow is None else overflow
    skeleton = memoryview(place)[packed.offset : packed.offset + packed.nbytes]
    return _Unpacker(io.BytesIO(skeleton), buffer, overflow, views).load()


def reaches_all(batch: Batch, views: list[Any]) -> bool:
    """Say whether the batch goes to the device whole.

    What stays behind, in an object or as an array, the user may copy to the device. From pinned memory that
    would only be queued, and a worker might write the next batch there before.
    """
    reached = set[int]()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        reached.add(id(tensor))
        return tensor

    map_batch(batch, note, keep_objects)
    return all(id(each) in reached for each in views)


class _Unpacker(pickle.Unpickler):
    def __init__(
        self, file: io.BytesIO, buffer: Buffer, overflow: Buffer | None, views: list[Any] | None
    ) -> None:
        super().__init__(file)
        self._buffers, self._views = (buffer, overflow), views
        self._made: dict[Any, Any] = {}

    def persistent_load(self, found: Any) -> Any:
        number, where = found
        if number not in self._made:
            self._made[number] = self._load(where)
            if self._views is not None:
                self._views.append(self._made[number])
        return self._made[number]

    def _load(self, where: Any) -> Any:
        kind, is_overflow, offset, dtype, count, shape, layout = where  # or, for a dtype, how it lies there
        buffer = self._buffers[is_overflow]
        if kind == "among others":
            memory = view(buffer, offset, torch.uint8, count)
            return dtype.view(self._made.setdefault((is_overflow, offset), memory))
        if kind == "array":
            array: Any = numpy.empty(shape, dtype)
            if count:
                array = numpy.frombuffer(buffer, dtype, count, offset).reshape(shape)  # type: ignore[arg-type]
            return lay_out(array, layout)
        if not count:
            return torch.empty_strided(shape, layout or torch.empty(shape).stride(), dtype=dtype)
        flat = view(buffer, offset, dtype, count)
        if layout is None:
            return flat.view(shape)
        if count == shape.numel() and _span(shape, layout) > count:  # it came without what lay in between
            return torch.empty_strided(shape, layout, dtype=dtype).copy_(flat.view(shape))
        return flat.as_strided(shape, layout)


def is_plain(tensor: torch.Tensor) -> bool:
    """Say whether a tensor is its numbers and no more."""
    is_unusual = tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg()
    return (
        tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not (is_unusual or tensor.is_nested or tensor.__dict__)
    )


def _flat(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...] | None]:
    """Return the memory that a tensor spans, and its strides unless they are the usual ones.

    Strides are kept, for the kernels that read the batch may sum in the order of its memory. A tensor that
    is a small part of what it spans travels without what lies in between.
    """
    stride = tensor.stride()
    if tensor.is_contiguous():
        flat = tensor.view(-1)
        return flat, None if flat.view(tensor.shape).stride() == stride else stride
    span = _span(tensor.shape, stride)
    if span > 2 * tensor.numel():
        return tensor.contiguous().view(-1), stride
    return tensor.as_strided((span,), (1,)), stride


def _span(shape: torch.Size, strides: tuple[int, ...]) -> int:
    """Return how many elements of memory lie from the first to the last, if there is one."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _readable(array: Any) -> Any:
    """Return an array's memory as a writable buffer, which `torch.frombuffer` insists on."""
    flat = array.reshape(-1).view(numpy.uint8)
    return flat if flat.flags.writeable else flat.copy()


def _write(overflow: _Overflow) -> int:
    file = os.memfd_create("oversized")
    try:
        os.ftruncate(file, overflow.used)
        memory = view_file(os.dup(file))
        for offset, flat in overflow.pieces:
            view(memory, offset, flat.dtype, flat.numel()).copy_(flat)
    except BaseException:
        os.close(file)
        raise
    return file
