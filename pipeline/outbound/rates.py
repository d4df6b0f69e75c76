"""Rates and memory: what a row says of a step besides its scalars, worked out where rows are made."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.batch import Batch
from pipeline.step.step import TrainStep

_MEMORY_EVERY_S = 1.0


class StepDone(NamedTuple):
    """What the loop knows of a step that it has queued, its device scalars apart.

    Args:
        step: Optimizer steps finished with this one.
        epoch: Its epoch.
        step_ns: Time since the step before it was queued, in nanoseconds.
        data_wait_ns: How much of that was spent waiting for batches.
        ended_s: When it had been queued, by `time.perf_counter`.
        num_samples: Its samples.
        num_tokens: Its tokens; 0 where nobody counts them.
    """

    step: int
    epoch: int
    step_ns: int
    data_wait_ns: int
    ended_s: float
    num_samples: int
    num_tokens: int


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
        self._memory_due_s = 0.0

    def add_to(self, values: dict[str, float], done: StepDone) -> None:
        """Put a step's times and rates among its numbers.

        Args:
            values: Written to.
            done: The step.
        """
        _, _, step_ns, data_wait_ns, ended_s, samples, tokens = done
        values["time/step_ms"] = step_ns / 1e6
        values["time/data_wait_ms"] = data_wait_ns / 1e6
        if step_ns <= 0:
            return  # a clock that did not move
        step_s = step_ns / 1e9
        values["rate/samples_per_s"] = samples / step_s
        if tokens:
            values["rate/tokens_per_s"] = tokens / step_s
        if self._peak_flops is not None and (each := self._flops_per_sample()) is not None:
            values["rate/mfu_ratio"] = each * samples / step_s / self._peak_flops
        if ended_s >= self._memory_due_s:
            self._memory_due_s = ended_s + _MEMORY_EVERY_S
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

    Args:
        count_samples: Returns the samples in a batch.
        arguments: Of `TrainStep`.
        settings: Of `TrainStep`.

    Attributes:
        flops_per_sample: None until then.

    Source:
        `torch.utils.flop_counter`: matrix products, convolutions and attention. What a compiled model
        or a kernel of one's own computes is not seen.
    """

    flops_per_sample: float | None = None

    def __init__(self, count_samples: Callable[[Batch], int], *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._count_samples = count_samples

    def micro_batch(self, batch: Batch) -> bool:
        if self.flops_per_sample is not None:
            return super().micro_batch(batch)
        with FlopCounterMode(display=False) as counter:
            is_due = super().micro_batch(batch)
        self.flops_per_sample = counter.get_total_flops() / self._count_samples(batch)
        return is_due
