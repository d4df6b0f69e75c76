"""``python -m pipeline.gil run``: a script as it is, with a report on its GIL at the end."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.errors import ConfigError, GilAccountError
from pipeline.gil.live import GilAccount, gil_account
from pipeline.gil.marks import stage_cell
from pipeline.gil.report import to_json, to_text
from pipeline.gil.sampler import PERIOD_S
from pipeline.gil.torch_stages import torch_stages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON, too")
    parser.add_argument("--trace", metavar="FILE", help="write a trace for Perfetto or Chrome, too")
    parser.add_argument("--period-ms", type=float, default=1e3 * PERIOD_S, help="between two samples (1)")
    parser.add_argument("-m", dest="module", metavar="MODULE", help="run a module instead of a file")
    parser.add_argument("script", nargs="?", metavar="script.py", help="with its arguments behind it")


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part the options of ``run`` from the script's own: those behind it, whatever they look like."""
    takes_value = ("--json", "--trace", "--period-ms")
    at = 0
    while at < len(argv) and argv[at].startswith("-"):
        if argv[at] == "-m":
            return list(argv[: at + 2]), list(argv[at + 2 :])
        at += 2 if argv[at] in takes_value else 1
    return list(argv[: at + 1]), list(argv[at + 1 :])


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Run the script, report to standard error, and return the script's exit code.

    Raises:
        ConfigError: If there is no such script.
        SystemExit: As the script raised it.
    """
    start = _find_start(arguments, rest)
    if arguments.period_ms <= 0:
        raise ConfigError(f"--period-ms must be above 0, got {arguments.period_ms:g}.")
    own_pid = os.getpid()
    account = None
    try:
        with (
            gil_account(
                period_s=arguments.period_ms / 1e3, trace=arguments.trace is not None, functions=True
            ) as account,
            named_threads(),
            torch_stages(),
        ):
            return _run_start(start)
    finally:
        if account is not None and os.getpid() == own_pid:  # a fork of the script may come by here, too
            _report(account, arguments)


@contextmanager
def named_threads() -> Iterator[None]:
    """Have every new thread register its name, so that the report has it when the thread has ended."""

    def register(frame: FrameType, event: str, argument: Any) -> None:
        sys.setprofile(None)  # called once, at the thread's first call
        stage_cell()

    before = threading.getprofile()
    threading.setprofile(register)
    stage_cell()
    try:
        yield
    finally:
        threading.setprofile(before)


def _find_start(arguments: argparse.Namespace, rest: list[str]) -> Callable[[], object]:
    """Set the arguments and the path as Python does, and return what runs the script."""
    if arguments.module is not None:
        sys.argv = [arguments.module, *rest]
        sys.path[0] = os.getcwd()
        return lambda: runpy.run_module(arguments.module, run_name="__main__", alter_sys=True)
    if arguments.script is None:
        raise ConfigError("there is no script to run. Type: python -m pipeline.gil run script.py …")
    script = Path(arguments.script)
    if not script.is_file():
        raise ConfigError(f"{script} is no file.")
    sys.argv = [arguments.script, *rest]
    sys.path[0] = str(script.resolve().parent)
    return lambda: runpy.run_path(str(script), run_name="__main__")


def _run_start(start: Callable[[], object]) -> int:
    try:
        start()
    except Exception as error:
        _print_traceback(error)
        return 1
    return 0


def _print_traceback(error: Exception) -> None:
    """Show the script's part of the traceback, as Python would."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename in (
        __file__,
        runpy.__file__,
        "<frozen runpy>",
    ):
        trace = trace.tb_next
    traceback.print_exception(type(error), error, trace)


def _report(account: GilAccount, arguments: argparse.Namespace) -> None:
    sys.stdout.flush()
    try:
        report = account.report()
        print("\n" + to_text(report), file=sys.stderr)
        if arguments.json is not None:
            Path(arguments.json).write_text(to_json(report))
        if arguments.trace is not None:
            account.write_trace(arguments.trace)
    except (GilAccountError, OSError) as error:
        print(f"no GIL report: {error}", file=sys.stderr)
