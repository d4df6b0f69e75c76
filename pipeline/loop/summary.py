"""What taking the numbers of a run away has cost."""

from __future__ import annotations

from pipeline.loop.fit import Run
from pipeline.report import OutboundReport


def make_outbound_report(run: Run) -> OutboundReport:
    """Sum up the outbound side of a run whose threads have ended."""
    return OutboundReport(
        train_s=run.clock.train_s,
        loggers=tuple(run.journal.loggers.times),
        callbacks=run.callbacks.times(),
        max_lag_steps=run.outbound.max_lag_steps,
        max_lag_s=run.outbound.max_lag_s,
        num_dropped=run.journal.num_dropped,
        writer_cpu_s=run.outbound.writer_cpu_s,
        host_reads=None if run.detector is None else run.detector.reads.found(),
    )
