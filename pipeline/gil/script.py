"""``python -m pipeline.gil run``: a script as it is, with a report on its GIL at the end."""

from __future__ import annotations

import argparse
import builtins
import importlib.util
import os
import runpy
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import open_code
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from pipeline.errors import ConfigError, GilAccountError
from pipeline.gil.live import GilAccount, gil_account
from pipeline.gil.marks import stage_cell
from pipeline.gil.measuring.sampler_client import PERIOD_S
from pipeline.gil.report import to_json, to_text
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
        if argv[at].startswith("-m") and len(argv[at]) > 2:
            return [*argv[:at], "-m", argv[at][2:]], list(argv[at + 1 :])
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
    for option in ("json", "trace"):
        if path := getattr(arguments, option):
            if not Path(path).absolute().parent.is_dir():
                raise ConfigError(f"--{option}: the folder {Path(path).parent} does not exist.")
            setattr(arguments, option, os.path.abspath(path))  # the script may change the folder
    own_pid, account = os.getpid(), None
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
        _check_module(arguments.module)
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
    _check_name(script.resolve().parent)
    return lambda: _execute(script.absolute())


def _execute(script: Path) -> None:
    """Run a file as Python does; unlike `runpy.run_path`, with the arguments and the name as they are."""
    main = ModuleType("__main__")
    main.__file__ = str(script)
    main.__builtins__ = builtins  # type: ignore[attr-defined]
    sys.modules["__main__"] = main
    with open_code(str(script)) as file:
        code = compile(file.read(), str(script), "exec")
    exec(code, vars(main))


def _check_module(name: str) -> None:
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise ConfigError(f"{name} is no module that can be imported from here.")


def _check_name(folder: Path) -> None:
    """Refuse a script beside a `pipeline` of its own: it would import this one."""
    ours = Path(__file__).resolve().parents[1]
    for own in (folder / "pipeline", folder / "pipeline.py"):
        if own.exists() and own.resolve() != ours:
            raise ConfigError(f"{own} has the name of this package, which would be imported in its place.")


def _run_start(start: Callable[[], object]) -> int:
    try:
        start()
    except Exception as error:
        _show(error)
        return 1
    finally:
        _wait_for_threads()
    return 0


def _wait_for_threads() -> None:
    """Wait as Python does at its end, so that the report has what threads still do."""
    while others := [
        thread
        for thread in threading.enumerate()
        if not thread.daemon and thread not in (threading.current_thread(), threading.main_thread())
    ]:
        others[0].join()


def _show(error: Exception) -> None:
    """Show an error and the script's part of its traceback, as Python would."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename in (
        __file__,
        runpy.__file__,
        "<frozen runpy>",
    ):
        trace = trace.tb_next
    sys.excepthook(type(error), error, trace)


def _report(account: GilAccount, arguments: argparse.Namespace) -> None:
    with suppress(OSError, ValueError, AttributeError):  # the script may have closed it
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
