"""What to say when the device has no memory left."""

from __future__ import annotations

import torch

from pipeline.batch import Batch, num_samples


def note_out_of_memory(error: BaseException, device: torch.device, batch: Batch = None) -> None:
    """Write on an out-of-memory error how large the batch was, what the peak was, and what to try."""
    if not isinstance(error, torch.OutOfMemoryError):
        return
    size = "" if batch is None else f" with a batch of {num_samples(batch)} samples"
    error.add_note(
        f"the device ran out of memory{size}{_peak(device)}. Halve batch_size and double "
        "accumulate_grad_batches, which gives the same gradients but for batch norm; or try "
        "precision=bf16-mixed, a lower prefetch_depth, or an optimizer with less state."
    )


def _peak(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    peak, total = (
        torch.cuda.max_memory_allocated(device),
        torch.cuda.get_device_properties(device).total_memory,
    )
    return f" (peak {peak / 2**30:.1f} of {total / 2**30:.1f} GiB)"
