"""Whether a dataset's batches may be made somewhere else than in the loop: looked for, compared, watched.

kinds.py    what an object is: a handle, something that is read in turn, something that can change
reach.py    all that is reachable from a dataset
cells.py    what is looked at of each such object            watch.py  what has moved between two looks
compare.py  a batch's record, and where two of them differ
checks.py   `Checks`: which placements are allowed, and the comparisons for the length of a run
"""

from pipeline.checks.checks import REPEATED, Checks, DifferenceError, Doubt, Limits, Noted, Trial
from pipeline.checks.compare import NotComparableError, Record
from pipeline.checks.watch import StateWatch

__all__ = [
    "REPEATED",
    "Checks",
    "DifferenceError",
    "Doubt",
    "Limits",
    "NotComparableError",
    "Noted",
    "Record",
    "StateWatch",
    "Trial",
]
