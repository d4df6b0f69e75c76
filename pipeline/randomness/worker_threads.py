"""Random draws in a worker process with several threads: the same numbers as with one.

A process of one thread isolates each batch by its global generators (`SampleRandomness.on_loop_thread`).
Threads share those, so here they make batches hooked, as prefetch threads do. The first batch of a worker
shows whether that will do; it is made while there is no other.

There is no model here, so whatever moves a global generator is the dataset. Then the batches under way are
made again, and that one and all later ones one at a time, isolated.
"""

from __future__ import annotations

import threading

from pipeline.concurrency import SharedLock
from pipeline.randomness.draws import Made, Make, SampleRandomness, ThreadRandomness
from pipeline.randomness.generator_mode import UnhookableDrawError


class Isolation:
    """Makes the batches of a worker process so that their samples draw from seeds of their own.

    Args:
        num_threads: That call it; at once, if there are several.
    """

    def __init__(self, num_threads: int) -> None:
        self._randomness, self._lock = SampleRandomness(), SharedLock()
        self._is_one_at_a_time = self._has_one_thread = num_threads == 1
        self._is_probed = False
        self._threads = threading.local()

    def make(self, make: Make[Made]) -> Made:
        """Make a batch; see `SampleRandomness`.

        Args:
            make: It may be called again, if what it made must not be used.

        Runs on:
            Any thread of the worker; waits while another one has to be alone.
        """
        if self._has_one_thread:
            return self._randomness.on_loop_thread(make)
        while not self._is_one_at_a_time:
            try:
                if self._is_probed:
                    with self._lock.shared():
                        return self._of_this_thread().make(make)
                with self._lock.alone():
                    if not self._is_probed:  # the first batch may have failed, and now there are others
                        made = self._randomness.probe(make)
                        self._is_probed = True
                        return made
            except UnhookableDrawError:
                self._is_one_at_a_time = True
        with self._lock.alone():
            return self._randomness.on_loop_thread(make)

    def _of_this_thread(self) -> ThreadRandomness:
        if not hasattr(self._threads, "randomness"):
            self._threads.randomness = ThreadRandomness(self._randomness, watches_torch=True)
        found: ThreadRandomness = self._threads.randomness
        return found
