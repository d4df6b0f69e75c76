"""What taking the numbers away has cost, for the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.device import HostRead
from pipeline.errors import counted
from pipeline.loggers import LoggerTime

MIN_BOUND_S = 0.1  # of processor time: below it stands what a run of some steps costs at first


@dataclass(frozen=True)
class GcPauses:
    """Pauses of the garbage collector, which stop every thread.

    Args:
        num_collections: How many.
        total_s: All of them together.
        longest_s: The longest one.
        num_steps: Optimizer steps in which they fell.
    """

    num_collections: int
    total_s: float
    longest_s: float
    num_steps: int

    def __str__(self) -> str:
        each = self.total_s / self.num_steps * 1e6 if self.num_steps else 0.0
        pauses, steps = counted(self.num_collections, "pause"), counted(self.num_steps, "step")
        return f"{pauses} in {steps}, {each:,.1f} µs a step, the longest {self.longest_s * 1e3:.1f} ms"


@dataclass(frozen=True)
class GcReport:
    """What a policy of the garbage collector did.

    Args:
        policy: ``freeze`` or ``every_n_steps``.
        before: Pauses of the steps of warm-up, while the collector was left to itself, and after a
            fallback.
        after: Pauses under the policy, those at points where the loop waits anyway included.
        has_fallen_back: Whether so much garbage gathered that the collector was left to itself again.
    """

    policy: str
    before: GcPauses
    after: GcPauses
    has_fallen_back: bool

    def __str__(self) -> str:
        fallen = "; too much garbage gathered, so it was left to itself again" if self.has_fallen_back else ""
        return f"garbage collector, by default: {self.before}; gc={self.policy}: {self.after}{fallen}"


@dataclass(frozen=True)
class SaveReport:
    """What a checkpoint cost.

    Args:
        step: Its step.
        stall_s: How long the loop waited for the snapshot; in ``textbook`` it waits for `write_s` too.
        write_s: Until it was on the disk, on the writer thread in ``overlap``.
        num_bytes: Its size; 0 if it could not be written.
    """

    step: int
    stall_s: float
    write_s: float
    num_bytes: int


@dataclass(frozen=True)
class OutboundReport:
    """How the numbers left the loop; ``print(result.outbound)`` says it in words.

    Args:
        train_s: Seconds spent training, which the times below are a share of.
        loggers: What each logger cost.
        callbacks: Seconds that each callback took on the loop thread, by name.
        max_lag_steps: The most steps that the loop was ahead of the loggers; 0 in ``textbook``.
        max_lag_s: The longest time from a step's end until the loggers had its row.
        num_dropped: Rows that no logger was told, with ``log_overflow='drop'``.
        writer_cpu_s: Processor time of the writer thread: the most that it can have held the GIL. None
            in ``textbook``, which has none.
        host_reads: Lines that made the loop thread wait for the device; None if nobody looked, see
            `Settings.detect_host_reads`.
        gc: Pauses of the garbage collector; None with ``gc='default'``, where nobody measures.
    """

    train_s: float
    loggers: tuple[LoggerTime, ...]
    callbacks: Mapping[str, float]
    max_lag_steps: int
    max_lag_s: float
    num_dropped: int
    writer_cpu_s: float | None
    host_reads: tuple[HostRead, ...] | None
    gc: GcReport | None = None

    @property
    def gil_bound_loggers(self) -> tuple[LoggerTime, ...]:
        """The loggers whose processor time is more than a tenth of the training time, and worth a word."""
        return tuple(each for each in self.loggers if each.cpu_s > max(0.1 * self.train_s, MIN_BOUND_S))

    def __str__(self) -> str:
        collector = [] if self.gc is None else [str(self.gc)]
        return "\n".join([*self._lag_lines(), *self._logger_lines(), *self._read_lines(), *collector])

    def _lag_lines(self) -> list[str]:
        if self.writer_cpu_s is None:
            return ["numbers were read and logged on the loop thread (textbook)"]
        dropped = f", {counted(self.num_dropped, 'row')} dropped" if self.num_dropped else ""
        return [
            f"the loggers were at most {counted(self.max_lag_steps, 'step')} and "
            f"{self.max_lag_s * 1e3:,.0f} ms behind{dropped}; the writer thread held the GIL for at most "
            f"{self._share(self.writer_cpu_s)}"
        ]

    def _logger_lines(self) -> list[str]:
        lines = [
            f"{each.name}: {counted(each.num_rows, 'row')} in {self._share(each.wall_s)}"
            + (f", at most {self._share(each.cpu_s)} of it with the GIL" if each.cpu_s else "")
            for each in self.loggers
        ]
        lines += [f"callback {name}: {self._share(spent_s)}" for name, spent_s in self.callbacks.items()]
        return lines + [
            f"{each.name} takes the GIL from the loop: give it fewer rows (log_every_n_steps)"
            + _elsewhere(each.name)
            for each in self.gil_bound_loggers
        ]

    def _read_lines(self) -> list[str]:
        if self.host_reads is None:
            return []
        if not self.host_reads:
            return ["no line made the loop thread wait for the device"]
        return ["the loop thread waited for the device at", *(f"  {read}" for read in self.host_reads)]

    def _share(self, spent_s: float) -> str:
        share = spent_s / self.train_s if self.train_s else 0.0
        return f"{spent_s:.2f} s ({share:.1%} of training)"


def _elsewhere(name: str) -> str:
    """Return what takes a logger off the loop's GIL, for those that one can do without or make elsewhere."""
    if name == "ProgressBar":
        return ", or set enable_progress_bar=False"
    if name == "JsonlLogger":
        return ""
    kind = name.partition(" ")[0]
    return f", or move it to a process of its own with pipeline.loggers.InProcess({kind}, …)"
