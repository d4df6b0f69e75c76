"""An optimizer's step that may have to be taken back, and when that need not be prepared for.

A step can make NaN or infinity of numbers that are finite: a square that overflows, a division by nothing,
a learning rate that is NaN. Nothing says so beforehand, and the weights and the state are overwritten. So
there is a copy of them first, which is looked at and dropped, unless it is known that nothing can happen:
torch's usual optimizers, with gradients of a moderate size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import optim
from torch.nn.parameter import is_lazy

from pipeline.step.finite import MODERATE, appeared, are_finite, are_moderate, has_numbers

# Squares of moderate gradients are finite, and what is divided by has eps added to it.
_TAME = (
    optim.SGD,
    optim.Adam,
    optim.AdamW,
    optim.NAdam,
    optim.RAdam,
    optim.Adamax,
    optim.Adagrad,
    optim.Adadelta,
    optim.RMSprop,
    optim.SparseAdam,
    optim.Rprop,
    optim.ASGD,
)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return what an optimizer changes; a lazy parameter only once it has numbers."""
    return [each for group in optimizer.param_groups for each in group["params"] if not is_lazy(each)]


def gradients_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return the gradients that its next step takes."""
    groups = optimizer.param_groups
    return [grad for group in groups for each in group["params"] if (grad := each.grad) is not None]


def is_tame(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether a step with moderate gradients leaves finite numbers finite, whatever they are.

    Waits for a device if a learning rate is a tensor there.
    """
    return (
        type(optimizer) in _TAME
        and not optimizer._optimizer_step_pre_hooks
        and not optimizer._optimizer_step_post_hooks
        and all(_is_tame(group) for group in optimizer.param_groups)
    )


def _is_tame(group: dict[str, Any]) -> bool:
    return (
        bool(0 <= group["lr"] <= MODERATE)  # False for NaN
        and bool(0 <= group["lr"] * group.get("weight_decay", 0.0) <= 1)  # or weights grow by it alone
        and 0 <= group.get("momentum", 0.0) < 1
        and group.get("eps", 1.0) > 1e-30
        and not group.get("centered", False)  # the root of a difference, which may be negative
        and not any(each.dtype is torch.float16 for each in group["params"])  # its eps is 0
    )


class _Outline(NamedTuple):
    whole: Any
    parts: Any


