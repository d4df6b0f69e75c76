"""What a run that has ended gives back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.loop.reporting import make_report, publish
from pipeline.loop.run import Run
from pipeline.loop.schedule import Belts
from pipeline.report import OutboundReport
from pipeline.result import FitResult


def make_result(
    run: Run,
    belts: Belts,
    run_dir: Path | None,
    train_data: Any,
    resumed_from: Path | None,
) -> FitResult:
    """Sum up a run that has ended, and publish its report."""
    saver, outbound, seed = run.saver, _outbound_report(run), run.settings.seed
    assert seed is not None
    report = make_report(run, belts, outbound, train_data)
    publish(report, run.settings, run_dir)
    return FitResult(
        metrics=report.metrics,
        history=run.history,
        losses=run.journal.losses,
        num_steps=run.state.step,
        num_epochs=run.state.epoch,
        schedule=belts.schedule,
        seed=seed,
        samples_per_s=report.samples_per_s,
        train_s=run.clock.train_s,
        stop_reason=run.interrupted_by or run.stop_reason,
        run_dir=run_dir,
        last_checkpoint=None if saver is None else saver.folder.last,
        best_checkpoint=None if saver is None else saver.folder.best_path,
        stage_times=run.clock.times(),
        handoffs_per_step=run.gil.handoffs_per_step(run.clock.num_steps),
        gil=run.gil.report,
        ema_model=None if run.state.ema is None else run.state.ema.module,
        resumed_from=resumed_from,
        saves=() if saver is None else tuple(saver.reports),
        outbound=outbound,
        placement=belts.placement,
        report=report,
    )


def _outbound_report(run: Run) -> OutboundReport:
    return OutboundReport(
        train_s=run.clock.train_s,
        loggers=tuple(run.journal.loggers.times),
        callbacks=run.callbacks.times(),
        max_lag_steps=run.outbound.max_lag_steps,
        max_lag_s=run.outbound.max_lag_s,
        num_dropped=run.journal.num_dropped,
        writer_cpu_s=run.outbound.writer_cpu_s,
        host_reads=None if run.detector is None else run.detector.reads.found(),
        gc=None if run.collector is None else run.collector.report(),
    )
