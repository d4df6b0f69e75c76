"""What came from the device, followed through every operation, where no driver says who waits.

A simulated accelerator and the CPU keep "device" tensors in host memory, so the device of a tensor
does not tell them from the host's own. Here they are known by where they came from: the model's
parameters and buffers, the batches, and whatever was computed from one of these. The optimizer's step
count or a scheduler's numbers, which stay on the host beside a real device too, are not among them.

What is not seen: ``.to("cpu")``, since the device is the CPU here; and a new tensor made on the device
from a Python number, a copy that waits on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from pipeline.batch import Batch, reachable

_aten = torch.ops.aten
# Operations whose result, or the shape of it, the host must know before it can go on.
_READS = {
    _aten._local_scalar_dense.default: "item",
    _aten.equal.default: "equal",
    _aten.nonzero.default: "nonzero",
    _aten.masked_select.default: "masked_select",
    _aten._unique2.default: "unique",
    _aten.unique_dim.default: "unique",
    _aten.unique_consecutive.default: "unique_consecutive",
    _aten.repeat_interleave.Tensor: "repeat_interleave",
    _aten.bincount.default: "bincount",
}
_INDEXES = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default}


class TaintMode(TorchDispatchMode):
    """Follows device tensors on the thread that enters `installed`, and notes where one is read.

    Args:
        reads: Told of each read: anything with ``note(operation)``.
    """

    def __init__(self, reads: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._reads = reads
        self._marked: Any = WeakTensorKeyDictionary()

    def mark(self, source: torch.nn.Module | Batch) -> None:
        """Say that a module's tensors, or a batch's, are on the device."""
        if isinstance(source, torch.nn.Module):
            for tensor in (*source.parameters(), *source.buffers()):
                self._mark(tensor)
        else:
            reached = list(reachable(source))
            on_host = {id(each.batch_sizes) for each in reached if isinstance(each, PackedSequence)}
            for each in reached:
                if isinstance(each, torch.Tensor) and id(each) not in on_host:
                    self._mark(each)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Follow and note inside the block."""
        with _Conversions(self), self:
            yield

    def is_on_device(self, value: Any) -> bool:
        """Say whether a value is a tensor that came from the device."""
        return isinstance(value, torch.Tensor) and (value.device.type != "cpu" or value in self._marked)

    def note(self, operation: str) -> None:
        """Count a read."""
        self._reads.note(operation)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any(self.is_on_device(leaf) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func in _READS:
            self.note(_READS[func])
        elif func in _INDEXES and any(_is_mask(leaf) for leaf in tree_leaves(args[1])):
            self.note("index with a mask")
        made = func(*args, **kwargs)
        written = [args[place] for place in _written_arguments(func) if place < len(args)]
        for leaf in tree_leaves((made, written)):
            if isinstance(leaf, torch.Tensor):
                self._mark(leaf)
        return made

    def _mark(self, tensor: torch.Tensor) -> torch.Tensor:
        self._marked[tensor] = True
        return tensor


class _Conversions(TorchFunctionMode):
    """The reads that never reach the dispatcher, since the memory is the host's."""

    def __init__(self, taint: TaintMode) -> None:
        super().__init__()
        self._taint = taint

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = _CONVERSIONS.get(func)
        if name is not None and self._taint.is_on_device(args[0]):
            self._taint.note(name)
        return func(*args, **(kwargs or {}))


_CONVERSIONS: dict[Any, str] = {
    torch.Tensor.cpu: "cpu",
    torch.Tensor.numpy: "numpy",
    torch.Tensor.tolist: "tolist",
    torch.Tensor.__array__: "numpy",
    torch.Tensor.__repr__: "print",
}


def _is_mask(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.bool, torch.uint8)


@cache
def _written_arguments(func: Any) -> tuple[int, ...]:
    """Return the places of the arguments that an operation writes to."""
    return tuple(
        place
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
