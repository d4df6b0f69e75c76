"""A batch to a device: its tensors one by one, and objects that can move themselves by their ``to``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pipeline.batch.record import Batch
from pipeline.batch.tree import Move, map_batch, tensors_in


def move_batch(
    batch: Batch,
    device: torch.device,
    move_tensor: Callable[[torch.Tensor], torch.Tensor],
    *,
    is_queued: bool = False,
) -> Batch:
    """Return the batch on a device; the very object if everything is there already.

    Args:
        batch: Anywhere.
        device: Where it goes.
        move_tensor: Returns a tensor on the device.
        is_queued: Whether an object is told ``non_blocking=True``, if its ``to`` takes that.
    """

    def move_object(found: Any, move: Move) -> Any:
        places = _places(found)
        if not places:
            return NotImplemented  # nothing to move, or nothing that we can see: it may be a container
        if all(place == device for place in places):
            return found
        moved = move(found, device, is_queued)
        return found if moved is None else moved  # it has moved itself

    return map_batch(batch, move_tensor, move_object)


def keep_objects(found: Any, move: Move) -> Any:
    """Leave alone what `move_batch` would move by its ``to``; for `map_batch`."""
    return found if _places(found) else NotImplemented


def _places(found: Any) -> set[torch.device]:
    """Return the devices that an object is on; none if it has nothing to do with devices."""
    places = {tensor.device for tensor in tensors_in(found)}
    if not places:
        try:
            place = found.device  # a graph without features is on a device all the same
        except Exception:  # a user's attribute may do what it likes
            return places
        if isinstance(place, torch.device):
            places.add(place)
    return places
