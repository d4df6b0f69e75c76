"""The step of a run, and what is worked out from it."""

from __future__ import annotations

from typing import Literal

import torch

from pipeline.loop.collector import Collector
from pipeline.loop.objective import Objective
from pipeline.loop.rates import CountingStep, Rates
from pipeline.loop.step import TrainStep
from pipeline.loop.train_metrics import TrainMetrics
from pipeline.protocols import Metrics
from pipeline.settings import Settings
from pipeline.state import TrainState


def make_step(
    settings: Settings,
    state: TrainState,
    called_model: torch.nn.Module,
    objective: Objective,
    device: torch.device,
    scheduler_interval: Literal["step", "epoch"],
    metrics: Metrics,
) -> TrainStep:
    """Return the step; one that counts FLOPs where they are asked for."""
    kind = TrainStep if settings.peak_tflops is None else CountingStep
    of_batches = TrainMetrics(metrics) if metrics else None
    return kind(state, called_model, objective, settings, device, scheduler_interval, of_batches)


def make_collector(settings: Settings) -> Collector | None:
    """Return what decides when garbage is collected; None leaves it to Python."""
    return None if settings.gc == "default" else Collector(settings.gc, settings.gc_every_n_steps)


def make_rates(settings: Settings, device: torch.device, step: TrainStep) -> Rates:
    """Return what adds samples per second and the like to a row."""
    flops = (lambda: step.flops_per_sample) if isinstance(step, CountingStep) else (lambda: None)
    return Rates(device, settings.peak_tflops, flops)
