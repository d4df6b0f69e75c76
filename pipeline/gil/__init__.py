"""The GIL account: who holds the GIL, who waits for it, at which stage. Standard library only.

with gil_account() as account:
    with stage("collate"):
        ...
print(to_text(account.report()))

sampler/    the sampler, in a process of its own    measuring/        starts it, and tells it where the GIL is
marks.py    which stage a thread is in              cheap_signals.py  wall time, thread time, hand-offs
account.py  from counts to shares                   report.py         text and JSON; trace.py: over time
live.py     `gil_account`                           census/, script.py, command.py  the commands
"""

from pipeline.gil.account import GilReport, HoldingFunction, StageShare
from pipeline.gil.cheap_signals import StageTime
from pipeline.gil.live import GilAccount, gil_account
from pipeline.gil.marks import stage, stage_cell, stage_id
from pipeline.gil.report import to_json, to_text

__all__ = [
    "GilAccount",
    "GilReport",
    "HoldingFunction",
    "StageShare",
    "StageTime",
    "gil_account",
    "stage",
    "stage_cell",
    "stage_id",
    "to_json",
    "to_text",
]
