"""The command line of the GIL account."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence

from pipeline.errors import PipelineError
from pipeline.gil import script
from pipeline.gil.census import census_command as census
from pipeline.gil.live import gil_account
from pipeline.gil.measuring.sampler_client import BACKENDS

EXAMPLES = """examples:
  python -m pipeline.gil census                                  when does what is installed release the GIL?
  python -m pipeline.gil census --only torch --json > rows.json
  python -m pipeline.gil census --stmt "x.sort()" --setup "import numpy as np; x = np.ones(10**5)"
  python -m pipeline.gil census mymodule:collate
  python -m pipeline.gil run train.py --lr 0.1                   who holds the GIL in a script of yours
  python -m pipeline.gil run -m mypackage.train
  python -m pipeline.gil check                                   can the GIL be sampled here?
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; 2 for a mistake on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.gil",
        description="Who holds the GIL, and who waits for it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="census | run | check")
    census.add_arguments(commands.add_parser("census", help="measure callables: do they release the GIL?"))
    script.add_arguments(
        commands.add_parser("run", allow_abbrev=False, help="run a script, unchanged, and report on its GIL")
    )
    commands.add_parser("check", help="say whether and how the GIL can be sampled here")
    given = list(sys.argv[1:] if argv is None else argv)
    rest: list[str] = []
    if given[:1] == ["run"]:
        options, rest = script.split_arguments(given[1:])
        given = ["run", *options]
    arguments = parser.parse_args(given)
    try:
        if arguments.command == "census":
            return census.run(arguments)
        if arguments.command == "run":
            return script.run(arguments, rest)
        return check()
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def check() -> int:
    """Start the sampler, with its self-test, and say what came of it."""
    with gil_account() as account:
        report = account.report()
    print(f"CPython {platform.python_version()} on {platform.system()} {platform.machine()}")
    if report.backend == "signals":
        print(f"back end: signals. {report.doubts[0]}")
        return 1
    print(f"back end: {report.backend} ({BACKENDS[report.backend]})")
    print("self-test: a call that holds the GIL reads as held, one that releases it does not")
    return 0
