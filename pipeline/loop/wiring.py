"""The parts around the loop of one run: its step, its journal and loggers, the tools that watch it."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline.batch import Batch
from pipeline.checkpoint import CheckpointFolder
from pipeline.data import EVALUATION_EPOCH, Source
from pipeline.device import Backend, ReadDetector, is_host
from pipeline.loggers import JsonlLogger, LoggerGroup, ProgressBar
from pipeline.loop.check import resolve_limit
from pipeline.loop.schedule import Belts
from pipeline.loop.setup import at_most, make_autocast
from pipeline.outbound.journal import Journal
from pipeline.outbound.rates import CountingStep, Rates
from pipeline.outbound.saver import Saver
from pipeline.protocols import Logger, Metrics, RunInfo
from pipeline.ranks import has_ranks, is_rank_zero
from pipeline.settings import Settings
from pipeline.settings.ranges import seconds
from pipeline.state import TrainState
from pipeline.step.evaluate import Evaluation
from pipeline.step.guard import Guard
from pipeline.step.guard_device import DeviceGuard
from pipeline.step.guard_scaled import ScaledGuard
from pipeline.step.objective import Objective
from pipeline.step.step import TrainStep
from pipeline.step.train_metrics import TrainMetrics
from pipeline.watch.clock import StepClock
from pipeline.watch.garbage_collector import Collector


def make_step(
    settings: Settings,
    state: TrainState,
    called_model: torch.nn.Module,
    objective: Objective,
    backend: Backend,
    scheduler_interval: Literal["step", "epoch"],
    clock: StepClock,
    metrics: Metrics,
    *,
    keeps_tensors: bool,
    count_samples: Callable[[Batch], int],
    user_code: Sequence[Any] = (),
) -> TrainStep:
    """Return the step; one that counts FLOPs where they are asked for.

    Its numbers stay tensors for callbacks that are told of each step (`keeps_tensors`). The buffers of a loss
    or a step that is a module (in `user_code`) are guarded like the model's.
    """
    kind = TrainStep if settings.peak_tflops is None else partial(CountingStep, count_samples)
    of_batches = TrainMetrics(metrics, count_samples) if metrics else None
    return kind(
        state,
        called_model,
        objective,
        settings,
        backend.device,
        scheduler_interval,
        clock,
        of_batches,
        _make_guard(settings, state, backend, user_code),
        reads_at_once=is_host(backend) and not keeps_tensors,
    )


def make_evaluation(
    settings: Settings,
    belts: Belts,
    objective: Objective,
    source: Source,
    metrics: Metrics | None,
    count_samples: Callable[[Batch], int],
    *,
    merges_ranks: bool = False,
) -> Evaluation:
    """Return what evaluates a model on a source's batches, which come by a belt of their own."""
    limit = resolve_limit("limit_val_batches", settings.limit_val_batches, source.num_batches)
    return Evaluation(
        objective=objective,
        open_batches=partial(belts.inbound(source).batches, EVALUATION_EPOCH, limit),
        metrics=metrics or {},
        autocast=make_autocast(settings.precision, belts.device),
        count_samples=count_samples,
        merges_ranks=merges_ranks,
        num_batches=at_most(source.num_batches, limit),
    )


def _make_guard(
    settings: Settings, state: TrainState, backend: Backend, user_code: Sequence[Any]
) -> Guard | None:
    """Return what keeps weights and buffers clean of NaN; None if nobody asked for it."""
    if settings.on_nonfinite == "ignore":
        return None
    owners = [state.model, *(getattr(each, "__self__", each) for each in user_code)]
    modules = [each for each in owners if isinstance(each, torch.nn.Module)]
    clips_norm = settings.gradient_clip_val is not None and settings.gradient_clip_algorithm == "norm"
    keywords: Any = {"knows_norm": settings.log_grad_norm or clips_norm, "has_ranks": has_ranks()}
    if state.scaler is not None:
        return ScaledGuard(state, settings.on_nonfinite, modules, is_on_host=is_host(backend), **keywords)
    return (Guard if is_host(backend) else DeviceGuard)(state, settings.on_nonfinite, modules, **keywords)


