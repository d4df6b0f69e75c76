"""Rates and memory: what a row says of a step besides its scalars, worked out where rows are made."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.batch import Batch, num_samples
from pipeline.every import Every
from pipeline.loop.step import TrainStep

_MEMORY_EVERY_S = 1.0


class Rates:
    """Samples, tokens and FLOPs per second of a step, and now and then the memory in use.

    Args:
        device: Its memory is told, if it counts its own.
        peak_tflops: What the device can do at best; None tells no utilisation.
        flops_per_sample: Returns what a sample costs, forward and backward; None while unknown.

    Runs on:
        The writer thread in ``overlap``, the loop thread in ``textbook``. Reads nothing from the device.
    """

    def __init__(
        self,
        device: torch.device,
        peak_tflops: float | None,
        flops_per_sample: Callable[[], float | None],
    ) -> None:
        self._device, self._flops_per_sample = device, flops_per_sample
        self._peak_flops = None if peak_tflops is None else peak_tflops * 1e12
        self._num_samples = self._num_tokens = 0
        self._is_first = True
        self._memory_is_due = Every(seconds=_MEMORY_EVERY_S)

    def add_to(self, values: dict[str, float], step_s: float, num_samples: int, num_tokens: int) -> None:
        """Put a step's rates among its numbers.

        Args:
            values: Written to.
            step_s: The step's time.
            num_samples: Samples of the run so far, this step's included.
            num_tokens: Tokens of the run so far; 0 where nobody counts them.
        """
        samples, self._num_samples = num_samples - self._num_samples, num_samples
        if step_s <= 0:
            return  # a clock that did not move
        values["rate/samples_per_s"] = samples / step_s
        if num_tokens:
            values["rate/tokens_per_s"] = (num_tokens - self._num_tokens) / step_s
            self._num_tokens = num_tokens
        if self._peak_flops is not None and (each := self._flops_per_sample()) is not None:
            values["rate/mfu_ratio"] = each * samples / step_s / self._peak_flops
        if self._is_first or self._memory_is_due.is_due(0):
            self._is_first = False
            values |= memory_in_use(self._device)


def memory_in_use(device: torch.device) -> dict[str, float]:
    """Return the bytes that this process and its tensors on the device take, where that is known."""
    found: dict[str, float] = {}
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found["memory/host_bytes"] = pages * os.sysconf("SC_PAGE_SIZE")
    if device.type != "cpu":
        allocated = getattr(torch.get_device_module(device), "memory_allocated", None)
        if allocated is not None:
            found["memory/device_bytes"] = allocated(device)
    return found


class CountingStep(TrainStep):
    """A step that counts the FLOPs of its first micro-batch, forward and backward.

    Attributes:
        flops_per_sample: None until then.

    Source:
        `torch.utils.flop_counter`: matrix products, convolutions and attention. What a compiled model
        or a kernel of one's own computes is not seen.
    """

    flops_per_sample: float | None = None

    def micro_batch(self, batch: Batch) -> None:
        if self.flops_per_sample is not None:
            return super().micro_batch(batch)
        with FlopCounterMode(display=False) as counter:
            super().micro_batch(batch)
        self.flops_per_sample = counter.get_total_flops() / num_samples(batch)
        return None
