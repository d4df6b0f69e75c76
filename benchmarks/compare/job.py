"""A job under way: one model on one device, and the clock that every loop is measured by.

The clock is read where a step begins, which all loops have in common. The last step waits for the device
first, so that a loop which ran ahead has not won what it has yet to wait for.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.compare.workloads import Workload
from pipeline import SimulatedBackend
from pipeline.batch import map_tensors

WARM_STEPS = 8
MANY_BATCHES = 50_000


class Job:
    """A model, an optimizer, a device and a clock.

    Args:
        workload: Says what it is.
        is_simulated: Whether its device is the simulated accelerator; else the CPU.
    """

    def __init__(self, workload: Workload, *, is_simulated: bool) -> None:
        torch.manual_seed(0)
        self.workload, width = workload, workload.width
        num_layers = 1 if is_simulated else workload.num_layers
        layers = [
            layer for _ in range(num_layers) for layer in (torch.nn.Linear(width, width), torch.nn.ReLU())
        ]
        self.model = torch.nn.Sequential(*layers, torch.nn.Linear(width, 10))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.device = SimulatedBackend(is_virtual=False) if is_simulated else None
        self.made_s = time.perf_counter()
        self.began_s: list[float] = []
        self.num_steps = workload.num_steps

    def settle_first(self, times: int) -> Workload:
        """Run with epochs so many times as long, of which the last part counts; return all of it."""
        longer = replace(self.workload, num_batches=times * self.workload.num_batches)
        self.num_steps = longer.num_steps
        return longer

    def settle_until_told(self) -> Workload:
        """Run on and on, until `measure_now` has been called and its steps are done; return all of it."""
        self.num_steps = MANY_BATCHES * self.workload.num_epochs
        return replace(self.workload, num_batches=MANY_BATCHES)

    def measure_now(self) -> None:
        """Have the steps from here on count, as many as the workload has."""
        self.num_steps = len(self.began_s) + self.workload.num_steps

    @property
    def is_over(self) -> bool:
        """Whether all steps have been made."""
        return len(self.began_s) >= self.num_steps

    def restart(self) -> None:
        """Begin now: what came before was preparation."""
        self.made_s = time.perf_counter()

    def forward(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """Return the loss; on the simulated device, its work is queued there."""
        if len(self.began_s) == self.num_steps - 1:
            self.drain()
        self.began_s.append(time.perf_counter())
        if isinstance(batch, dict):
            features, target = batch["features"], batch["target"]
        else:
            features, target = batch
        if features.ndim == 3:
            features = features.mean(dim=1)  # a large batch
        outputs = model(features[:, : self.workload.width])
        if self.device is not None:
            self.device.launch(self.workload.device_ms / 1e3, self.workload.num_launches)
        loss: torch.Tensor = F.cross_entropy(outputs, target)
        return loss

    def move(self, batch: Any) -> Any:
        """Bring a batch to the device as a plain loop does."""
        return batch if self.device is None else map_tensors(batch, self.device.move)

    def read(self, loss: torch.Tensor) -> float:
        """Wait for the device and return the loss."""
        return loss.item() if self.device is None else self.device.read(loss)

    def drain(self) -> None:
        """Wait until the device has done what was queued."""
        if self.device is not None:
            self.device.record_compute().synchronize()

    def further(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the further numbers that this workload logs, unread."""
        return {
            f"train/number_{number}": loss.detach() * number for number in range(self.workload.num_logged)
        }

    @property
    def step_ms(self) -> float:
        """Milliseconds a step, the first ones left out unless the start counts."""
        if not self.is_over:
            raise RuntimeError(f"{len(self.began_s)} of {self.num_steps} steps were made")
        if self.workload.counts_start:
            return (self.began_s[-1] - self.made_s) / (len(self.began_s) - 1) * 1e3
        counted = self.began_s[self.num_steps - self.workload.num_steps : self.num_steps]
        warm = min(WARM_STEPS, len(counted) // 4)
        return (counted[-1] - counted[warm]) / (len(counted) - 1 - warm) * 1e3

    @property
    def first_ms(self) -> float:
        """Milliseconds until the first step began."""
        return (self.began_s[0] - self.made_s) * 1e3


class Log:
    """Writes a line for each row, as a plain loop does."""

    def __init__(self) -> None:
        self._file = tempfile.NamedTemporaryFile("w")  # noqa: SIM115  (closed by `close`)

    def write(self, job: Job, step: int, loss: torch.Tensor) -> None:
        """Read the numbers of a step and write them."""
        values = {"train/loss": job.read(loss)}
        values |= {name: job.read(value) for name, value in job.further(loss).items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        """Close the file and remove it."""
        self._file.close()
