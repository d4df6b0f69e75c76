"""Real-time priority for the sampler, but only while it would come late without.

A real-time thread is woken on the core where it slept last and takes it from whoever runs there, the
training included, even if another core is idle: beside a train step that cost 10 %. A thread of normal
priority goes to an idle core, if there is one. So it begins as one of those, and asks for more only
when it comes late, which is when no core is idle.
"""

from __future__ import annotations

import os

LATE_S = 0.0003
WINDOW = 128  # samples between two decisions
MAX_LATE_RATIO = 0.03
PROBE_WINDOWS = 64  # after so many it tries again without


class Priority:
    """Decides by how late the samples come.

    Attributes:
        is_realtime: Whether it has real-time priority now.
    """

    def __init__(self) -> None:
        self.is_realtime, self._is_refused = False, False
        self._num_samples = self._num_late = self._num_windows = 0

    def note(self, late_s: float) -> None:
        """Take note of a sample that came so late, and act on the last ones now and then."""
        self._num_samples += 1
        self._num_late += late_s > LATE_S
        if self._num_samples < WINDOW:
            return
        is_late = self._num_late > MAX_LATE_RATIO * WINDOW
        self._num_samples = self._num_late = 0
        self._num_windows += 1
        if is_late and not self.is_realtime and not self._is_refused:
            self._set(True)
        elif self.is_realtime and self._num_windows >= PROBE_WINDOWS:
            self._set(False)

    def _set(self, is_realtime: bool) -> None:
        self._num_windows = 0
        policy = (os.SCHED_FIFO, 1) if is_realtime else (os.SCHED_OTHER, 0)
        try:
            os.sched_setscheduler(0, policy[0], os.sched_param(policy[1]))
        except OSError:
            self._is_refused = True  # not permitted: the lateness in the report tells
        else:
            self.is_realtime = is_realtime
