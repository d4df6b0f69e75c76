"""What a run says of itself when it has ended: on the terminal, as JSON, and as a page.

ceilings.py  the bounds of a step, and the prediction for each placement: arithmetic only
costs.py     from a run's clocks and account to what a step costs
verdict.py   in words: what binds, and the one setting to change next
record.py    `RunReport`, and its JSON        text.py   the table for a terminal
lanes.py     who did what when                page.py   the page, of page.html, .css and .js
outbound.py  what taking the numbers away cost
compare.py   several runs side by side        plots.py  the same as PNG
"""

from pipeline.report.outbound_report import GcPauses, GcReport, OutboundReport, SaveReport

__all__ = ["GcPauses", "GcReport", "OutboundReport", "SaveReport"]
