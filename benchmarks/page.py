"""What does a run's report look like? Trains on JPEG images with everything on that the report shows.

Not a measurement: it makes the run folder whose page is shown in docs/report.md.

    python -m benchmarks.page [FOLDER]
    chromium --headless --window-size=1200,2560 --screenshot=docs/report.png FOLDER/report.html
"""

from __future__ import annotations

import sys
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.overlap import BATCH_SIZE, WIDTH, Made, decode, jpeg
from pipeline import Trainer


def main() -> None:
    """Train for some 25 seconds, and leave the report in the folder."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [layer for _ in range(8) for layer in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU())]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(WIDTH, 10))
    data = Made(partial(decode, jpeg()), 1000 * BATCH_SIZE)
    folder = sys.argv[1] if len(sys.argv) > 1 else "auto"
    trainer = Trainer(schedule="overlap", measure_gain=True, gil="account", run_dir=folder)
    optimizer = torch.optim.AdamW(model.parameters())
    trainer.fit(model, optimizer, data, loss_fn=F.cross_entropy, batch_size=BATCH_SIZE)


if __name__ == "__main__":
    main()
