"""Tensors of every kind as dense ones that a file can hold, and what it takes to make them again.

Dense tensors of the layout's own dtypes stay as they are. Others are put together from their parts: a sparse
tensor from indices and values, a quantized one from its integers and scales, a nested one from its rows; and
one of a dtype that the layout does not know is kept as bytes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
}  # fmt: skip
"""The layout's names of dtypes, as far as its readers know them."""

_OWN = frozenset(DTYPES.values())
_COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}

_QUANTIZED = (torch.quint8, torch.qint8, torch.qint32)
_PER_TENSOR = (torch.per_tensor_affine, torch.per_tensor_symmetric)
_SCHEMES = (*_PER_TENSOR, torch.per_channel_affine, torch.per_channel_symmetric)

Part = Callable[[torch.Tensor, str], Any]
"""Packs a part of a tensor, under a name of its own."""


def is_dense(tensor: torch.Tensor) -> bool:
    """Say whether a tensor is of torch's own class, strided, and has its values; as most are."""
    is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    return is_plain and not (tensor.is_quantized or tensor.is_nested or tensor.is_meta)


def problem_of(tensor: torch.Tensor) -> str | None:
    """Say why a tensor cannot be held; None if it can."""
    if tensor.is_nested or torch.nn.parameter.is_lazy(tensor):
        return None
    if hasattr(tensor, "to_local") or is_traceable_wrapper_subclass(tensor):
        return f"is a tensor of the class {type(tensor).__name__}, whose values are in tensors of its own"
    if tensor.is_meta:
        return "is a tensor on the meta device, which has no values"
    if tensor.is_quantized and (tensor.dtype not in _QUANTIZED or tensor.qscheme() not in _SCHEMES):
        return f"is a quantized tensor of {tensor.dtype} ({tensor.qscheme()})"
    if tensor.layout not in (torch.strided, torch.sparse_coo, *_COMPRESSED):
        return f"is a tensor of the layout {tensor.layout}"
    return None


def take_apart(tensor: torch.Tensor, part: Part) -> dict[str, Any] | None:
    """Return a tensor's parts, packed, and their kind under ``$``; None for a dense one, which has none."""
    if torch.nn.parameter.is_lazy(tensor):  # its module has not seen a batch yet
        return {"$": "lazy", "is_parameter": isinstance(tensor, torch.nn.Parameter)}
    if tensor.is_nested:
        items = [part(row, str(place)) for place, row in enumerate(tensor.unbind())]
        return {"$": "nested", "is_jagged": tensor.layout is torch.jagged, "items": items}
    if tensor.is_quantized:
        return {"$": "quantized", "values": part(tensor.int_repr(), "values"), **_scales(tensor, part)}
    if tensor.layout is torch.strided:
        return None
    if tensor.layout is torch.sparse_coo:
        first, second, values = tensor._indices(), None, tensor._values()
    else:
        first, second = (getattr(tensor, name)() for name in _COMPRESSED[tensor.layout])
        values = tensor.values()
    return {
        "$": "sparse",
        "layout": str(tensor.layout).removeprefix("torch."),
        "shape": list(tensor.shape),
        "indices": part(first, "indices"),
        "more_indices": None if second is None else part(second, "more_indices"),
        "values": part(values, "values"),
        "is_coalesced": second is None and tensor.is_coalesced(),
    }


def put_together(packed: Mapping[str, Any], part: Callable[[Any], Any]) -> torch.Tensor:
    """Return what `take_apart` was given; the indices of a sparse tensor are checked."""
    kind = packed["$"]
    if kind == "lazy":
        is_parameter = packed["is_parameter"]
        return torch.nn.UninitializedParameter() if is_parameter else torch.nn.UninitializedBuffer()
    make = {"nested": _nested, "quantized": _quantized, "sparse": _sparse}[kind]
    with warnings.catch_warnings():  # that torch calls some of them prototypes, who made them has been told
        warnings.simplefilter("ignore")
        return make(packed, part)


def to_bytes(tensor: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return a dense tensor as the layout can hold it, and what its reader must know to undo that."""
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.dtype in _OWN:
        return tensor, {}
    dtype, shape = str(tensor.dtype).removeprefix("torch."), list(tensor.shape)
    return tensor.contiguous().reshape(-1).view(torch.uint8), {"dtype": dtype, "shape": shape}


def from_bytes(tensor: torch.Tensor, packed: Mapping[str, Any]) -> torch.Tensor:
    """Undo `to_bytes`."""
    return tensor.view(dtype_named(packed["dtype"])).reshape(packed["shape"]) if "dtype" in packed else tensor


def dtype_named(name: str) -> torch.dtype:
    """Return torch's dtype of a name."""
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch.{name} is no dtype")
    return dtype


def _scales(tensor: torch.Tensor, part: Part) -> dict[str, Any]:
    if tensor.qscheme() in _PER_TENSOR:
        return {"scale": tensor.q_scale(), "zero_point": tensor.q_zero_point()}
    return {
        "axis": tensor.q_per_channel_axis(),
        "scale": part(tensor.q_per_channel_scales(), "scale"),
        "zero_point": part(tensor.q_per_channel_zero_points(), "zero_point"),
    }


def _nested(packed: Mapping[str, Any], part: Callable[[Any], Any]) -> torch.Tensor:
    layout = torch.jagged if packed["is_jagged"] else torch.strided
    rows = [part(each) for each in packed["items"]]
    return torch.nested.as_nested_tensor(rows, layout=layout)


def _quantized(packed: Mapping[str, Any], part: Callable[[Any], Any]) -> torch.Tensor:
    values, make = part(packed["values"]), torch._make_per_tensor_quantized_tensor
    if "axis" not in packed:
        return make(values, packed["scale"], packed["zero_point"])
    scales, points = part(packed["scale"]), part(packed["zero_point"])
    return torch._make_per_channel_quantized_tensor(values, scales, points, packed["axis"])


def _sparse(packed: Mapping[str, Any], part: Callable[[Any], Any]) -> torch.Tensor:
    indices, values, shape = part(packed["indices"]), part(packed["values"]), packed["shape"]
    if packed["layout"] == "sparse_coo":
        return torch.sparse_coo_tensor(
            indices, values, shape, is_coalesced=packed["is_coalesced"], check_invariants=True
        )
    layout = getattr(torch, packed["layout"])
    more = part(packed["more_indices"])
    return torch.sparse_compressed_tensor(indices, more, values, shape, layout=layout, check_invariants=True)
