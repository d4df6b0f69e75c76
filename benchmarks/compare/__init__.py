"""The same model, data and step on other people's loops and on ours; see `__main__`.

workloads.py  ten jobs and what each stands for      job.py     a job under way: model, device, clock
loops.py      the textbook loop, the sensible one    peers.py   SPDL, torchdata.nodes, Lightning, Accelerate
ours.py       this project, every placement          table.py   medians, ratios, verdicts; plots.py  as PNG
resources.py  memory, processor time, first step     growth.py  with workers, depth, batch size, launches
"""
