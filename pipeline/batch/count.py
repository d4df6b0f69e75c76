"""How many samples a batch has, as far as that can be seen; where it cannot, the user says it.

1. An object that knows is asked: ``num_graphs`` (torch_geometric), ``batch_size`` (TensorDict), and a
   ``PackedSequence`` has as many samples as sequences. Beside tensors, it decides.
2. Otherwise it is the first dimension, if all tensors and arrays agree on it.
3. If they differ, and the batch is a list of dicts or other records, or a pair of lists of which the second
   one is, it is the length of that list: each is a sample.
4. If they differ, and no other begins as the first one does, time may come first in ``[T, B]`` of whole
   numbers and in ``[T, B, F]``: it is the one number that all have as their first dimension, or in such a
   tensor as their second.
5. Otherwise it is the first dimension of the first tensor; 1 if there is none.
"""

from __future__ import annotations

import itertools
import types
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy
import torch
from torch.nn.utils.rnn import PackedSequence

from pipeline.batch.record import Batch
from pipeline.batch.tree import PLAIN, attributes_of, tensors_in

MAX_PARTS = 8  # of a container that are looked at: a list may be as long as the batch


def num_samples(batch: Batch) -> int:
    """Return how many samples a batch has; reads nothing from the device.

    Runs on:
        Loop thread, at every step: 1 µs for a tensor, a pair or a dict of tensors, 10 for what is nested.
    """
    kind = type(batch)
    if kind is torch.Tensor and batch.dim():
        return batch.size(0)  # type: ignore[no-any-return]
    if kind is tuple or kind is list:
        return _common_size(batch) or _count(batch)
    if kind is dict:
        return _common_size(batch.values()) or _count(batch)
    return _count(batch)


def _common_size(parts: Iterable[Any]) -> int:
    """Return the first dimension of parts that are all tensors and agree; else 0. The most common batches."""
    common = 0
    for part in parts:
        if type(part) is not torch.Tensor or not part.dim():
            return 0
        size = part.size(0)
        if common and size != common:
            return 0
        common = size
    return common


class _Sizes(NamedTuple):
    """The first dimension of a tensor, and the second if the first may be time; else 0."""

    first: int
    second: int


def _count(batch: Batch) -> int:
    found: list[_Sizes] = []
    if (known := _gather(batch, found)) is not None:
        return known
    if not found:
        return 1
    first = found[0].first
    if all(each.first == first for each in found):
        return first
    records = _num_records(batch)
    if records is not None:
        return records
    if any(each.first == first for each in found[1:]):
        return first
    common = set.intersection(*({first, second} - {0} for first, second in found))
    return common.pop() if len(common) == 1 else first


def _num_records(batch: Batch) -> int | None:
    """Return the length of a list of samples; None if it is a list of columns."""
    if _is_list_of_records(batch):
        return len(batch)
    if type(batch) in (tuple, list) and len(batch) == 2 and _is_list_of_records(batch[1]):
        first, second = batch
        if isinstance(first, (tuple, list)) and len(first) == len(second):
            return len(second)
    return None


def _is_list_of_records(found: Any) -> bool:
    if type(found) not in (tuple, list) or not found:
        return False
    kind = type(found[0])
    is_record = issubclass(kind, Mapping) or hasattr(kind, "__dataclass_fields__")
    return is_record and all(type(each) is kind for each in found)


def _gather(batch: Batch, sizes: list[_Sizes]) -> int | None:
    """Add the sizes of a batch's tensors and arrays, in order; return what an object knows, if one does."""
    kind = type(batch)
    if kind is tuple or kind is list:
        return _gather_all(batch, sizes)
    if kind is dict:
        return _gather_all(batch.values(), sizes)
    if kind is not torch.Tensor:
        if isinstance(batch, PLAIN):
            return None
        if (known := _known_count(batch)) is not None:
            return known
    if isinstance(batch, (torch.Tensor, numpy.ndarray)):
        _note(batch, sizes)
        return None
    parts = _parts(batch)
    return _seen_in(batch, sizes) if parts is None else _gather_all(parts, sizes)


def _gather_all(parts: Iterable[Any], sizes: list[_Sizes]) -> int | None:
    for part in itertools.islice(parts, MAX_PARTS):
        if (known := _gather(part, sizes)) is not None:
            return known
    return None


def _note(found: Any, sizes: list[_Sizes]) -> None:
    if isinstance(found, torch.Tensor) and found.is_nested:
        sizes.append(_Sizes(found.size(0), 0))
    elif found.ndim:
        may_be_time = found.ndim == 3 or (
            found.ndim == 2 and found.shape[0] != 1 and not _has_fractions(found)
        )
        sizes.append(_Sizes(found.shape[0], found.shape[1] if may_be_time else 0))


def _has_fractions(found: Any) -> bool:
    if isinstance(found, torch.Tensor):
        return found.is_floating_point() or found.is_complex()
    return found.dtype.kind in "fc"


def _parts(found: Any) -> Iterable[Any] | None:
    """Return the parts of a container; None if it is an object that nobody knows."""
    if isinstance(found, Mapping):
        return found.values()
    if isinstance(found, (list, tuple, deque)):
        return found
    is_record = hasattr(type(found), "__dataclass_fields__") or isinstance(found, types.SimpleNamespace)
    return attributes_of(found).values() if is_record else None


def _known_count(found: Any) -> int | None:
    """Return the number that an object knows."""
    if isinstance(found, PackedSequence):
        if found.sorted_indices is not None:
            return found.sorted_indices.size(0)
        return int(found.batch_sizes[0])  # always on the host
    # A mapping's attributes may be its keys.
    place = type(found) if isinstance(found, Mapping) else found
    for name in ("num_graphs", "batch_size"):
        try:
            count = getattr(found, name) if hasattr(place, name) else None
        except Exception:  # a user's attribute may do what it likes
            continue
        if isinstance(count, torch.Size):
            return count[0] if count else None
        if isinstance(count, int) and not isinstance(count, bool):
            return count
    return None


def _seen_in(found: Any, sizes: list[_Sizes]) -> int | None:
    """Return an object's length, if a tensor in it has as many rows; else note the first tensor in it."""
    tensors = list(tensors_in(found))
    try:
        count = len(found)
    except Exception:  # it has none
        count = -1
    if any(each.ndim and each.size(0) == count for each in tensors):
        return count
    if tensors:
        _note(tensors[0], sizes)
    return None
