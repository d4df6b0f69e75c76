"""The two schedules: which belts stand at either end of the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from pipeline.checks import Limits
from pipeline.concurrency import Scope, available_cores
from pipeline.data import MapSource, ShardedSource, Source
from pipeline.device import Backend, StepLimiter, make_transfer
from pipeline.inbound.belt import Inbound
from pipeline.inbound.fixed import pinned_place
from pipeline.loop.gain import GainMeter, SwitchedOutbound
from pipeline.outbound.belt import BeltOutbound, DirectOutbound, Outbound
from pipeline.outbound.journal import Journal
from pipeline.report.placement_report import PlacementReport
from pipeline.report.possible import ONE_CORE, ONE_READER
from pipeline.settings import Settings
from pipeline.watch.stall import watch_loop
from pipeline.watch.thread_times import ThreadTimes


class Belts:
    """Makes the inbound and the outbound belt of a schedule.

    Args:
        settings: Names the schedule.
        backend: The device.
        prepare: Applied to each host tensor of a batch, such as a change of memory format.

    Attributes:
        schedule: ``overlap`` or ``textbook``. ``auto`` is resolved by one rule: overlap where the
            device runs ahead of the host, so that host work can hide behind it; textbook where it
            does not, since there a thread competes with the step for the cores and the GIL.
        times: How the threads beside the loop spent theirs, those of a validation left out.
        meter: Measures what overlap wins; None where nobody asked.
    """

    def __init__(
        self,
        settings: Settings,
        backend: Backend,
        prepare: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> None:
        self.backend, self.device, self._settings = backend, backend.device, settings
        overlaps = settings.schedule == "overlap" or (
            settings.schedule == "auto" and (backend.streams is not None or settings.measure_gain)
        )
        self.schedule: Literal["overlap", "textbook"] = "overlap" if overlaps else "textbook"
        self.times = ThreadTimes()
        self._inbound: list[Inbound] = []
        self._transfer = make_transfer(backend, overlaps=overlaps, prepare=prepare)
        self.meter = GainMeter(settings) if settings.measure_gain else None

    def inbound(self, source: Source, *, is_training: bool = False) -> Inbound:
        """Return the belt that brings a source's batches; it is kept until `close`.

        Raises:
            ConfigError: If training batches are to be made in processes, and cannot be; it says why.
        """
        settings, place = self._settings, pinned_place(self._settings)
        inbound = Inbound(
            source,
            self._transfer,
            place,
            settings.prefetch_depth,
            settings.stall_timeout_s,
            self.times if is_training else None,
            is_checked=settings.check_data,
        )
        inbound.is_training = is_training
        if is_training and self.meter is not None:
            self.meter.measure(inbound)
        self._inbound.append(inbound)
        if is_training and place is not None and place.name == "process":
            # What cannot be is refused before any file is made.
            inbound.start_processes(place.num_workers, place.num_threads)
        return inbound

    @property
    def placement(self) -> PlacementReport:
        """Where the batches of the training are made, and why."""
        return next(each for each in self._inbound if each.is_training).placement

    def why_no_process(self) -> str:
        """Say why no process could make the batches of the training better; empty if nothing is known."""
        if not isinstance(self.training_source, MapSource | ShardedSource):
            return ONE_READER
        if not (limits := self.training_limits).has_processes:
            return limits.reason
        if self.placement.name == "process":
            return "worker processes make them already"
        if any(place.startswith("process") for place in self.placement.tried_ms):
            return "auto has tried processes, and they were no faster"
        return ONE_CORE if available_cores() == 1 else self.placement.obstacle

    @property
    def training_limits(self) -> Limits:
        """What was found in the training data."""
        return next(each for each in self._inbound if each.is_training).checks.limits

    @property
    def training_source(self) -> Source:
        """What the batches of the training are made from."""
        return next(each for each in self._inbound if each.is_training).source

    def close(self) -> None:
        """End what the inbound belts keep from epoch to epoch, such as processes."""
        for inbound in self._inbound:
            inbound.close()

    def limiter(self, max_steps_in_flight: int) -> StepLimiter | None:
        """Return what bounds the run-ahead; None where each step's read already does."""
        streams = self.backend.streams
        if self.schedule == "textbook" or streams is None:
            return None
        return StepLimiter(streams, max_steps_in_flight)

    def outbound(self, scope: Scope, journal: Journal) -> Outbound:
        """Return where the loop puts its numbers; the scope owns the writer thread, if any."""
        if self.schedule == "textbook":
            if self._settings.stall_timeout_s is not None:
                watch_loop(scope, self._settings.stall_timeout_s, lambda: len(journal.losses))
            return self._direct(journal)
        belt = BeltOutbound(scope, self.backend, journal, self._settings, self.times)
        return belt if self.meter is None else SwitchedOutbound(self.meter, belt, self._direct(journal))

    def _direct(self, journal: Journal) -> DirectOutbound:
        return DirectOutbound(self.backend, journal)
