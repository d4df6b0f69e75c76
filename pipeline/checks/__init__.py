"""Whether a dataset's batches may be made somewhere else than in the loop: looked for, compared, watched.

kinds.py    what an object is: a handle, something that is read in turn, something that can change
reach.py    all that is reachable from a dataset
cells.py    what is looked at of each such object         watch.py  what has moved between two looks
compare.py  a batch's record, and where two of them differ
checks.py   `Checks`: which placements are allowed        limits.py  what follows from what was found
trial.py    the batches of one placement, compared
"""

from pipeline.checks.checks import Checks
from pipeline.checks.compare import NotComparableError, Record
from pipeline.checks.limits import Limits
from pipeline.checks.trial import REPEATED, DifferenceError, DoubtError, Noted, Trial
from pipeline.checks.watch import StateWatch

__all__ = [
    "REPEATED",
    "Checks",
    "DifferenceError",
    "DoubtError",
    "Limits",
    "NotComparableError",
    "Noted",
    "Record",
    "StateWatch",
    "Trial",
]
