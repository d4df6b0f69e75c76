"""Whether a dataset's batches may be made somewhere else than in the loop: looked at, compared, watched.

1. **Searched.** What is reachable from the dataset is searched for handles, iterators, generators of random
   numbers, and the model that is trained (`reach`).
2. **Looked at.** Before batches are made in a new place, the loop makes some more of them itself. What moves
   while a batch is made, and what moves between two of them, keeps the batches in the loop (`watch`).
3. **Made twice.** The loop makes the last of these again, as a thread would. If it comes out differently, it
   is no function of its indices, and stays in the loop. What moves is never made twice.
4. **Compared.** The new place begins with the last of these batches. They are compared bit for bit with those
   that were trained on, and thrown away.
5. **Watched.** As long as batches are made ahead, what is reachable is looked at before each one is handed
   over, and now and then the loop makes one again, to be compared before it is used. Both together take less
   than a hundredth of the run's time.

kinds.py      what an object is: a handle, something that is read in turn, something that can change
reach.py      all that is reachable from a dataset        parts.py    what one object leads to
cells.py      what is looked at of each such object       watch.py    what has moved between two looks
undo.py       what batches made ahead have moved, put back
in_worker.py  a look in a worker process
compare.py    a batch's record, and where two differ       control.py  one batch made again by the loop
comparer.py   batches compared now and then               trial.py    the batches of one placement, compared
checks.py     `Checks`: which placements are allowed      limits.py   what follows from what was found
"""

from pipeline.checks.checks import OURS_REMEDY, Checks
from pipeline.checks.compare import NotComparableError, Record
from pipeline.checks.in_worker import looking
from pipeline.checks.limits import Limits
from pipeline.checks.trial import REPEATED, DifferenceError, DoubtError, MovedThereError, Noted, Trial
from pipeline.checks.watch import StateWatch

__all__ = [
    "OURS_REMEDY",
    "REPEATED",
    "Checks",
    "DifferenceError",
    "DoubtError",
    "Limits",
    "MovedThereError",
    "NotComparableError",
    "Noted",
    "Record",
    "StateWatch",
    "Trial",
    "looking",
]
