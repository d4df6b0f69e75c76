"""``python -m pipeline.gil``: census, run, check."""

from __future__ import annotations

import sys

from pipeline.gil.command import main

if __name__ == "__main__":
    sys.exit(main())
