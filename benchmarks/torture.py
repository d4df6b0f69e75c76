"""Is a run that is killed again and again, at random moments, the run that never was?

Each attempt is a process of its own (a fork of this one, which has imported torch and has no threads) that
trains with ``resume='auto'`` and a checkpoint every few steps, on a belt drawn anew. It gets SIGKILL or
SIGTERM at a random moment, in some attempts the moment a half-written checkpoint lies in the folder. When a
run has come to its end, its weights, its rows (all but times, rates and memory) and the number of samples it
has seen are compared with those of the run that was left alone.

    python -m benchmarks.torture --kills 200 --seed 0

Baseline: the uninterrupted run, bit for bit. Unit: kills.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from benchmarks.measure import describe_machine
from pipeline import Trainer
from pipeline.checkpoint import SUFFIX, load_checkpoint
from pipeline.metrics import accuracy

BELTS: list[dict[str, Any]] = [
    {"schedule": "textbook"},
    {"schedule": "overlap", "placement": "inline", "prefetch_depth": 2},
    {"schedule": "overlap", "placement": "thread", "num_workers": 2, "prefetch_depth": 5},
]
CHANGING = ("time/", "gil/", "rate/", "memory/")
FINISHED, STOPPED, FAILED = 0, 143, 1


class Noisy(Dataset):  # type: ignore[type-arg]
    """Draws noise for each sample, as augmentation does."""

    def __init__(self, num_samples: int) -> None:
        self.inputs = torch.randn(num_samples, 16, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.inputs[index] + 0.1 * torch.randn(16), index % 4


def train(run_dir: Path, num_epochs: int, belt: dict[str, Any]) -> str:
    """Train, or go on training, and return the stop reason."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 64), torch.nn.BatchNorm1d(64), torch.nn.ReLU(), torch.nn.Dropout(0.3),
        torch.nn.Linear(64, 4),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    trainer = Trainer(
        run_dir=run_dir, resume="auto", max_epochs=num_epochs, accumulate_grad_batches=2, ema_decay=0.9,
        val_check_interval=7, checkpoint_every_n_steps=3, enable_progress_bar=False, gil="off", device="cpu",
        **belt,
    )  # fmt: skip
    result = trainer.fit(
        model, optimizer, Noisy(250), loss_fn=F.cross_entropy, batch_size=4, shuffle=True,
        val_data=Noisy(16), metrics={"accuracy": accuracy}, train_metrics={"accuracy": accuracy},
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200), scheduler_interval="step",
    )  # fmt: skip
    return result.stop_reason


def start(run_dir: Path, num_epochs: int, belt: dict[str, Any]) -> int:
    """Start a training process and return its id."""
    process = os.fork()
    if process:
        return process
    code = FAILED
    try:
        os.dup2(os.open(run_dir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        warnings.simplefilter("ignore")
        code = FINISHED if train(run_dir, num_epochs, belt) == "max_epochs" else STOPPED
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def what_is_left(run_dir: Path) -> dict[str, Any]:
    """Return what a finished run has to show."""
    newest = max((run_dir / "checkpoints").glob(f"step-*{SUFFIX}"))
    found = load_checkpoint(newest)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [
        {name: value for name, value in json.loads(line).items() if not name.startswith(CHANGING)}
        for line in lines
    ]
    return {
        "weights": found["model"] | {f"ema.{name}": each for name, each in found["ema"]["weights"].items()},
        "losses": found["journal"]["losses"].tolist(),
        "samples": found["counters"]["num_samples"],
        "rows": rows,
    }


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return the names of what is not equal, bit for bit."""
    names = [name for name in ("losses", "samples", "rows") if found[name] != expected[name]]
    weights = expected["weights"].items()
    return names + [name for name, each in weights if not torch.equal(found["weights"][name], each)]


def wait(process: int, timeout_s: float) -> int | None:
    """Return a process's exit code, negative for a signal; None if it has not ended in time."""
    until_s = time.monotonic() + timeout_s
    while time.monotonic() < until_s:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    return None


def wait_for_half(run_dir: Path, process: int, timeout_s: float) -> int | None:
    """Wait until a checkpoint is being written, or the process has ended."""
    until_s = time.monotonic() + timeout_s
    folder = run_dir / "checkpoints"
    while time.monotonic() < until_s:
        if folder.is_dir() and any(name.endswith(".tmp") for name in os.listdir(folder)):
            return None
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
    return None


def attempt(run_dir: Path, num_epochs: int, dice: random.Random, counts: Counter[str], max_s: float) -> bool:
    """Start a run or take it up again, and kill it; say whether it came to its end before."""
    process = start(run_dir, num_epochs, dice.choice(BELTS))
    waited = dice.uniform(0, max_s)
    code = wait(process, waited)
    if code is None and dice.random() < 0.3:
        code = wait_for_half(run_dir, process, 1.0)
    if code is None:
        chosen = dice.choice([signal.SIGKILL, signal.SIGTERM])
        os.kill(process, chosen)
        folder = run_dir / "checkpoints"
        code = wait(process, 60.0)
        halves = [name for name in os.listdir(folder) if name.endswith(".tmp")] if folder.is_dir() else []
        counts[f"{chosen.name}{' during a save' if halves else ''}"] += 1
        counts["kills"] += 1
    if code is None or code == FAILED:
        raise SystemExit(f"the run failed or hung: see {run_dir.with_suffix('.log')}")
    counts["stopped in good order"] += code == STOPPED
    return code == FINISHED


def torture(folder: Path, num_kills: int, num_epochs: int, seed: int, max_s: float) -> Counter[str]:
    """Kill runs until so many kills are reached and the last run has ended; raise if one differs."""
    dice, counts = random.Random(seed), Counter[str]()
    train(folder / "whole", num_epochs, BELTS[0])  # here: the attempts then find everything imported
    expected = what_is_left(folder / "whole")
    while counts["kills"] < num_kills:
        run_dir = folder / f"run-{counts['runs']:03d}"
        is_over = False
        while not is_over:
            is_over = attempt(run_dir, num_epochs, dice, counts, max_s)
            counts["attempts"] += 1
        counts["runs"] += 1
        wrong = differences(what_is_left(run_dir), expected)
        if wrong:
            raise SystemExit(f"{run_dir} differs from the uninterrupted run in {', '.join(wrong)}")
        shutil.rmtree(run_dir)
    return counts


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-s", type=float, default=0.5, help="longest life of an attempt")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(describe_machine())
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    began_s = time.monotonic()
    counts = torture(folder, asked.kills, asked.epochs, asked.seed, asked.max_s)
    shutil.rmtree(folder)
    print(f"seed {asked.seed}, {asked.epochs} epochs of 32 steps, {time.monotonic() - began_s:.0f} s")
    for name, count in sorted(counts.items()):
        print(f"{count:6d} {name}")
    print("every run equals the uninterrupted one: weights, average, losses, rows, samples seen")


if __name__ == "__main__":
    main()
