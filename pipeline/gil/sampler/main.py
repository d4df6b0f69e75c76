"""The sampler's process: samples until it is told to stop, or nobody is left to tell it.

Commands come on standard input, one a line: ``report``, ``reset``, ``trace``, ``period <seconds>``,
each answered by one line of JSON on standard output, and ``stop``, which is not answered.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
from typing import Any

from pipeline.gil.sampler.priority import Priority
from pipeline.gil.sampler.sampler import Sampler

# It rests for so many times the length of a sample, and with many threads samples less often; a short
# period, as of the census, asks for less rest.
REST_FACTOR, SHORT_REST_FACTOR, SHORT_PERIOD_S = 8, 2, 0.0005


def main() -> None:
    """Sample until told to stop, until standard input is closed, or until the parent is gone."""
    config = json.loads(sys.argv[1])
    _become_deaf()
    sampler, priority = Sampler(config), Priority()
    period_s, taken_s = config["period_s"], 0.0
    pending = b""
    while os.getppid() == config["pid"]:
        # Uniform in [0.5, 1.5) periods, so that it cannot fall into step with the measured loop.
        rest_factor = REST_FACTOR if period_s > SHORT_PERIOD_S else SHORT_REST_FACTOR
        wait_s = max(period_s * (0.5 + random.random()), rest_factor * taken_s)
        asleep_s = time.perf_counter()
        if not select.select([0], [], [], wait_s)[0]:
            began_s = time.perf_counter()
            late_s = began_s - asleep_s - wait_s
            sampler.sample(late_s)
            priority.note(late_s)
            taken_s = time.perf_counter() - began_s
            continue
        received = os.read(0, 4096)
        if not received:
            return
        *commands, pending = (pending + received).split(b"\n")
        for command in commands:
            word, _, value = command.decode().partition(" ")
            if word == "stop":
                return
            if word == "period":
                period_s = float(value)
            _reply(sampler, word, {"is_realtime": priority.is_realtime, "period_s": period_s})


def _become_deaf() -> None:
    """Ignore what is sent to every process of a program: it is the parent's to handle."""
    deaf = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
    for number in deaf:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, deaf)


def _reply(sampler: Sampler, word: str, facts: dict[str, Any]) -> None:
    if word == "reset":
        sampler.reset()
    answer: dict[str, Any] = sampler.trace() if word == "trace" else sampler.report()
    sys.stdout.write(json.dumps({**answer, **facts}) + "\n")
    sys.stdout.flush()
