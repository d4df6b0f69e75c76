"""`python -m pipeline.report RUN_DIR [RUN_DIR …]`: show a run that has ended, or compare several."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.report.compare import find_runs, to_table, write_page
from pipeline.report.plots import write_plots


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report of one run, or a table of several; write a page and plots where asked."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.report", description=main.__doc__)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN_DIR", help="a run's folder, or one that holds several, as a sweep's"
    )
    parser.add_argument("--html", metavar="FILE", help="write one self-contained page of all of them")
    parser.add_argument("--png", metavar="FOLDER", help="write plots (pip install 'beltloop[report]')")
    options = parser.parse_args(arguments)
    try:
        runs = find_runs(options.runs)
        print(runs[0][1] if len(runs) == 1 else to_table(runs))
        if options.html is not None:
            write_page(Path(options.html), runs)
            print(f"page: {options.html}")
        if options.png is not None:
            for path in write_plots(Path(options.png), runs):
                print(f"plot: {path}")
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
