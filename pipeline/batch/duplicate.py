"""A batch in memory of its own, exact in all but that: whoever made it may write the next one over it."""

from __future__ import annotations

import array
import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy
import torch

from pipeline.batch.layout import dense_array, lay_out
from pipeline.batch.move import keep_objects
from pipeline.batch.overlap import Overlap, overlap_of, overlaps
from pipeline.batch.record import Batch
from pipeline.batch.tree import MAX_REACHED, Move, attributes_of, map_batch, reachable

T = TypeVar("T")


def copy_memory(batch: Batch, is_kept: Callable[[torch.Tensor], bool] | None = None) -> Batch:
    """Return the batch with tensors and arrays in memory of their own.

    Types, strides, flags, attributes stay; what was one object under two names, or lay in the memory of
    another, still does. Handed over as it is: a tensor with a gradient, which somebody may optimise; an
    object that cannot be copied, or is large.

    Args:
        batch: Of whatever the user makes.
        is_kept: Says which tensors are copied by who moves them; not of those in an object that moves itself.
    """
    copier = _Copier(overlaps(batch) if is_kept is None else ())
    if is_kept is None:
        return copier.whole(batch)

    def copy_object(found: Any, move: Move) -> Any:
        return copier.whole(found) if keep_objects(found, move) is found else NotImplemented

    def copy_tensor(found: torch.Tensor) -> torch.Tensor:
        return found if is_kept(found) else copier.tensor(found)

    return map_batch(batch, copy_tensor, copy_object, copier.other, rebuilds_all=True)


class _Copier:
    """Copies what is in one batch.

    Args:
        shared: Memory in which several of its tensors and arrays lie.
    """

    def __init__(self, shared: Sequence[Overlap]) -> None:
        self._shared = shared
        self._copies: dict[Any, tuple[Any, Any]] = {}  # with what was copied, or its id would be used again

    def whole(self, found: Any) -> Any:
        return map_batch(found, self.tensor, on_other=self.other, rebuilds_all=True)

    def tensor(self, found: torch.Tensor) -> torch.Tensor:
        return found if found.requires_grad else self._once(id(found), found, self._tensor)

    def other(self, found: Any) -> Any:
        if isinstance(found, numpy.ndarray):
            return self._once(id(found), found, self._array)
        if isinstance(found, (set, bytearray, array.array)):
            return self._once(id(found), found, copy.copy)
        return self._once(id(found), found, self._object)

    def _once(self, key: Any, found: T, function: Callable[[T], T]) -> T:
        if key not in self._copies:
            self._copies[key] = found, function(found)
        made: T = self._copies[key][1]
        return made

    def _tensor(self, found: torch.Tensor) -> torch.Tensor:
        made = self._numbers(found)
        if found.__dict__ and type(made) is type(found):
            made.__dict__.update(found.__dict__)
        return made

    def _numbers(self, found: torch.Tensor) -> torch.Tensor:
        if isinstance(found, torch.nn.Parameter):
            return torch.nn.Parameter(found.detach().clone(), requires_grad=False)
        is_usual = type(found) is torch.Tensor and found.layout is torch.strided and not found.is_nested
        if not is_usual or found.is_quantized:
            return found.clone()
        if found.is_conj():  # a clone would work out what is put off
            return torch.conj(self._numbers(torch.conj(found)))
        if found.is_neg():
            return _negated(self._numbers(_negated(found)))
        if (shared := overlap_of(found, self._shared)) is not None:
            made: torch.Tensor = shared[1].view(self._memory(shared[0]))
            return made
        if (key := _memory_of(found)) in self._copies:
            return self._once(key, found, _cloned).as_strided(found.shape, found.stride())
        return self._once(key, found, _cloned)

    def _memory(self, shared: Overlap) -> torch.Tensor:
        if shared not in self._copies:
            self._copies[shared] = shared, shared.read().clone()
        made: torch.Tensor = self._copies[shared][1]
        return made

    def _array(self, found: Any) -> Any:
        if found.dtype.hasobject:
            return self._object(found)
        if (shared := overlap_of(found, self._shared)) is not None:
            return shared[1].view(self._memory(shared[0]))
        if type(found) is numpy.ndarray:
            dense, layout = dense_array(found)
            return lay_out(dense.copy(), layout)
        flip = tuple(slice(None, None, -1) if stride < 0 else slice(None) for stride in found.strides)
        made = found[flip].copy(order="K")[flip] if found.ndim else found.copy()
        if not found.flags.writeable:
            made.flags.writeable = False
        return made

    def _object(self, found: Any) -> Any:
        """Copy an object whose tensors and arrays can all be reached; hand over any other as it is."""
        reached = list(reachable(found))
        leaves = [each for each in reached if isinstance(each, (torch.Tensor, numpy.ndarray))]
        if not (leaves or _is_its_attributes(found)) or len(reached) == MAX_REACHED:
            return found
        if any(map(_is_shared, reached)):
            return found
        memo: dict[int, Any] = {}
        for leaf in leaves:
            if leaf is not found:
                memo[id(leaf)] = self.tensor(leaf) if isinstance(leaf, torch.Tensor) else self.other(leaf)
        try:
            return copy.deepcopy(found, memo)
        except Exception:  # it holds a lock, a file, …
            return found


def _is_its_attributes(found: Any) -> bool:
    """Say whether an object is no more than what it holds, and so can be filled anew as a list can."""
    kind = type(found)
    methods = ("__reduce_ex__", "__reduce__", "__getstate__")
    return bool(attributes_of(found)) and all(
        getattr(kind, name) is getattr(object, name) for name in methods
    )


def _cloned(found: torch.Tensor) -> torch.Tensor:
    """Copy with the strides that it has, for a kernel may sum in the order of the memory."""
    made = found.clone()
    if made.stride() == found.stride():
        return made
    # Along an expanded dimension there is one element.
    sizes = [1 if stride == 0 else size for size, stride in zip(found.shape, found.stride(), strict=True)]
    own = found.as_strided(sizes, found.stride())
    made = torch.empty_strided(sizes, found.stride(), dtype=found.dtype, device=found.device)
    return made.copy_(own).as_strided(found.shape, found.stride())


_negated: Callable[[torch.Tensor], torch.Tensor] = torch._neg_view


def _memory_of(found: torch.Tensor) -> tuple[Any, ...]:
    """Return what tensors have in common that show all of the same memory."""
    place = found.data_ptr(), found.dtype, found.device, found.numel()
    return place if found.is_contiguous() else (*place, found.shape, found.stride())


def _is_shared(found: Any) -> bool:
    """Say whether an object is more than a batch's: a model, a dataset."""
    return isinstance(found, (torch.nn.Module, torch.utils.data.Dataset))
