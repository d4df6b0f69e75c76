"""Whether numbers are finite: a cheap look that is enough for ordinary ones, and an exact one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch.nn.parameter import is_lazy

MODERATE = 1e15
"""No product of two numbers up to this comes near the end of float32."""

_SMALL = 1 << 14  # elements, up to which copying a tensor costs less than another call


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's numbers as real ones in a strided tensor; of a sparse one those that it stores."""
    if tensor.layout is torch.sparse_coo:
        tensor = tensor._values()
    elif tensor.layout is not torch.strided:
        tensor = tensor.to_dense() if tensor.is_mkldnn else tensor.values()
    return _as_real(tensor)


def _as_real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def has_numbers(value: object) -> bool:
    """Say whether a value is a tensor that may hold NaN."""
    return (
        isinstance(value, torch.Tensor)
        and (value.is_floating_point() or value.is_complex())
        and not is_lazy(value)
    )


def are_moderate(tensors: Iterable[torch.Tensor]) -> bool:
    """Say whether the norm of every tensor is finite and at most `MODERATE`.

    Tensors of some thousand elements are put together first, since another call costs more than a copy. A
    norm may overflow where each number is finite: what is not moderate has to be looked at again.

    Runs on:
        Loop thread; waits for a device. On the CPU some 10 µs, and 0.5 µs for each small tensor; one
        reading of the memory of the large ones.
    """
    small: list[torch.Tensor] = []
    for each in tensors:
        strided = each if each.layout is torch.strided else dense(each)
        if strided.numel() <= _SMALL:
            small.append(strided)
        elif not torch.linalg.vector_norm(strided).item() <= MODERATE:  # so that NaN is not moderate
            return False
    return not small or _norm_of_small(small) <= MODERATE


def _norm_of_small(tensors: list[torch.Tensor]) -> float:
    try:
        flat = torch._C._nn.flatten_dense_tensors(tensors)
    except RuntimeError:  # on several devices
        norms = [torch.linalg.vector_norm(each).item() for each in tensors]
        return math.nan if any(each != each for each in norms) else max(norms)
    if flat.dtype is not torch.float32:
        flat = _as_real(flat).reshape(-1).double()
    return math.sqrt(flat.dot(flat).item())


def are_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Say whether every number of every tensor is finite, exactly; the sums of a sparse one's duplicates too.

    Runs on:
        Loop thread; waits for a device.
    """
    return all(bool(torch.isfinite(_summed(each)).all().item()) for each in tensors)


def largest_of(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the largest absolute value, NaN if there is any; waits for nothing.

    Unlike the usual norm it overflows for none that is finite.
    """
    found = [each for tensor in tensors if (each := _summed(tensor)).numel()]
    return torch.nn.utils.get_total_norm(found, float("inf"))


def appeared(
    now: Sequence[torch.Tensor], before: Sequence[torch.Tensor], *, counts_infinity: bool
) -> torch.Tensor:
    """Return whether any tensor has NaN (or infinity) and had none before; waits for nothing."""
    norms = []
    for tensors in (now, before):
        found = torch._foreach_norm([dense(each) for each in tensors], float("inf"))
        norms.append(torch.stack([each.to(found[0].device) for each in found]))
    after, earlier = norms
    if counts_infinity:
        return (~torch.isfinite(after) & torch.isfinite(earlier)).any()
    return (torch.isnan(after) & ~torch.isnan(earlier)).any()


def _summed(tensor: torch.Tensor) -> torch.Tensor:
    """Return the numbers that an optimizer sees: those of one place in a sparse tensor are added."""
    return dense(tensor.coalesce() if tensor.layout is torch.sparse_coo else tensor)
