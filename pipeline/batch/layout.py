"""How an array lies in memory: taken apart into one piece, and laid out again as it was."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy


class Layout(NamedTuple):
    """How an array lay in memory.

    Args:
        order: Its axes, in the order of the memory; none if it lay as usual.
        flip: What turns round those that ran backwards.
        shape: In that order, with those along which it was repeated.
        strides: Of that.
        is_writeable: Its flag.
    """

    order: tuple[int, ...]
    flip: tuple[slice, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    is_writeable: bool


def dense_array(found: Any) -> tuple[Any, Layout]:
    """Return an array as one piece of memory, without a copy if it is one, and what `lay_out` needs."""
    if found.flags.c_contiguous:
        return found, Layout((), (), (), (), found.flags.writeable)
    flip = tuple(slice(None, None, -1) if stride < 0 else slice(None) for stride in found.strides)
    order = tuple(sorted(range(found.ndim), key=lambda axis: -abs(found.strides[axis])))
    lying = found[flip].transpose(order)
    layout = Layout(order, flip, lying.shape, lying.strides, found.flags.writeable)
    return numpy.ascontiguousarray(lying[_once(lying.strides)]), layout


def lay_out(dense: Any, layout: Layout) -> Any:
    """Return an array as it lay before `dense_array`; in the same memory if that was one piece."""
    order, flip, shape, strides, is_writeable = layout
    if order:
        if (dense.shape, dense.strides) != (shape, strides):
            last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
            memory = numpy.empty(last + dense.itemsize, numpy.uint8)
            lying: Any = numpy.ndarray(shape, dense.dtype, memory, strides=strides)
            lying[_once(strides)] = dense
            dense = lying
        dense = dense.transpose(numpy.argsort(order))[flip]
    dense.flags.writeable = is_writeable
    return dense


def _once(strides: tuple[int, ...]) -> tuple[slice, ...]:
    """Return what takes one of each element that an array repeats."""
    return tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)