def make_rows(run_dir: Path | None) -> JsonlLogger | None:
    """Return ``metrics.jsonl``, to which rows are appended; None if nothing is written."""
    return None if run_dir is None else JsonlLogger(run_dir / "metrics.jsonl")


def make_saver(
    settings: Settings,
    folder: CheckpointFolder | None,
    backend: Backend,
    rows: JsonlLogger | None,
    schedule: Literal["overlap", "textbook"],
) -> Saver | None:
    """Return what writes checkpoints; None if there are to be none."""
    if folder is None or rows is None:
        return None
    return Saver(settings, folder, backend, rows, is_off_loop=schedule == "overlap")


def make_collector(settings: Settings) -> Collector | None:
    """Return what decides when garbage is collected; None leaves it to Python."""
    return None if settings.gc == "default" else Collector(settings.gc, settings.gc_every_n_steps)


def make_journal(
    settings: Settings, state: TrainState, loggers: LoggerGroup, device: torch.device, step: TrainStep
) -> Journal:
    """Return what takes every step's numbers, with what adds samples per second and the like."""
    flops = (lambda: step.flops_per_sample) if isinstance(step, CountingStep) else (lambda: None)
    return Journal(
        settings, loggers, Rates(device, settings.peak_tflops, flops), last_step=lambda: state.step
    )


def make_logger_group(
    settings: Settings,
    loggers: Sequence[Logger],
    run_dir: Path | None,
    num_batches: int | None,
    hparams: Mapping[str, Any],
    schedule: Literal["overlap", "textbook"],
    rows: JsonlLogger | None,
    resumed_step: int | None,
) -> LoggerGroup:
    """Return the user's loggers and those that every run has; none on ranks that do not write."""
    every_logger = _loggers(settings, loggers, rows, num_batches) if is_rank_zero() else []
    info = _run_info(settings, run_dir, hparams, resumed_step)
    return LoggerGroup(every_logger, info, is_off_loop=schedule == "overlap")


def make_detector(settings: Settings, backend: Backend, state: TrainState) -> ReadDetector | None:
    """Return what finds the lines that wait for the device, or None if nobody asked."""
    if not settings.detect_host_reads:
        return None
    on_device = torch.nn.ModuleList([state.model] if state.ema is None else [state.model, state.ema.module])
    return ReadDetector(backend, on_device, step=lambda: state.step)


def watch_batches(
    inbound: Callable[[int, int | None, int], Generator[Batch]], detector: ReadDetector | None
) -> Callable[[int, int | None, int], Generator[Batch]]:
    """Return the inbound belt, what is done with each of its batches watched by a detector, if any."""
    if detector is None:
        return inbound
    return lambda epoch, limit, start: detector.watch(inbound(epoch, limit, start))


def installed(tool: Collector | ReadDetector | None) -> AbstractContextManager[None]:
    """Return the context in which a tool is at work; one of none does nothing."""
    return nullcontext() if tool is None else tool.installed()


def _loggers(
    settings: Settings, loggers: Sequence[Logger], rows: JsonlLogger | None, num_batches: int | None
) -> list[Logger]:
    loggers = list(loggers)
    if rows is not None:
        loggers.insert(0, rows)  # before a user's, which may hang
    if settings.enable_progress_bar:
        num_steps = settings.max_steps
        if settings.epoch_limit is not None and num_batches is not None:
            num_steps = settings.epoch_limit * -(-num_batches // settings.accumulate_grad_batches)
        loggers.append(ProgressBar(num_steps))
    return loggers


def _run_info(
    settings: Settings, run_dir: Path | None, hparams: Mapping[str, Any], resumed_step: int | None
) -> RunInfo:
    return RunInfo(run_dir, {**hparams, "trainer": plain_settings(settings)}, resumed_step)


def plain_settings(settings: Settings) -> dict[str, Any]:
    """Return the settings by name, objects among them as text."""
    return {name: _plain(value) for name, value in vars(settings).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, (bool, int, float, str, dict, type(None))):
        return value
    return str(value) if isinstance(value, (Path, torch.device)) else type(value).__name__


def deadline_s(settings: Settings, clock: StepClock) -> float:
    """Return when `max_time` is up, by the loop's clock."""
    limit_s = None if settings.max_time is None else seconds(settings.max_time)
    return math.inf if limit_s is None else clock.began_s + limit_s