class UpdateCopy:
    """A copy of what an optimizer's step changes: its parameters, its state, its groups' numbers.

    Its memory is kept from step to step. What an optimizer keeps elsewhere, in attributes of its own, is
    not in it.

    Args:
        optimizer: Any.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._memory: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # the tensor, and its copy
        self._state: dict[Any, Any] = {}
        self._groups: list[dict[str, Any]] = []
        self._counts: set[int] = set()

    @property
    def nbytes(self) -> int:
        """What the copy takes."""
        return sum(copy.nbytes for _, copy in self._memory.values())

    @torch.no_grad()
    def take(self) -> None:
        """Copy what there is now."""
        before, self._memory = self._memory, {}
        for each in self.live():
            self._memory[id(each)] = each, _memory_for(each, before.get(id(each)))
        copies = [copy for _, copy in self._memory.values()]
        if copies:
            torch._foreach_copy_(copies, [each for each, _ in self._memory.values()])
        self._state = {key: _outline(value) for key, value in self._optimizer.state.items()}
        self._counts = self._host_counts()
        self._groups = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self._optimizer.param_groups
        ]

    def live(self) -> list[torch.Tensor]:
        """Return the tensors that a step may change."""
        found = [*parameters_of(self._optimizer), *self.live_state()]
        for group in self._optimizer.param_groups:
            found += _tensors({name: value for name, value in group.items() if name != "params"})
        return [*{id(each): each for each in found if not is_lazy(each)}.values()]

    def live_state(self) -> list[torch.Tensor]:
        """Return the tensors of the optimizer's state."""
        return [each for state in self._optimizer.state.values() for each in _tensors(state)]

    def _host_counts(self) -> set[int]:
        """Return the counts of steps that an optimizer keeps on the host beside a device."""
        return {
            id(count)
            for group in self._optimizer.param_groups
            if not (group.get("fused") or group.get("capturable"))
            for each in group["params"]
            if (count := _count_of(self._optimizer.state.get(each))) is not None
        }

    def is_finite(self) -> bool:
        """Say whether the step has left only finite numbers, but where there were others; waits.

        A single infinite number that the step made anew is taken to be meant, such as a least loss so far.
        """
        matched = [(now, copy) for now, copy in self._matched() if has_numbers(now)]
        if are_moderate(now for now, _ in matched):
            return True
        return all(are_finite([now]) or _may_be_infinite(now, copy) for now, copy in matched)

    def spoiled(self) -> torch.Tensor:
        """Return the same as a flag on the device, waiting for nothing: whether it has left others."""
        device = parameters_of(self._optimizer)[0].device
        pairs = [
            (now, copy)
            for now, copy in self._matched()
            if copy is not None and has_numbers(now) and now.numel() and now.device == device
        ]
        return appeared([now for now, _ in pairs], [copy for _, copy in pairs], counts_infinity=True)

    @torch.no_grad()
    def select(self, is_bad: torch.Tensor) -> None:
        """Put the values back if a flag on the device is set, waiting for nothing.

        The host's own count of steps goes on: it is read by the next step, when nobody knows the flag yet.
        """
        for now, copy in self._matched():
            if now.device == is_bad.device:
                # A first step is never made here, and what an optimizer begins later begins with zeros.
                torch.where(is_bad, torch.zeros_like(now) if copy is None else copy, now, out=now)

    def _matched(self) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Return each tensor that is there now, but for the host's counts, and the copy of what it was."""
        pairs: list[tuple[torch.Tensor, Any]] = [(each, each) for each in parameters_of(self._optimizer)]
        for key, state in self._optimizer.state.items():
            pairs += _paired(state, self._state.get(key))
        for group, before in zip(self._optimizer.param_groups, self._groups, strict=False):
            pairs += _paired({name: group[name] for name in before}, _Outline(group, before))
        unique = {id(now): (now, self._copy_of(now, before)) for now, before in pairs}
        return [each for each in unique.values() if id(each[0]) not in self._counts]

    def _copy_of(self, now: torch.Tensor, before: Any) -> torch.Tensor | None:
        _, copy = self._memory.get(id(before), (None, None))
        return copy if copy is not None and copy.shape == now.shape and copy.dtype == now.dtype else None

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back; what the step made anew is gone."""
        for tensor, copy in self._memory.values():
            tensor.copy_(copy)
        state = self._optimizer.state
        for key in [key for key in state if key not in self._state]:
            del state[key]
        for key, outline in self._state.items():
            state[key] = _from_outline(outline)
        for group, before in zip(self._optimizer.param_groups, self._groups, strict=False):
            group.update(before)


def _count_of(state: Any) -> Any:
    return state.get("step") if isinstance(state, dict) else None


def _memory_for(tensor: torch.Tensor, old: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    if old is not None and old[1].shape == tensor.shape and old[1].dtype == tensor.dtype:
        return old[1]
    return torch.empty_like(tensor, requires_grad=False)


def _tensors(value: Any) -> list[torch.Tensor]:
    """Return the tensors in a part of an optimizer's state, at any depth."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [each for part in value for each in _tensors(part)] if isinstance(value, (list, tuple)) else []


def _paired(now: Any, before: Any) -> list[tuple[torch.Tensor, Any]]:
    """Return the tensors in a part of a state, each with what an outline has in its place, or None."""
    if isinstance(now, torch.Tensor):
        return [(now, before)]
    places = range(len(now)) if isinstance(now, (list, tuple)) else now if isinstance(now, dict) else ()
    parts = before.parts if isinstance(before, _Outline) else before
    return [pair for place in places for pair in _paired(now[place], _part(parts, place))]


def _part(parts: Any, place: Any) -> Any:
    if isinstance(parts, dict):
        return parts.get(place)
    is_there = isinstance(parts, (list, tuple)) and isinstance(place, int) and place < len(parts)
    return parts[place] if is_there else None


def _may_be_infinite(now: torch.Tensor, copy: torch.Tensor | None) -> bool:
    if copy is not None:
        return not are_finite([copy])
    return now.ndim == 0 and not bool(now.isnan().item())


def _outline(value: Any) -> Any:
    """Return which objects a part of a state consists of; the tensors' values are kept apart."""
    if isinstance(value, dict):
        return _Outline(value, {name: _outline(part) for name, part in value.items()})
    if isinstance(value, list):
        return _Outline(value, [_outline(part) for part in value])
    return value


def _from_outline(outline: Any) -> Any:
    """Make the objects of an outline consist of the same parts again."""
    if not isinstance(outline, _Outline):
        return outline
    whole, parts = outline
    whole.clear()
    if isinstance(parts, dict):
        whole.update({name: _from_outline(part) for name, part in parts.items()})
    else:
        whole.extend(_from_outline(part) for part in parts)
    return whole
