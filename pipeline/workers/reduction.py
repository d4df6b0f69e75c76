"""Tensors that do not lie in memory as they are, taken apart for a pickle."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import torch

_GRAPH = (
    "a tensor of shape {shape} was computed from one with a gradient, and its graph cannot go from one "
    "process to another. Use .detach(), or torch.no_grad(), or set placement=inline."
)


def reduce_tensor(found: torch.Tensor) -> Any:
    """Return what makes a tensor anew, and of which parts; NotImplemented leaves it to its class.

    torch's own way keeps a list of all sparse tensors ever unpickled, to validate them, and there is
    none for nested ones.

    Raises:
        PicklingError: If the tensor has a graph, which would be lost without a word.
    """
    if found.requires_grad and not found.is_leaf:
        raise pickle.PicklingError(_GRAPH.format(shape=tuple(found.shape)))
    if type(found) is not torch.Tensor or found.__dict__:
        return NotImplemented
    taken_apart = _take_apart(found.detach())
    return NotImplemented if taken_apart is None else (_together, (*taken_apart, found.requires_grad))


def _take_apart(found: torch.Tensor) -> tuple[Callable[..., torch.Tensor], tuple[Any, ...]] | None:
    if found.is_nested:
        return (_nested, _parts_of_nested(found)) if found.size(0) else (_nested_of_none, (found.dtype,))
    if found.layout is torch.sparse_coo:
        return _sparse_coo, (found._indices(), found._values(), found.shape, found.is_coalesced())
    if found.layout in _COMPRESSED:
        return _sparse_compressed, (*_COMPRESSED[found.layout](found), found.shape, found.layout)
    return None


def _together(
    function: Callable[..., torch.Tensor], parts: tuple[Any, ...], requires_grad: bool
) -> torch.Tensor:
    return function(*parts).requires_grad_(requires_grad)


def _sparse_coo(indices: Any, values: Any, shape: torch.Size, is_coalesced: bool) -> torch.Tensor:
    return torch.sparse_coo_tensor(indices, values, shape, is_coalesced=is_coalesced, check_invariants=False)


def _sparse_compressed(
    compressed: Any, plain: Any, values: Any, shape: torch.Size, layout: torch.layout
) -> torch.Tensor:
    return torch.sparse_compressed_tensor(
        compressed, plain, values, shape, layout=layout, check_invariants=False
    )


def _by_rows(found: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return found.crow_indices(), found.col_indices(), found.values()


def _by_columns(found: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return found.ccol_indices(), found.row_indices(), found.values()


_COMPRESSED = {
    torch.sparse_csr: _by_rows,
    torch.sparse_bsr: _by_rows,
    torch.sparse_csc: _by_columns,
    torch.sparse_bsc: _by_columns,
}


def _parts_of_nested(found: Any) -> tuple[torch.Tensor, ...]:
    """Return the memory of a nested tensor of the strided kind, and where its pieces lie in it."""
    sizes, strides = found._nested_tensor_size(), found._nested_tensor_strides()
    return found.values(), sizes, strides, found._nested_tensor_storage_offsets()


def _nested(*parts: Any) -> torch.Tensor:
    return torch._nested_view_from_buffer_copy(*parts)


def _nested_of_none(dtype: torch.dtype) -> torch.Tensor:
    return torch.nested.nested_tensor([], dtype=dtype)
