"""The sampler's process: samples until it is told to stop, or nobody is left to tell it.

Commands come on standard input, one a line, and each is answered by one line of JSON on standard
output: ``report``, ``reset``, ``trace``, ``period <seconds>``, ``stop``.
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

from pipeline.gil.child.sampler import Sampler


def main() -> None:
    """Sample until told to stop, until standard input is closed, or until the parent is gone."""
    config = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's to handle
    is_realtime = config["realtime"] and _ask_for_realtime()
    sampler, period_s = Sampler(config), config["period_s"]
    pending = b""
    while os.getppid() == config["pid"]:
        # Uniform in [0.5, 1.5) periods, so that it cannot fall into step with the measured loop.
        wait_s = period_s * (0.5 + random.random())
        asleep_s = time.perf_counter()
        if not select.select([0], [], [], wait_s)[0]:
            sampler.sample(time.perf_counter() - asleep_s - wait_s)
            continue
        received = os.read(0, 4096)
        if not received:
            return
        *commands, pending = (pending + received).split(b"\n")
        for command in commands:
            word, _, value = command.decode().partition(" ")
            if word == "period":
                period_s = float(value)
            _reply(sampler, word, is_realtime)
            if word == "stop":
                return


def _ask_for_realtime() -> bool:
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError:
        return False  # not permitted: the report says so
    return True


def _reply(sampler: Sampler, word: str, is_realtime: bool) -> None:
    if word == "reset":
        sampler.reset()
    answer: dict[str, Any] = sampler.trace() if word == "trace" else sampler.report()
    sys.stdout.write(json.dumps({**answer, "is_realtime": is_realtime}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
